"""Kinds of command-line arguments, and the checks that come before any work is done."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola_runtime.errors import RequestError

if TYPE_CHECKING:
    from hemiola_export.model import Model


def positive(text: str) -> int:
    """Read a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more, not {text!r}")
    return number


def pixels(text: str) -> tuple[int, int]:
    """Read the height and width of a picture, as in 512x768."""
    match = re.fullmatch(r"([0-9]{1,5})[x×]([0-9]{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"height and width in pixels, as in 512x768, not {text!r}")
    return int(match[1]), int(match[2])


def add_model(parser: argparse.ArgumentParser) -> None:
    """Describe the argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help="diffusers folder or hub id")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="take MODEL for a known architecture (dit-xl-2, dit-xl-2-512, pixart-xl-2-256, pixart-xl-2-512 or "
        "pixart-xl-2-1024) and draw its weights: for measuring speed",
    )


def load_or_draw(model: str, has_random_weights: bool) -> Model:
    """Load a model, or make one of a known architecture.

    Raises:
        ExportError: there is no such model or architecture, or no family opens it.
    """
    from hemiola_export.architectures import random_model
    from hemiola_export.model import load_model

    return random_model(model) if has_random_weights else load_model(model)


def check_output_file(path: Path | None, suffix: str = "") -> None:
    """Refuse an output file that cannot be one, before anything is computed for it.

    Raises:
        RequestError: it is a folder, or its name has another suffix.
    """
    if path is None:
        return
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name a file in it")
    if suffix and path.suffix != suffix:
        raise RequestError(f"{path} should end in {suffix}, which is what is written into it")
