from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

import hemiola_export.export
from hemiola.cli import COMMANDS, main
from hemiola_runtime.artifacts import in_words, sha256_of
from hemiola_runtime.manifest import (
    REFERENCE_FILE,
    FileSpec,
    GraphSpec,
    read_graph_set,
    read_manifest,
    write_manifest,
)
from hemiola_runtime.schedule import REUSE, Schedule, read_schedule, write_schedule
from models import save_tiny_model, tiny_dit

# 6 steps, 2 of them full: the segments are 5-1, 4-2 or 3-3, so that each has selective steps.
SEARCH = (
    *("--steps", 6, "--budget", 2, "--v-min", 0, "--v-max", 4, "--images", 2, "--held-out", 2),
    *("--deep-ratio", 0.5, "--token-ratio", 0.25),
)


@dataclass(frozen=True, slots=True)
class Made:
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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread: more only wait for one another on a model as small as this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Give the process its handler of SIGTERM back, which `main` takes."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _save_model(folder: Path, seed: int = 0, sample_size: int = 8) -> Path:
    transformer = tiny_dit(seed, num_blocks=2, channels=1, has_learned_sigma=False, sample_size=sample_size)
    return save_tiny_model(folder, transformer=transformer, has_vae=False)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Search, export and build, by the command line."""
    root = tmp_path_factory.mktemp("cli")
    made = Made(_save_model(root / "model"), root / "found" / "schedule.json", root / "graphs", root / "bundle", {})
    baseline = made.schedule.parent / "baselines" / "uniform.json"
    stages: dict[str, list[object]] = {
        "search": [made.model, *SEARCH, "--out", made.schedule],
        "export": [made.model, "--schedule", made.schedule, "--schedule", f"plain={baseline}", "--out", made.graphs],
        "build": [made.graphs, "--out", made.bundle, "--max-batch-size", 2],
    }
    for command, arguments in stages.items():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main([command, *map(str, arguments)]) == 0
        made.said[command] = said.getvalue()
    return made


@pytest.fixture
def bundle(made: Made, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(made.bundle, tmp_path / "bundle"))


def _contents(folder: Path) -> dict[str, bytes]:
    """Return everything that lies in a folder; links and pipes by their names alone."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in folder.rglob("*")
    }


