"""What the commands do when all is well, and what they say of how they are used."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hemiola_export.export
from bundles import Made
from commands import FOUND, MadeByCommands, check_message, done, missing, python
from hemiola.cli import COMMANDS, main
from hemiola_runtime.artifacts import in_words, sha256_of
from hemiola_runtime.graph_set import REFERENCE_FILE, read_graph_set, write_graph_set
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import BackendSpec, FileSpec, read_manifest, write_manifest
from hemiola_runtime.schedule import read_schedule, write_schedule


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


def test_every_stage_says_what_it_wrote(made: MadeByCommands) -> None:
    assert made.said["search"].startswith(f"{FOUND}\n4 reuse, 2 full, found by uniform")
    assert made.said["search"].endswith(f"wrote {made.found}\n")
    assert made.said["export"] == (
        f"wrote {made.graphs} in fp32: conditioning, full, tokens, reuse; schedules procache, plain, full\n"
    )
    assert made.said["build"].startswith(f"wrote {made.bundle}\nrelative L2 against PyTorch: procache ")
    written = {path.name for path in made.found.parent.iterdir()}
    assert written == {"baselines", "schedule.json", "search.json", "search.sqlite"}


def test_run_draws_a_row_of_images_and_reports_what_ran(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "two.png", tmp_path / "report.json"
    said = done(capsys, "run", made.bundle, "--label", 3, "--label", 7, "--seed", 4, "--out", out, "--report", report)
    assert said.startswith(f"procache: {made.rhythm}\n")
    with Image.open(out) as picture:
        assert picture.size == (2 * 64, 64)  # two images of 8 × 8, each pixel 8 × 8
    written = json.loads(report.read_text())
    assert (written["rhythm"], written["batch_size"]) == (made.rhythm, 2)
    assert written["counts"]["full"] == 2


def test_a_label_can_be_named_and_later_images_have_later_seeds(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, second = tmp_path / "both.png", tmp_path / "second.png"
    done(capsys, "run", made.bundle, "--label", "class 3", "--label", "class 7", "--seed", 4, "--out", both)
    done(capsys, "run", made.bundle, "--label", 3, "--label", 7, "--seed", 4, "--out", second)
    assert both.read_bytes() == second.read_bytes()
    done(capsys, "run", made.bundle, "--label", 7, "--label", 7, "--seed", 5, "--out", second)
    with Image.open(both) as pair, Image.open(second) as single:
        np.testing.assert_array_equal(np.asarray(pair)[:, 64:], np.asarray(single)[:, :64])


def test_run_takes_a_schedule_of_the_bundle_or_a_file(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, file = tmp_path / "named.png", tmp_path / "file.png"
    assert "full: FFFFFF" in done(capsys, "run", made.bundle, "--label", 1, "--schedule", "full", "--out", named)
    own = tmp_path / "own.json"
    write_schedule(read_schedule(made.schedule).uncached(), own)
    assert "FFFFFF" in done(capsys, "run", made.bundle, "--label", 1, "--schedule", own, "--out", file)
    assert named.read_bytes() == file.read_bytes()


def test_a_real_process_draws_the_same_picture(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    done(capsys, "run", made.bundle, "--label", 3, "--out", here)
    command = [sys.executable, "-m", "hemiola", "run", str(made.bundle), "--label", "3", "--out", str(there)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert there.read_bytes() == here.read_bytes()


def test_artifacts_are_logged_on_request(made: MadeByCommands, tmp_path: Path) -> None:
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
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    measured = ["--images", 2, "--batch-size", 2, "--repeats", 1]
    said = done(capsys, "report", made.bundle, "--search", made.record, "--out", out, *measured)
    assert f"wrote {out}, report.json and report.png" in said
    assert FOUND in out.read_text()
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert list(numbers["measured"]) == ["full", "procache", "plain"]
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width == 2 * 64


def test_bench_measures_every_schedule_and_writes_it_down(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    said = done(capsys, "bench", made.bundle, "--repeats", 2, "--batch-size", 2, "--threads", 1, "--out", out)
    written = json.loads(out.read_text())
    assert (written["batch_size"], written["repeats"], written["backend"]["name"]) == (2, 2, "onnxruntime")
    assert set(written["measured"]) == {"full", "procache", "plain"}
    assert written["measured"]["full"]["speedup"] == 1.0
    assert written["measured"]["procache"]["rhythm"] == made.rhythm
    for name, row in written["measured"].items():
        assert row["wall"]["median_ms"] > 0
        assert name in said


def test_verify_runs_every_schedule_of_a_good_bundle(made: MadeByCommands, capsys: pytest.CaptureFixture[str]) -> None:
    said = done(capsys, "verify", made.bundle)
    num_files = len(read_manifest(made.bundle).files)
    assert said.startswith(f"{num_files} files have the bytes that were built\n")
    assert f"procache: ran {made.rhythm}\n" in said
    assert said.count("relative L2 against PyTorch") == 3


@pytest.mark.parametrize("artifact", ["schedule", "graphs", "bundle", "record"])
def test_inspect_shows_any_artifact(made: MadeByCommands, artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = done(capsys, "inspect", getattr(made, artifact))
    shown = {
        "schedule": ["schedule for model (dit), DDIM-6", f"  {made.rhythm}\n", "tokens [4] by value_norm"],
        "graphs": ["  fp32:\n", "2 blocks, width 32, 16 tokens", "schedules procache, plain, full"],
        "bundle": [
            ", fp32, up to 2 images at once\n",
            "  layout separate: full = full, tokens = tokens, reuse = reuse; ",
            "  memory of a sampler: ",
            f"    {made.rhythm}\n",
            "    FFFFFF\n",
            "0 class 0, 1 class 1",
        ],
        "record": [f"search of model, DDIM-6, guidance 4: {FOUND}\n", "was chosen", "| uncached |"],
    }
    assert missing(shown[artifact], said) == []


def test_a_bundle_can_be_built_in_segments(latent: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    said = done(capsys, "build", latent.graphs, "--layout", "segmented", "--precision", "fp32", "--out", out)
    assert said.startswith(f"wrote {out}\nrelative L2 against PyTorch: mixed ")
    layout = "  layout segmented: full = front + deep, deep = deep, tokens = tokens, reuse = reuse; "
    assert layout in done(capsys, "inspect", out)
    assert "mixed: FCSDCS\n" in done(capsys, "run", out, "--label", 1, "--out", tmp_path / "one.png")


def test_an_export_is_written_in_the_precisions_that_were_asked_for(
    made: MadeByCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = read_graph_set(made.graphs).precisions["fp32"].graphs

    def written(*_: object, name: str, **__: object) -> GraphSpec:
        return replace(graphs[name], file=f"{name}.onnx")  # tracing a graph takes seconds

    monkeypatch.setitem(hemiola_export.export.EXPORTERS, "onnx", written)
    out = tmp_path / "graphs"
    asked = ["--precision", "bf16", "--precision", "fp16", "--precision", "bf16", "--no-reference"]
    said = done(capsys, "export", made.model, "--schedule", made.schedule, *asked, "--out", out)
    assert said == f"wrote {out} in bf16, fp16: conditioning, full, tokens, reuse; schedules procache, full\n"
    graph_set = read_graph_set(out)
    assert (list(graph_set.precisions), graph_set.has_reference) == (["bf16", "fp16"], False)
    assert not (out / REFERENCE_FILE).exists()
    assert missing(["  bf16:\n", "  fp16:\n"], done(capsys, "inspect", out)) == []


def test_a_bundle_without_reference_images_is_not_compared(
    made: MadeByCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = Path(shutil.copytree(made.graphs, tmp_path / "graphs"))
    (graphs / REFERENCE_FILE).unlink()
    write_graph_set(replace(read_graph_set(graphs), has_reference=False), graphs)
    said = done(capsys, "build", graphs, "--out", tmp_path / "bundle")
    assert said.endswith("not compared with PyTorch: the export holds no reference images\n")
    said = done(capsys, "verify", tmp_path / "bundle")
    assert "there are no reference images: the export was made with --no-reference\n" in said
    manifest = read_manifest(tmp_path / "bundle")
    assert [line.partition(": ran ")[0] for line in said.splitlines()[-len(manifest.schedules) :]] == [
        *manifest.schedules
    ]
    assert "differs from PyTorch" not in done(capsys, "inspect", tmp_path / "bundle")


def test_inspect_shows_what_a_schedule_forecasts_masks_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    said = done(capsys, "inspect", Path(__file__).parent / "golden" / "forecasts.json")
    expected = [
        "  FF1SMF2D\n",
        "tokens 5 … 16, a count for each block, by value_norm in blocks from 2",
        "masked computes, of each branch, the blocks .x.x xx..",
        "forecasts of order 1, 2, from caches of up to 3 full steps",
    ]
    assert missing(expected, said) == []


def test_inspect_shows_a_bundle_whose_engines_do_not_run_here(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, data = read_manifest(bundle), b"an engine of another machine"
    elsewhere = replace(
        manifest,
        backend=BackendSpec("tensorrt", "10.13.3", "NVIDIA L4", ("8.9",)),
        files=manifest.files | {"engines/full.onnx": FileSpec(sha256_of(data), len(data))},
        forward_parity={"full": 0.00123},
    )
    (bundle / "engines" / "full.onnx").write_bytes(data)
    write_manifest(elsewhere, bundle)
    said = done(capsys, "inspect", bundle)
    parts = ["bundle for tensorrt 10.13.3, on NVIDIA L4, compute capability 8.9, fp32, up to 2 images at once\n"]
    assert missing([*parts, "  full: differs from PyTorch by 1.2e-03 per step\n"], said) == []


def test_doctor_says_what_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    said = done(capsys, "doctor")
    assert "runtime on a CPU: works" in said
    assert "search and export: works" in said
    assert "CPUExecutionProvider" in said
    assert "backend onnxruntime: builds here and runs here" in said


def test_doctor_names_the_command_that_mends_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    main(["doctor"])
    said = capsys.readouterr().out
    assert "runtime on a CPU: is not complete" in said
    assert "onnxruntime is missing; install it with: pip install 'hemiola[cpu]'" in said
    assert "backend onnxruntime: builds here but does not run here" in said


def test_doctor_ends_with_1_where_no_backend_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hemiola_runtime.backends.obstacle", lambda built: f"{built.name} is out of order")
    assert main(["doctor"]) == 1
    assert "  to run: onnxruntime is out of order\n" in capsys.readouterr().out


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


@pytest.fixture(scope="session")
def helps() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, text and heavy modules of every --help, in a process of its own."""
    shown: dict[str, tuple[int, str, list[str]]] = json.loads(python(HELP).stdout)
    return shown


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_help_imports_nothing_heavy(helps: dict[str, tuple[int, str, list[str]]], arguments: str) -> None:
    code, text, heavy = helps[arguments]
    assert (code, heavy) == (0, [])
    assert text.startswith("hemiola " if arguments == "--version" else "usage: hemiola")


