"""Kinds of command-line arguments, and the checks that come before any work is done."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemiola_runtime.errors import RequestError


def positive(text: str) -> int:
    """Read a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more, not {text!r}")
    return number


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
        raise RequestError(f"{path} should end in {suffix}: files of other kinds are written beside it")