def _done(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that succeeds; returns what it prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that is refused in one line on stderr; returns that line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    _check_message(message)
    return message


def _missing(parts: Iterable[str], text: str) -> list[str]:
    return [part for part in parts if part not in text]


def _check_message(message: str) -> None:
    assert message.startswith("hemiola: ")
    assert message.count("\n") == 1
    assert message.endswith("\n")
    assert "Traceback" not in message


def test_every_stage_says_what_it_wrote(made: Made) -> None:
    assert made.said["search"].startswith(f"{made.rhythm}\n2 full")
    assert made.said["search"].endswith(f"wrote {made.schedule}\n")
    assert made.said["export"] == (
        f"wrote {made.graphs}: conditioning, full, tokens, reuse; schedules procache, plain, full\n"
    )
    assert made.said["build"].startswith(f"wrote {made.bundle}\nrelative L2 against PyTorch: procache ")
    assert sorted(path.name for path in made.schedule.parent.iterdir()) == ["baselines", "schedule.json", "search.json"]


def test_run_draws_a_row_of_images_and_reports_what_ran(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "two.png", tmp_path / "report.json"
    said = _done(capsys, "run", made.bundle, "--label", 3, "--label", 7, "--seed", 4, "--out", out, "--report", report)
    assert said.startswith(f"procache: {made.rhythm}\n")
    with Image.open(out) as picture:
        assert picture.size == (2 * 64, 64)  # two images of 8 × 8, each pixel 8 × 8
    written = json.loads(report.read_text())
    assert (written["rhythm"], written["batch_size"]) == (made.rhythm, 2)
    assert written["counts"]["full"] == 2


def test_a_label_can_be_named_and_later_images_have_later_seeds(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, second = tmp_path / "both.png", tmp_path / "second.png"
    _done(capsys, "run", made.bundle, "--label", "class 3", "--label", "class 7", "--seed", 4, "--out", both)
    _done(capsys, "run", made.bundle, "--label", 3, "--label", 7, "--seed", 4, "--out", second)
    assert both.read_bytes() == second.read_bytes()
    _done(capsys, "run", made.bundle, "--label", 7, "--label", 7, "--seed", 5, "--out", second)
    with Image.open(both) as pair, Image.open(second) as single:
        np.testing.assert_array_equal(np.asarray(pair)[:, 64:], np.asarray(single)[:, :64])


def test_run_takes_a_schedule_of_the_bundle_or_a_file(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, file = tmp_path / "named.png", tmp_path / "file.png"
    assert "full: FFFFFF" in _done(capsys, "run", made.bundle, "--label", 1, "--schedule", "full", "--out", named)
    own = tmp_path / "own.json"
    write_schedule(read_schedule(made.schedule).uncached(), own)
    assert "FFFFFF" in _done(capsys, "run", made.bundle, "--label", 1, "--schedule", own, "--out", file)
    assert named.read_bytes() == file.read_bytes()


def test_a_real_process_draws_the_same_picture(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    _done(capsys, "run", made.bundle, "--label", 3, "--out", here)
    command = [sys.executable, "-m", "hemiola", "run", str(made.bundle), "--label", "3", "--out", str(there)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert there.read_bytes() == here.read_bytes()


def test_artifacts_are_logged_on_request(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    command = [sys.executable, "-m", "hemiola", "run", str(made.bundle), "--label", "3", "--out", str(out), "--log"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.stderr == f"INFO hemiola_runtime.artifacts: wrote {out} ({in_words(out.stat().st_size)})\n"


def test_tracebacks_are_shown_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["verify", str(tmp_path), "--verbose"]) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("cannot read")
    assert record.exc_info is not None


def test_report_writes_a_page_its_numbers_and_a_picture(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    measured = ["--images", 2, "--batch-size", 2, "--repeats", 1]
    said = _done(capsys, "report", made.bundle, "--search", made.record, "--out", out, *measured)
    assert f"wrote {out}, report.json and report.png" in said
    assert made.rhythm in out.read_text()
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert list(numbers["measured"]) == ["full", "procache", "plain"]
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width == 2 * 64


def test_bench_measures_every_schedule_and_writes_it_down(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    said = _done(capsys, "bench", made.bundle, "--repeats", 2, "--batch-size", 2, "--threads", 1, "--out", out)
    written = json.loads(out.read_text())
    assert (written["batch_size"], written["repeats"], written["backend"]["name"]) == (2, 2, "onnxruntime")
    assert set(written["measured"]) == {"full", "procache", "plain"}
    assert written["measured"]["full"]["speedup"] == 1.0
    assert written["measured"]["procache"]["rhythm"] == made.rhythm
    for name, row in written["measured"].items():
        assert row["wall"]["median_ms"] > 0
        assert name in said


def test_verify_runs_every_schedule_of_a_good_bundle(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    said = _done(capsys, "verify", made.bundle)
    num_files = len(read_manifest(made.bundle).files)
    assert said.startswith(f"{num_files} files have the bytes that were built\n")
    assert f"procache: ran {made.rhythm}\n" in said
    assert said.count("relative L2 against PyTorch") == 3


@pytest.mark.parametrize("artifact", ["schedule", "graphs", "bundle", "record"])
def test_inspect_shows_any_artifact(made: Made, artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = _done(capsys, "inspect", getattr(made, artifact))
    shown = {
        "schedule": ["schedule for model (dit), DDIM-6", f"  {made.rhythm}\n", "tokens [4] by value_norm"],
        "graphs": ["graphs in fp32", "2 blocks, width 32, 16 tokens", "schedules procache, plain, full"],
        "bundle": ["up to 2 images at once", f"    {made.rhythm}\n", "    FFFFFF\n", "0 class 0, 1 class 1"],
        "record": [f"search of model, DDIM-6, guidance 4: {made.rhythm}", "held_out  full uncached: relative_l2 0,"],
    }
    assert _missing(shown[artifact], said) == []


def test_doctor_says_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    said = _done(capsys, "doctor")
    assert "runtime on a CPU: works" in said
    assert "search and export: works" in said
    assert "CPUExecutionProvider" in said


def test_doctor_names_the_command_that_mends_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "runtime on a CPU: is not complete" in said
    assert "onnxruntime is missing; install it with: pip install 'hemiola[cpu]'" in said


HELP = """
import contextlib, io, json, sys
from hemiola.cli import COMMANDS, main
shown = {}
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
    heavy = sorted({"torch", "diffusers", "onnxruntime", "onnx", "numpy"} & set(sys.modules))
    shown[" ".join(arguments)] = [code, text.getvalue(), heavy]
print(json.dumps(shown))
"""


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="session")
def helps() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, text and heavy modules of every --help, in a process of its own."""
    shown: dict[str, tuple[int, str, list[str]]] = json.loads(_python(HELP).stdout)
    return shown


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_help_imports_nothing_heavy(helps: dict[str, tuple[int, str, list[str]]], arguments: str) -> None:
    code, text, heavy = helps[arguments]
    assert (code, heavy) == (0, [])
    assert text.startswith("hemiola " if arguments == "--version" else "usage: hemiola")


def test_help_lists_every_command(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    text = helps["--help"][1]
    assert all(f"    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["compose"], "invalid choice: 'compose'"),
        (["search", "model"], "the following arguments are required: --out"),
        (["run", "bundle", "--label", "3"], "the following arguments are required: --out"),
        (["bench", "bundle", "--repeats", "many"], "--repeats: a whole number of 1 or more, not 'many'"),
        (["search", "model", "--out", "schedule.json", "--images", "0"], "--images: a whole number of 1 or more"),
        (["report", "bundle", "--search", "search.json", "--out", "x.html", "--repeats", "0"], "--repeats: a whole"),
        (["run", "bundle", "--label", "1", "--out", "x.png", "--threads", "-3"], "--threads: a whole number of 1"),
        (["build", "graphs", "--out", "bundle", "--backend", "abacus"], "--backend: invalid choice: 'abacus'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("torch", "search", "search"),
        ("torch", "export", "search"),
        ("onnxruntime", "run", "cpu"),
        ("PIL", "run", "cpu"),
    ],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    made: Made, tmp_path: Path, missing: str, command: str, extra: str
) -> None:
    arguments = {
        "search": ["search", made.model, "--out", tmp_path / "schedule.json"],
        "export": ["export", made.model, "--schedule", made.schedule, "--out", tmp_path / "graphs"],
        "run": ["run", made.bundle, "--label", 1, "--out", tmp_path / "one.png"],
    }
    code = f"import sys; sys.modules[{missing!r}] = None; from hemiola.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = _python(code, *arguments[command])
    assert ran.returncode == 1
    _check_message(ran.stderr)
    assert missing in ran.stderr
    assert f"pip install 'hemiola[{extra}]'" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """A folder with outputs of earlier runs, which holds the same bytes after the test."""
    folder = tmp_path / "kept"
    names = ["schedule.json", "search.json", "baselines/uniform.json", "one.png"]
    for name in (*names, "graphs/graphs.json", "graphs/old.onnx", "bundle/manifest.json", "bundle/old"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of an earlier run")
    before = _contents(folder)
    yield folder
    assert _contents(folder) == before


BAD_SEARCHES = [
    (["--scheduler", "ddjm"], ["unknown scheduler 'ddjm'", "known are ddim, dpm++2m"]),
    (["--scheduler", "DDJMScheduler"], ["unknown scheduler 'DDJMScheduler'", "diffusers' class names"]),
    (["--scheduler-option", "eta=1"], ["DDIMScheduler has no option eta", "beta_end, beta_schedule"]),
    (["--scheduler-option", "eta"], ["--scheduler-option takes KEY=VALUE, not 'eta'"]),
    (["--scheduler", "DDPMScheduler"], ["DDPM-6 is stochastic", "need a deterministic sampler"]),
    (["--scheduler-option", "clip_sample=True"], ["DDIM-6 is not linear", "set clip_sample or thresholding to"]),
    (["--steps", "2000"], ["DDIMScheduler cannot make 2000 steps"]),
    (["--budget", "5", "--v-min", "1"], ["no schedule of 6 steps has 5 full steps", "a budget from 2 to 3"]),
    (["--budget", "7"], ["has 1 to 6 full steps", "found budget 7"]),
    (["--strategy", "luck"], ["unknown strategy 'luck'", "known are procache, uniform, fewer_steps"]),
    (["--held-out", "1"], ["scores on 1 image or more and reports on 2 or more"]),
    (["--seed", "-1"], ["the seed is 0 or more"]),
    (["--guidance-scale", "nan"], ["guidance_scale a finite number"]),
    (["--guidance-scale", "1e30"], ["are not finite: the trajectory diverges", "Lower --guidance-scale"]),
    (["--staleness-weight", "-1"], ["staleness_weight and spatial_bonus are 0 or more"]),
    (["--spatial-size", "0"], ["spatial_size is 1 or more"]),
    (["--steps", "1000000"], ["DDIMScheduler cannot make 1000000 steps"]),
    (["--scheduler-option", "beta_schedule=foo"], ["DDIMScheduler cannot be made with", "foo"]),
    (["--scheduler-option", "beta_start=abc"], ["DDIMScheduler cannot be made with", "abc"]),
    (["--token-ratio", "1.5"], ["token_ratio lies above 0"]),
    (["--judge", "nowhere"], ["nowhere holds no judge that can be used"]),
    (["--spatial-size", "3"], ["spatial_size 3 does not divide the token grid 4×4"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_SEARCHES, ids=[" ".join(row[0]) for row in BAD_SEARCHES])
def test_a_search_that_cannot_be_is_refused(
    made: Made, kept: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, "search", made.model, *SEARCH, "--out", kept / "schedule.json", *arguments)
    assert _missing(parts, message) == []


BAD_REQUESTS = [
    (["--label", "10"], ["label 10 is out of range", "0 to 9"]),
    (["--label=-1"], ["label -1 is out of range", "0 to 9"]),
    (["--label", "zebra"], ["unknown label 'zebra'", "`hemiola inspect`"]),
    (["--label", "1", "--label", "2", "--label", "3"], ["3 images in one request", "1 to 2", "--max-batch-size 3"]),
    (["--label", "1", "--seed", "-1"], ["seed -1 is not a whole number from 0"]),
    (["--label", "1", "--guidance-scale", "nan"], ["guidance_scale nan is neither"]),
    (["--label", "1", "--schedule", "fast"], ["no schedule 'fast'", "it has procache, plain, full"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_REQUESTS, ids=[" ".join(row[0]) for row in BAD_REQUESTS])
def test_a_request_that_the_bundle_cannot_do_is_refused(
    made: Made, kept: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(capsys, "run", made.bundle, *arguments, "--out", kept / "one.png")
    assert _missing(parts, message) == []


def _for_another_model(schedule: Schedule) -> Schedule:
    return replace(schedule, model=replace(schedule.model, name="other", weights_sha256="f" * 64))


def _for_another_resolution(schedule: Schedule) -> Schedule:
    return replace(schedule, model=replace(schedule.model, latent_shape=(1, 16, 16)))


def _for_another_scheduler(schedule: Schedule) -> Schedule:
    return replace(schedule, scheduler=replace(schedule.scheduler, class_name="EulerDiscreteScheduler"))


def _for_other_timesteps(schedule: Schedule) -> Schedule:
    first, *others = schedule.scheduler.timesteps
    return replace(schedule, scheduler=replace(schedule.scheduler, timesteps=(first + 1, *others)))


def _for_fewer_steps(schedule: Schedule) -> Schedule:
    scheduler = replace(schedule.scheduler, num_inference_steps=5, timesteps=schedule.scheduler.timesteps[:5])
    return replace(schedule, scheduler=scheduler, steps=schedule.steps[:5])


def _without_guidance(schedule: Schedule) -> Schedule:
    return replace(schedule, guidance="none")


def _with_other_deep_blocks(schedule: Schedule) -> Schedule:
    return replace(schedule, deep_start=0)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_for_another_model, ["made for the model other (weights ffffffffffff), but here is model", "for this model"]),
        (_for_another_resolution, ["latents of shape [1, 16, 16], but here they are [1, 8, 8]"]),
        (_for_another_scheduler, ["no solver table for the schedule's scheduler EulerDiscrete-6", "Export again"]),
        (_for_other_timesteps, ["no solver table for the schedule's scheduler DDIM-6", "Export again"]),
        (_for_fewer_steps, ["no solver table for the schedule's scheduler DDIM-5", "Export again"]),
        (_without_guidance, ["with guidance `none`, but here it is `classifier_free`"]),
        (_with_other_deep_blocks, ["needs deep_start = 0", "exported with deep_start = 1"]),
    ],
)
def test_run_refuses_a_schedule_that_was_made_for_something_else(
    made: Made,
    kept: Path,
    tmp_path: Path,
    change: Callable[[Schedule], Schedule],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_schedule(change(read_schedule(made.schedule)), tmp_path / "other.json")
    arguments = ["--label", 1, "--schedule", tmp_path / "other.json", "--out", kept / "one.png"]
    message = _refused(capsys, "run", made.bundle, *arguments)
    assert _missing(parts, message) == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_for_another_model, ["made for the model other", "Search a schedule for this model"]),
        (_for_another_scheduler, ["EulerDiscrete-6, which diffusers", "makes differently", "Search a schedule"]),
        (_for_other_timesteps, ["DDIM-6, which diffusers", "the same configuration, but other timesteps"]),
    ],
)
def test_export_refuses_a_schedule_that_was_made_for_something_else(
    made: Made,
    kept: Path,
    tmp_path: Path,
    change: Callable[[Schedule], Schedule],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_schedule(change(read_schedule(made.schedule)), tmp_path / "other.json")
    arguments = ["--schedule", tmp_path / "other.json", "--out", kept / "graphs"]
    message = _refused(capsys, "export", made.model, *arguments)
    assert _missing(parts, message) == []


def test_export_refuses_the_same_weights_at_another_resolution(
    made: Made, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = _save_model(tmp_path / "larger", sample_size=16)
    message = _refused(capsys, "export", larger, "--schedule", made.schedule, "--out", kept / "graphs")
    assert "latents of shape [1, 8, 8], but here they are [1, 16, 16]. Search a schedule at this resolution" in message


def test_export_refuses_two_schedules_of_one_name(made: Made, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--schedule", made.schedule, "--schedule", made.schedule]
    message = _refused(capsys, "export", made.model, *twice, "--out", kept / "graphs")
    assert "two schedules are called 'procache'; name them, as --schedule procache-2=" in message


@pytest.mark.parametrize("command", ["run", "export", "inspect"])
@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda data: data["steps"].__setitem__(0, {"forward": "reuse", "tokens": None}), "step 0 is `reuse`"),
        (lambda data: data["steps"].pop(), "5 steps for the 6 model evaluations of DDIM-6"),
        (lambda data: data.update(tempo="presto"), "unknown key 'tempo'"),
        (lambda data: data.update(schema=2), "schedule.json.schema: expected one of 1, found 2"),
    ],
    ids=["reuses at step 0", "lacks a step", "unknown key", "later schema"],
)
def test_a_schedule_file_that_is_none_is_refused(
    made: Made,
    kept: Path,
    tmp_path: Path,
    command: str,
    edit: Callable[[dict[str, Any]], object],
    part: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = json.loads(made.schedule.read_text())
    edit(data)
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(data))
    arguments: dict[str, list[object]] = {
        "run": [made.bundle, "--label", 1, "--schedule", path, "--out", kept / "one.png"],
        "export": [made.model, "--schedule", path, "--out", kept / "graphs"],
        "inspect": [path],
    }
    message = _refused(capsys, command, *arguments[command])
    assert part in message
    assert "`hemiola search` writes valid schedules" in message


def test_a_step_that_reuses_first_cannot_even_be_made(made: Made) -> None:
    schedule = read_schedule(made.schedule)
    with pytest.raises(ValueError, match=r"nothing is cached before the first step\. Make it `full`"):
        replace(schedule, steps=(REUSE, *schedule.steps[1:]))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _flip_a_bit_of_a_digest(path: Path) -> None:
    data = json.loads(path.read_text())
    digest = data["files"]["engines/full.onnx"]["sha256"]
    data["files"]["engines/full.onnx"]["sha256"] = chr(ord(digest[0]) ^ 1) + digest[1:]
    path.write_text(json.dumps(data))


def _lead_out(target: str) -> Callable[[Path], None]:
    def lead_out(path: Path) -> None:
        path.write_text(path.read_text().replace('"engines/full.onnx"', json.dumps(target)))

    return lead_out


def _link_out(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.replace(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("command", ["run", "verify", "inspect", "bench"])
@pytest.mark.parametrize(
    ("file", "damage", "parts"),
    [
        ("engines/full.onnx", _truncate, ["full.onnx of the bundle", "truncated or was replaced", "`hemiola build`"]),
        ("engines/full.onnx", _flip_a_bit, ["full.onnx of the bundle", "SHA-256", "`hemiola build`"]),
        ("engines/full.onnx", _link_out, ["full.onnx of the bundle", "a link that leaves it"]),
        ("engines/full.onnx", Path.unlink, ["cannot read engines/full.onnx"]),
        ("engines/weights.bin", _truncate, ["weights.bin of the bundle", "truncated or was replaced"]),
        ("engines/weights.bin", _flip_a_bit, ["weights.bin of the bundle", "SHA-256"]),
        ("engines/weights.bin", Path.unlink, ["cannot read engines/weights.bin"]),
        ("solvers/*.json", _truncate, ["solvers/DDIM-6", "truncated or was replaced"]),
        ("solvers/*.json", _flip_a_bit, ["solvers/DDIM-6", "SHA-256"]),
        ("schedules/procache.json", _flip_a_bit, ["schedules/procache.json", "SHA-256"]),
        ("manifest.json", _truncate, ["manifest.json: not valid JSON", "`hemiola build` writes bundles"]),
        ("manifest.json", _flip_a_bit_of_a_digest, ["manifest.json has SHA-256", "not the one that was built"]),
        ("manifest.json", _lead_out("../full.onnx"), ["the path '../full.onnx' leaves the bundle"]),
        ("manifest.json", _lead_out("/etc/passwd"), ["the path '/etc/passwd' leaves the bundle"]),
        ("manifest.json", _lead_out("engines/../../full.onnx"), ["leaves the bundle"]),
    ],
)
def test_a_damaged_bundle_is_refused_by_the_file_that_is_damaged(
    bundle: Path,
    kept: Path,
    command: str,
    file: str,
    damage: Callable[[Path], None],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (path,) = bundle.glob(file)
    damage(path)
    arguments = {"run": ["--label", 1, "--out", kept / "one.png"], "bench": ["--out", kept / "one.png"]}
    message = _refused(capsys, command, bundle, *arguments.get(command, []))
    assert _missing(parts, message) == []


@pytest.mark.parametrize("what", ["missing", "graphs", "model"])
@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_what_is_no_bundle_is_refused(
    made: Made, kept: Path, tmp_path: Path, what: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = {"missing": tmp_path / "missing", "graphs": made.graphs, "model": made.model}[what]
    arguments = {"run": ["--label", 1, "--out", kept / "one.png"], "bench": ["--out", kept / "one.png"]}
    message = _refused(capsys, command, folder, *arguments.get(command, []))
    assert f"cannot read {folder / 'manifest.json'}: No such file or directory" in message
    assert "`hemiola build` writes bundles" in message


def test_verify_refuses_a_bundle_that_draws_other_images_than_pytorch(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle / REFERENCE_FILE
    with np.load(path) as file:
        reference = {
            name: array * np.float32(1.01) if name == "latents.plain" else array for name, array in file.items()
        }
    np.savez(path, allow_pickle=False, **reference)
    manifest, data = read_manifest(bundle), path.read_bytes()
    files = manifest.files | {REFERENCE_FILE: FileSpec(sha256_of(data), len(data))}
    write_manifest(replace(manifest, files=files), bundle)
    message = _refused(capsys, "verify", bundle)
    # |x - 1.01 x| / |1.01 x| = 0.0099
    assert "under the schedule plain the engines draw images that differ from PyTorch's by 9.9e-03" in message


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("graphs.json", ["graphs.json: not valid JSON", "`hemiola export` writes such folders"]),
        ("full.onnx", ["full.onnx is missing, or was changed since it was exported", "Export again"]),
        ("weights.bin", ["weights.bin is missing, or was changed since it was exported. Export again"]),
    ],
)
def test_build_refuses_graphs_that_are_not_those_that_were_exported(
    made: Made, kept: Path, tmp_path: Path, file: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = Path(shutil.copytree(made.graphs, tmp_path / "graphs"))
    _truncate(graphs / file)
    message = _refused(capsys, "build", graphs, "--out", kept / "bundle")
    assert _missing(parts, message) == []


@pytest.mark.parametrize("command", ["search", "export"])
def test_a_model_that_is_not_there_is_refused(
    made: Made, kept: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    arguments = {
        "search": ["--out", kept / "schedule.json"],
        "export": ["--schedule", made.schedule, "--out", kept / "graphs"],
    }
    message = _refused(capsys, command, missing, *arguments[command])
    assert f"{missing} is neither a folder nor a model that the hub would give" in message


def _full_disk(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def _stage(made: Made, kept: Path, command: str) -> list[object]:
    return {
        "search": ["search", made.model, *SEARCH, "--out", kept / "schedule.json"],
        "export": ["export", made.model, "--schedule", made.schedule, "--out", kept / "graphs"],
        "build": ["build", made.graphs, "--out", kept / "bundle"],
        "run": ["run", made.bundle, "--label", 1, "--out", kept / "one.png"],
    }[command]


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (_full_disk, ["the disk is full", "No space left on device", "free some space and run it again"]),
        (_interrupted, ["interrupted; what was there before is unchanged"]),
    ],
    ids=["full disk", "interruption"],
)
@pytest.mark.parametrize(
    ("command", "call"),
    [
        ("search", "hemiola_search.evaluator.Trajectory.run"),
        ("search", "os.fsync"),
        ("export", "pathlib.Path.write_bytes"),
        ("export", "numpy.savez"),
        ("export", "os.fsync"),
        ("build", "shutil.copyfile"),
        ("build", "os.fsync"),
        ("build", "hemiola_engines.build.check_parity"),
        ("run", "os.fsync"),
    ],
)
def test_a_full_disk_or_an_interruption_leaves_what_was_there(
    made: Made,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    call: str,
    fault: Callable[..., NoReturn],
    parts: list[str],
) -> None:
    if command == "export" and call != "pathlib.Path.write_bytes":  # what is written after the graphs
        graphs = read_graph_set(made.graphs).graphs
        monkeypatch.setattr(hemiola_export.export, "export_graph", lambda *_, name, **__: _graph(graphs, name))
    monkeypatch.setattr(call, fault)
    message = _refused(capsys, *_stage(made, kept, command))
    assert _missing(parts, message) == []


def _graph(graphs: dict[str, GraphSpec], name: str) -> GraphSpec:
    return graphs[name]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from hemiola.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_the_system_does_not_let_grow_leaves_what_was_there(made: Made, kept: Path) -> None:
    ran = _python(LIMITED, *_stage(made, kept, "build"))
    assert ran.returncode == 1
    _check_message(ran.stderr)
    assert "the disk is full" in ran.stderr
    assert "File too large" in ran.stderr
    assert "weights.bin" in ran.stderr


def _open_when_read(pipe: Path, reader: subprocess.Popen[str]) -> int:
    """Open a pipe for writing as soon as a process has it open for reading."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and reader.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # that nobody reads it yet
                raise
            time.sleep(0.02)
    raise AssertionError(f"the process did not come to read {pipe}: {reader.communicate(timeout=5)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_build_leaves_what_was_there(
    made: Made, kept: Path, tmp_path: Path, number: signal.Signals
) -> None:
    graphs = Path(shutil.copytree(made.graphs, tmp_path / "graphs"))
    pipe = graphs / "full.onnx"  # of which the build waits for bytes, until the signal comes
    pipe.unlink()
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "hemiola", "build", str(graphs), "--out", str(kept / "bundle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as build:
        handle = _open_when_read(pipe, build)
        try:
            assert [path for path in kept.iterdir() if path.name.startswith(".bundle.")]  # the new one has begun
            build.send_signal(number)
            said, message = build.communicate(timeout=30)
        finally:
            os.close(handle)
    assert build.returncode == 1
    _check_message(message)
    assert "interrupted; what was there before is unchanged" in message
    assert said == ""
