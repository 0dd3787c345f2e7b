"""The command line, called in this process: what its tests make with it, and how they look at what it says."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from bundles import SELECTOR, schedule_from_rhythm
from hemiola.cli import main
from hemiola_export.model import load_model
from hemiola_runtime.schedule import TokenSelector, read_schedule, write_schedule
from models import save_tiny_model, tiny_dit

# 6 steps, 2 of them full: one uniform period is all that can be found.
SEARCH: Final = ("--steps", 6, "--budget", 2, "--strategy", "uniform", "--images", 2, "--held-out", 2)
FOUND: Final = "FCCFCC"
SELECTIVE: Final = "FCSFCS"  # of the schedule that is made by hand


@dataclass(frozen=True, slots=True)
class MadeByCommands:
    """What the commands made of one tiny model, in the order of the stages, and what each said.

    `schedule` is one made by hand, whose steps do not depend on what a search finds: the bundle's `procache`. What the
    search found is its `plain`.
    """

    model: Path
    found: Path
    schedule: Path
    graphs: Path
    bundle: Path
    said: dict[str, str]

    @property
    def record(self) -> Path:
        return self.found.with_name("search.json")

    @property
    def rhythm(self) -> str:
        return read_schedule(self.schedule).rhythm


def save_model(folder: Path, seed: int = 0, sample_size: int = 8) -> Path:
    transformer = tiny_dit(seed, num_blocks=2, channels=1, has_learned_sigma=False, sample_size=sample_size)
    return save_tiny_model(folder, transformer=transformer, has_vae=False)


def make_by_commands(
    root: Path,
    model: Path | None = None,
    *,
    selector: TokenSelector = SELECTOR,
    searching: Iterable[object] = (),
    exporting: Iterable[object] = (),
) -> MadeByCommands:
    """Search, export and build, with more arguments where a model needs them; None for the model of `save_model`."""
    model = save_model(root / "model") if model is None else model
    found = root / "found" / "schedule.json"
    made = MadeByCommands(model, found, root / "selective.json", root / "graphs", root / "bundle", {})
    loaded = load_model(str(model))
    selective = schedule_from_rhythm(loaded, loaded.scheduler, SELECTIVE, deep_start=1, selector=selector)
    write_schedule(replace(selective, found_by=replace(selective.found_by, strategy="procache")), made.schedule)
    stages: dict[str, list[object]] = {
        "search": [made.model, *SEARCH, *searching, "--out", made.found],
        "export": [
            *(made.model, "--schedule", made.schedule, "--schedule", f"plain={made.found}"),
            *(*exporting, "--out", made.graphs),
        ],
        "build": [made.graphs, "--out", made.bundle, "--max-batch-size", 2],
    }
    for command, arguments in stages.items():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([command, *map(str, arguments)]) == 0
        made.said[command] = said.getvalue()
    return made


def done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that succeeds; returns what it prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that is refused in one line on stderr; returns that line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    check_message(message)
    return message


def missing(parts: Iterable[str], text: str) -> list[str]:
    return [part for part in parts if part not in text]


def check_message(message: str) -> None:
    assert message.startswith("hemiola: ")
    assert message.count("\n") == 1
    assert message.endswith("\n")
    assert "Traceback" not in message


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
