"""What the commands refuse, and that whatever was there before stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import hemiola_export.export
from commands import SEARCH, MadeByCommands, check_message, missing, python, refused, save_model
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.graph_set import REFERENCE_FILE, read_graph_set
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import FileSpec, read_manifest, write_manifest
from hemiola_runtime.schedule import REUSE, Schedule, read_schedule, write_schedule


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """Give the process its handler of SIGTERM back, which `main` takes."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def bundle(made: MadeByCommands, tmp_path: Path) -> Path:
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(made.bundle, tmp_path / "bundle"))


def _contents(folder: Path) -> dict[str, bytes]:
    """Return everything that lies in a folder; links and pipes by their names alone."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        for path in folder.rglob("*")
    }


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


def _search(made: MadeByCommands, kept: Path) -> list[object]:
    """Search beside outputs of earlier runs; the store, which outlives an interruption on purpose, lies elsewhere."""
    outputs = ["--out", kept / "schedule.json", "--store", kept.parent / "search.sqlite"]
    return ["search", made.model, *SEARCH, *outputs]


BAD_SEARCHES = [
    (["--scheduler", "ddjm"], ["unknown scheduler 'ddjm'", "known are ddim, dpm++2m"]),
    (["--scheduler", "DDJMScheduler"], ["unknown scheduler 'DDJMScheduler'", "diffusers' class names"]),
    (["--scheduler-option", "eta=1"], ["DDIMScheduler has no option eta", "beta_end, beta_schedule"]),
    (["--scheduler-option", "eta"], ["--scheduler-option takes KEY=VALUE, not 'eta'"]),
    (["--scheduler", "DDPMScheduler"], ["DDPM-6 is stochastic", "need a deterministic sampler"]),
    (["--scheduler-option", "clip_sample=True"], ["DDIM-6 is not linear", "set clip_sample or thresholding to"]),
    (["--steps", "2000"], ["DDIMScheduler cannot make 2000 steps"]),
    (["--budget", "few"], ["'few' is no budget", "full steps (17)"]),
    (["--budget", "7"], ["a budget of 7 full steps, where a schedule has 1 to 6"]),
    (["--strategy", "luck"], ["unknown strategy 'luck'", "known are best, fewer_steps, uniform, procache"]),
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
    made: MadeByCommands, kept: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *_search(made, kept), *arguments)
    assert missing(parts, message) == []


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
    made: MadeByCommands, kept: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "run", made.bundle, *arguments, "--out", kept / "one.png")
    assert missing(parts, message) == []


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
    made: MadeByCommands,
    kept: Path,
    tmp_path: Path,
    change: Callable[[Schedule], Schedule],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_schedule(change(read_schedule(made.schedule)), tmp_path / "other.json")
    arguments = ["--label", 1, "--schedule", tmp_path / "other.json", "--out", kept / "one.png"]
    message = refused(capsys, "run", made.bundle, *arguments)
    assert missing(parts, message) == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_for_another_model, ["made for the model other", "Search a schedule for this model"]),
        (_for_another_scheduler, ["EulerDiscrete-6, which diffusers", "makes differently", "Search a schedule"]),
        (_for_other_timesteps, ["DDIM-6, which diffusers", "the same configuration, but other timesteps"]),
    ],
)
def test_export_refuses_a_schedule_that_was_made_for_something_else(
    made: MadeByCommands,
    kept: Path,
    tmp_path: Path,
    change: Callable[[Schedule], Schedule],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_schedule(change(read_schedule(made.schedule)), tmp_path / "other.json")
    arguments = ["--schedule", tmp_path / "other.json", "--out", kept / "graphs"]
    message = refused(capsys, "export", made.model, *arguments)
    assert missing(parts, message) == []


def test_export_refuses_the_same_weights_at_another_resolution(
    made: MadeByCommands, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = save_model(tmp_path / "larger", sample_size=16)
    message = refused(capsys, "export", larger, "--schedule", made.schedule, "--out", kept / "graphs")
    assert "latents of shape [1, 8, 8], but here they are [1, 16, 16]. Search a schedule at this resolution" in message


def test_export_refuses_two_schedules_of_one_name(
    made: MadeByCommands, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = ["--schedule", made.schedule, "--schedule", made.schedule]
    message = refused(capsys, "export", made.model, *twice, "--out", kept / "graphs")
    assert "two schedules are called 'procache'; name them, as --schedule procache-2=" in message


def _cached_step(schedule: dict[str, Any]) -> dict[str, Any]:
    step: dict[str, Any] = next(step for step in schedule["steps"] if step["forward"] != "full")
    return step


@pytest.mark.parametrize("command", ["run", "export", "inspect"])
@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda data: data["steps"][0].update(forward="reuse"), "step 0 is `reuse`"),
        (lambda data: _cached_step(data).update(forecast=[1.0] * 5), "forecasts by 5 full steps, but only"),
        (lambda data: data["steps"].pop(), "5 steps for the 6 model evaluations of DDIM-6"),
        (lambda data: data.update(tempo="presto"), "unknown key 'tempo'"),
        (lambda data: data.update(schema=3), "schedule.json.schema: expected one of 2, found 3"),
    ],
    ids=["reuses at step 0", "forecasts by what is not there", "lacks a step", "unknown key", "later schema"],
)
def test_a_schedule_file_that_is_none_is_refused(
    made: MadeByCommands,
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
    message = refused(capsys, command, *arguments[command])
    assert part in message
    assert "`hemiola search` writes valid schedules" in message


def test_a_step_that_reuses_first_cannot_even_be_made(made: MadeByCommands) -> None:
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
    message = refused(capsys, command, bundle, *arguments.get(command, []))
    assert missing(parts, message) == []


@pytest.mark.parametrize("what", ["missing", "graphs", "model"])
@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_what_is_no_bundle_is_refused(
    made: MadeByCommands, kept: Path, tmp_path: Path, what: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = {"missing": tmp_path / "missing", "graphs": made.graphs, "model": made.model}[what]
    arguments = {"run": ["--label", 1, "--out", kept / "one.png"], "bench": ["--out", kept / "one.png"]}
    message = refused(capsys, command, folder, *arguments.get(command, []))
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
    message = refused(capsys, "verify", bundle)
    # |x - 1.01 x| / |1.01 x| = 0.0099
    assert "under the schedule plain the engines draw images that differ from PyTorch's by 9.9e-03" in message


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("graphs.json", ["graphs.json: not valid JSON", "`hemiola export` writes such folders"]),
        ("fp32/full.onnx", ["fp32/full.onnx is missing, or was changed since it was exported", "Export again"]),
        ("fp32/weights.bin", ["fp32/weights.bin is missing, or was changed since it was exported. Export again"]),
    ],
)
def test_build_refuses_graphs_that_are_not_those_that_were_exported(
    made: MadeByCommands, kept: Path, tmp_path: Path, file: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = Path(shutil.copytree(made.graphs, tmp_path / "graphs"))
    _truncate(graphs / file)
    message = refused(capsys, "build", graphs, "--out", kept / "bundle")
    assert missing(parts, message) == []


BAD_BUILDS = [
    (["--layout", "segmented"], ["no schedule of this export has deep steps", "--layout separate"]),
    (["--precision", "bf16"], ["exported in fp32; bf16 was asked for", "Choose with --precision, or export again"]),
    (["--optimization-level", "3"], ["are TensorRT's; onnxruntime has none"]),
    (["--timing-cache", "cache"], ["are TensorRT's; onnxruntime has none"]),
    (["--version-compatible"], ["are TensorRT's; onnxruntime has none"]),
    (["--compute-capability", "8.9"], ["are TensorRT's; onnxruntime has none"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_BUILDS, ids=[" ".join(row[0]) for row in BAD_BUILDS])
def test_a_build_that_cannot_be_is_refused(
    made: MadeByCommands, kept: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "build", made.graphs, "--out", kept / "bundle", *arguments)
    assert missing(parts, message) == []


@pytest.mark.parametrize("command", ["search", "export"])
def test_a_model_that_is_not_there_is_refused(
    made: MadeByCommands, kept: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    arguments = {
        "search": ["--out", kept / "schedule.json"],
        "export": ["--schedule", made.schedule, "--out", kept / "graphs"],
    }
    message = refused(capsys, command, missing, *arguments[command])
    assert f"{missing} is neither a folder nor a model that the hub would give" in message


def _full_disk(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupted(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def _stage(made: MadeByCommands, kept: Path, command: str) -> list[object]:
    return {
        "search": _search(made, kept),
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
        ("search", "hemiola_search.evaluator.Trajectory.walk"),
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
    made: MadeByCommands,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    call: str,
    fault: Callable[..., NoReturn],
    parts: list[str],
) -> None:
    if command == "export" and call != "pathlib.Path.write_bytes":  # what is written after the graphs
        graphs = read_graph_set(made.graphs).precisions["fp32"].graphs
        exporter = lambda *_, name, **__: _graph(graphs, name)  # noqa: E731
        monkeypatch.setitem(hemiola_export.export.EXPORTERS, "onnx", exporter)
    monkeypatch.setattr(call, fault)
    message = refused(capsys, *_stage(made, kept, command))
    assert missing(parts, message) == []


def _graph(graphs: dict[str, GraphSpec], name: str) -> GraphSpec:
    return replace(graphs[name], file=f"{name}.onnx")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from hemiola.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_the_system_does_not_let_grow_leaves_what_was_there(made: MadeByCommands, kept: Path) -> None:
    ran = python(LIMITED, *_stage(made, kept, "build"))
    assert ran.returncode == 1
    check_message(ran.stderr)
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


def _wait_until_it_reads(process: subprocess.Popen[str]) -> None:
    """Return when a process sleeps in a pipe: a signal just before that is noted by Python, but wakes nobody."""
    deadline = time.monotonic() + 1  # for kernels that do not tell where a process sleeps
    while "pipe" not in Path(f"/proc/{process.pid}/wchan").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_build_leaves_what_was_there(
    made: MadeByCommands, kept: Path, tmp_path: Path, number: signal.Signals
) -> None:
    graphs = Path(shutil.copytree(made.graphs, tmp_path / "graphs"))
    pipe = graphs / "fp32" / "full.onnx"  # of which the build waits for bytes, until the signal comes
    pipe.unlink()
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "hemiola", "build", str(graphs), "--out", str(kept / "bundle")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as build:
        handle = _open_when_read(pipe, build)
        try:
            assert [path for path in kept.iterdir() if path.name.startswith(".bundle.")]  # the new one has begun
            _wait_until_it_reads(build)
            build.send_signal(number)
            said, message = build.communicate(timeout=30)
        finally:
            os.close(handle)
    assert build.returncode == 1
    check_message(message)
    assert "interrupted; what was there before is unchanged" in message
    assert said == ""