def test_help_names_defaults_where_there_is_one(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    texts = {command: text for command, (_, text, _) in helps.items()}
    assert "(default: 0.25)" in texts["search --help"]
    for absent in ("None", "False", "[]"):
        assert [command for command, text in texts.items() if f"default: {absent}" in text] == []


def test_help_lists_every_command(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    text = helps["--help"][1]
    assert all(f"    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["compose"], "invalid choice: 'compose'"),
        (["search", "model"], "one of the arguments --out --probes is required"),
        (["run", "bundle", "--label", "3"], "the following arguments are required: --out"),
        (["bench", "bundle", "--repeats", "many"], "--repeats: a whole number of 1 or more, not 'many'"),
        (["search", "model", "--out", "schedule.json", "--images", "0"], "--images: a whole number of 1 or more"),
        (["report", "bundle", "--search", "search.json", "--out", "x.html", "--repeats", "0"], "--repeats: a whole"),
        (["run", "bundle", "--label", "1", "--out", "x.png", "--threads", "-3"], "--threads: a whole number of 1"),
        (["build", "graphs", "--out", "bundle", "--backend", "abacus"], "--backend: invalid choice: 'abacus'"),
        (["build", "graphs", "--out", "bundle", "--layout", "woven"], "--layout: invalid choice: 'woven'"),
        (["build", "graphs", "--out", "bundle", "--precision", "int8"], "--precision: invalid choice: 'int8'"),
        (["build", "graphs", "--out", "bundle", "--optimization-level", "6"], "--optimization-level: invalid choice"),
        (["build", "graphs", "--out", "bundle", "--max-batch-size", "0"], "--max-batch-size: a whole number of 1"),
        (
            ["export", "model", "--schedule", "x", "--out", "graphs", "--precision", "fp8"],
            "--precision: invalid choice",
        ),
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
    made: MadeByCommands, tmp_path: Path, missing: str, command: str, extra: str
) -> None:
    arguments = {
        "search": ["search", made.model, "--out", tmp_path / "schedule.json"],
        "export": ["export", made.model, "--schedule", made.schedule, "--out", tmp_path / "graphs"],
        "run": ["run", made.bundle, "--label", 1, "--out", tmp_path / "one.png"],
    }
    code = f"import sys; sys.modules[{missing!r}] = None; from hemiola.cli import main; sys.exit(main(sys.argv[1:]))"
    ran = python(code, *arguments[command])
    assert ran.returncode == 1
    check_message(ran.stderr)
    assert missing in ran.stderr
    assert f"pip install 'hemiola[{extra}]'" in ran.stderr
    assert list(tmp_path.iterdir()) == []
