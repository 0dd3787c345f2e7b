"""The command line, called in this process: what its tests make with it, and how they look at what it says."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from hemiola.cli import main
from hemiola_runtime.schedule import read_schedule
from models import save_tiny_model, tiny_dit

# 6 steps, 2 of them full: the segments are 5-1, 4-2 or 3-3, so that each has selective steps.
SEARCH: Final = (
    *("--steps", 6, "--budget", 2, "--v-min", 0, "--v-max", 4, "--images", 2, "--held-out", 2),
    *("--deep-ratio", 0.5, "--token-ratio", 0.25),
)


@dataclass(frozen=True, slots=True)
class MadeByCommands:
    """What the commands made of one tiny model, in the order of the stages, and what each said."""

    model: Path
    schedule: Path
    graphs: Path
    bundle: Path
    said: dict[str, str]

    @property
    def record(self) -> Path:
        return self.schedule.with_name("search.json")

    @property
    def rhythm(self) -> str:
        return read_schedule(self.schedule).rhythm


def save_model(folder: Path, seed: int = 0, sample_size: int = 8) -> Path:
    transformer = tiny_dit(seed, num_blocks=2, channels=1, has_learned_sigma=False, sample_size=sample_size)
    return save_tiny_model(folder, transformer=transformer, has_vae=False)


def make_by_commands(
    root: Path, model: Path | None = None, *, searching: Iterable[object] = (), exporting: Iterable[object] = ()
) -> MadeByCommands:
    """Search, export and build, with more arguments where a model needs them; None for the model of `save_model`."""
    model = save_model(root / "model") if model is None else model
    made = MadeByCommands(model, root / "found" / "schedule.json", root / "graphs", root / "bundle", {})
    baseline = made.schedule.parent / "baselines" / "uniform.json"
    stages: dict[str, list[object]] = {
        "search": [made.model, *SEARCH, *searching, "--out", made.schedule],
        "export": [
            *(made.model, "--schedule", made.schedule, "--schedule", f"plain={baseline}"),
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
