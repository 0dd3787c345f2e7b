from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import diffusers
import pytest

from bundles import Made
from fake_cuda import FakeCudart
from gpu_bundles import FakeBuilder, install_gpu, install_library, tensorrt_bundle
from hemiola.cli import main
from hemiola_engines import build
from hemiola_runtime import bench
from hemiola_runtime.backends import tensorrt
from hemiola_runtime.bench import MIN_ROUNDS, gpu_of, gpu_state, in_turn, measure, summary
from hemiola_runtime.manifest import BackendSpec
from hemiola_runtime.report import RunReport
from hemiola_runtime.sampler import Sampler
from models import save_tiny_model, tiny_dit

SCRIPTS: Final = Path(__file__).parents[1] / "scripts"
QUICK: Final = ("--batch-size", "1", "--repeats", "1", "--seconds", "0")
LAUNCHED: Final = RunReport(
    schedule="published",
    rhythm="FC",
    batch_size=2,
    counts={"conditioning": 1, "full": 1, "reuse": 1},
    engine_ms={"conditioning": 1.0, "full": 6.0, "reuse": 1.0},
    trajectory_ms=10.0,
    wall_ms=16.0,
    graph_bytes=None,
)
CAPTURED: Final = replace(LAUNCHED, engine_ms={}, graph_bytes=4096)


def test_requests_are_made_in_turn_and_the_first_round_does_not_count() -> None:
    made: list[str] = []

    def request(name: str) -> Callable[[], int]:
        def make() -> int:
            made.append(name)
            return len(made)

        return make

    assert in_turn({"a": request("a"), "b": request("b")}, repeats=2) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(made) == "ababab"


def test_rounds_end_when_the_time_is_up_but_not_before_a_median_is_one() -> None:
    assert len(in_turn({"a": int}, repeats=50, seconds=0)["a"]) == MIN_ROUNDS
    assert len(in_turn({"a": int}, repeats=50, seconds=60)["a"]) == 50


@pytest.mark.parametrize(
    ("report", "busy", "engines", "graph_bytes"),
    [
        (LAUNCHED, 0.8, {"conditioning", "full", "reuse"}, None),  # (1 + 6 + 1) / 10
        (CAPTURED, 0.625, set(), 4096),  # 10 / 16
    ],
)
def test_a_summary_tells_how_busy_the_gpu_was(
    report: RunReport, busy: float, engines: set[str], graph_bytes: int | None
) -> None:
    found = summary([report] * 3, [replace(report, wall_ms=32.0)] * 3)
    assert (found.busy, found.graph_bytes, found.speedup) == (busy, graph_bytes, 2.0)
    assert set(found.engines) == engines


def test_nvidia_smi_is_asked_for_the_first_visible_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!{sys.executable}\nimport sys\nprint("NVIDIA H200, 580.95, " + sys.argv[1])\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert gpu_state() == {"name": "NVIDIA H200", "driver_version": "580.95", "clocks.sm": "--id=3"}


def test_no_nvidia_smi_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() == {}


def test_engines_on_the_cpu_have_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_gpu(monkeypatch)
    assert gpu_of(BackendSpec("onnxruntime", "1.31.1")) is None
    found = gpu_of(BackendSpec("tensorrt", "11.4.0"))
    assert found is not None
    assert found.name == "NVIDIA L40S"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudart]:
    """A machine with TensorRT, which builds there."""
    cudart = install_gpu(monkeypatch)
    install_library(monkeypatch, cudart)
    monkeypatch.setitem(build.BUILDERS, "tensorrt", FakeBuilder())
    monkeypatch.setattr(bench, "gpu_state", dict)
    yield cudart
    tensorrt._listeners.cache_clear()


@pytest.fixture(scope="module")
def captured(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensorrt_bundle(latent.graphs, tmp_path_factory.mktemp("captured") / "bundle")


@pytest.mark.usefixtures("gpu")
def test_captured_trajectories_are_measured_as_a_whole(captured: Path) -> None:
    with Sampler.open(captured) as sampler:
        found = measure(sampler, ["mixed"], against="full", batch_size=1, repeats=2)
    assert list(found) == ["full", "mixed"]
    assert all(row.engines == {} and row.graph_bytes for row in found.values())
    assert all(row.busy == pytest.approx(1 - row.overhead) for row in found.values())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("is_captured", [True, False])
def test_the_command_tells_graphs_and_engines_apart(
    captured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_captured: bool
) -> None:
    out = tmp_path / "bench.json"
    flags = [] if is_captured else ["--no-cuda-graph"]
    assert main(["bench", str(captured), "--repeats", "2", "--out", str(out), *flags]) == 0
    said, written = capsys.readouterr().out, json.loads(out.read_text())
    assert said.startswith("tensorrt 11.4.0 on NVIDIA L40S, batch 1, 2 requests each\n")
    assert ("one CUDA graph of" in said) == is_captured
    assert "\nfull                " in said  # among the engines, whichever way they were measured
    assert written["gpu"] == {"name": "NVIDIA L40S", "compute_capability": "8.9", "total_bytes": 48 << 30, "state": {}}
    assert (written["measured"]["mixed"]["graph_bytes"] is not None) == is_captured
    assert (written["launch_by_launch"] is not None) == is_captured
    assert "processor" in written["machine"]


Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """`scripts/bench_gpu.py`, in this process; returns the record that a part has written."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("bench_gpu")

    def call(part: str, *arguments: object, record: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", part, *map(str, arguments), "--out", str(tmp_path), *QUICK])
        assert script.main() == 0
        found: dict[str, Any] = json.loads((tmp_path / f"{record}.json").read_text())
        return found

    return call


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as DiTPipeline takes it: with a VAE, and 1000 for no class."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    transformer = tiny_dit(num_blocks=4, num_classes=1000)
    return save_tiny_model(tmp_path_factory.mktemp("gpu") / "model", transformer=transformer, scheduler=scheduler)


def test_a_backend_is_measured_launch_by_launch_on_a_cpu(latent: Made, bench_gpu: Bench) -> None:
    record = bench_gpu("backend", "onnxruntime", "--graphs", latent.graphs, "--precision", "fp32", record="onnxruntime")
    assert [(row["how"], row["schedule"]) for row in record["rows"]] == [
        ("launches", "mixed"),
        ("launches", "fewer"),
        ("launches", "full"),
    ]
    full = record["rows"][2]
    assert full["speedup"] == 1.0
    assert set(full["forwards"]) == {"conditioning", "full", "deep", "tokens", "reuse"}
    assert full["vae_ms"] > 0
    assert full["denoise"]["median_ms"] < full["wall"]["median_ms"]
    assert record["made_by"]["versions"].keys() >= {"torch", "onnxruntime"}


@pytest.mark.usefixtures("gpu")
def test_a_backend_that_captures_is_measured_both_ways(latent: Made, bench_gpu: Bench) -> None:
    record = bench_gpu("backend", "tensorrt", "--graphs", latent.graphs, "--precision", "fp32", record="tensorrt")
    assert [row["how"] for row in record["rows"]] == ["graph"] * 3 + ["launches"] * 3
    assert record["rows"][0]["graph_bytes"] > 0
    assert record["gpu"]["name"] == "NVIDIA L40S"


def test_forwards_and_pipeline_are_measured_in_pytorch_and_laid_out(
    latents: Path, bench_gpu: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", latents, "--precision", "fp32", "--steps", "20", "--budget", "7")
    forwards = bench_gpu("forwards", *model, record="forwards")
    assert [row["rhythm"] for row in forwards["rows"]] == ["F" * 20, "FCSFCSFCSFCSFCSFCSFC", "FF¹¹¹¹F¹¹¹¹F¹¹¹¹F¹¹¹"]
    assert set(forwards["rows"][1]["forwards"]) == {"full", "reuse", "tokens"}
    eager = bench_gpu("baseline", "eager", *model, record="eager")
    assert eager["rows"][0]["over_eager"] == 1.0
    assert eager["rows"][0]["vae_ms"] > 0

    merged = bench_gpu("table", record="results")
    page = (tmp_path / "table.md").read_text()
    assert [record["part"] for record in merged["records"]] == ["eager", "forwards"]
    assert page in capsys.readouterr().out
    assert "| 1 | diffusers | eager | full |" in page
    assert "| 1 | PyTorch, Hemiola's forwards | eager | published |" in page


@pytest.mark.slow
def test_a_backend_exports_what_it_needs(latents: Path, bench_gpu: Bench) -> None:
    model = ("--model", latents, "--precision", "fp32", "--steps", "20", "--budget", "7")
    record = bench_gpu("backend", "onnxruntime", *model, "--verify", record="onnxruntime")
    assert [row["schedule"] for row in record["rows"]] == ["published", "forecast", "full"]
    assert record["rows"][1]["rhythm"] == "FF¹¹¹¹F¹¹¹¹F¹¹¹¹F¹¹¹"
    assert record["rows"][0]["vae_ms"] is None  # the decoder is exported with --vae alone
    assert record["beyond_bounds"] == {}
    assert set(record["forward_parity"]) == {"full", "tokens", "reuse", "residual_1"}
    assert record["shape"]["num_blocks"] == 4


def test_forwards_within_a_graph_are_told_apart() -> None:
    module = _script("bench_gpu_backend")
    # c = 2, f = 3, r = 1, s = 0.5, T = 10: full 2 + 10 · 3 = 32; 2 + 3 + 9 · 1 = 14; 2 + 2 · 3 + 8 · 0.5 = 12
    graphs = {"full": 32.0, "only_reuse": 14.0, "only_residual_1": 12.0}
    denoise = {("graph", name): [time] for name, time in graphs.items()} | {("launches", "full"): [99.0]}
    num_full = {"full": 10, "only_reuse": 1, "only_residual_1": 2}
    found = module["captured_forwards"](denoise, {"conditioning": 2.0, "full": 9.0}, 10, num_full)
    expected = {"full": 3.0, "reuse": 1.0, "residual_1": 0.5}
    assert found == {kind: pytest.approx(time) for kind, time in expected.items()}


def _script(name: str) -> dict[str, Any]:
    import runpy

    return runpy.run_path(str(SCRIPTS / f"{name}.py"))


DIT_XL_2: Final = {"width": 1152, "num_blocks": 28, "num_tokens": 256, "num_weights": 675_000_000}


@pytest.mark.parametrize(
    ("rows", "tera_flop", "floor_ms"),
    [
        (1, 0.237, 0.350),  # 118.6 GMAC, as the paper counts; bound by memory
        (2, 0.474, 0.480),
        (16, 3.80, 3.84),
    ],
)
def test_the_roofline_of_dit_xl_2_is_the_published_arithmetic(rows: int, tera_flop: float, floor_ms: float) -> None:
    found = _script("bench_gpu_table")["roofline"](DIT_XL_2, rows)
    assert found.flop / 1e12 == pytest.approx(tera_flop, rel=2e-3)
    assert found.floor_ms("NVIDIA H200") == pytest.approx(floor_ms, rel=2e-3)
    assert found.floor_ms("a GPU of tomorrow") is None


def _row(who: str, how: str, schedule: str, median_ms: float, **more: Any) -> dict[str, Any]:
    spread = {"median_ms": median_ms, "p10_ms": median_ms, "p90_ms": 1.1 * median_ms, "max_ms": 2 * median_ms}
    return {"who": who, "how": how, "schedule": schedule, "batch_size": 2, "denoise": spread, "forwards": {}, **more}


def test_the_table_compares_all_with_eager_and_with_the_best_compiled() -> None:
    head = {
        "model": "dit-xl-2",
        "precision": "bf16",
        "steps": 50,
        "machine": {"processor": "a processor", "num_cores": 16},
        "gpu": {"name": "NVIDIA H200"},
        "gpu_before": {"driver_version": "580.95"},
        "gpu_after": {"driver_version": "580.95", "clocks.sm": "1980 MHz"},
        "made_by": {"versions": {"torch": "2.13.0"}},
    }
    engine = _row(
        *("inductor", "graph", "published", 25.0),
        speedup=2.5,
        busy=0.99,
        host_ms=0.4,
        graph_bytes=30_000_000,
        vae_ms=4.0,
        forwards={"full": 1.92, "reuse": 0.096},
    )
    records = [
        {"part": "eager", "rows": [_row("diffusers", "eager", "full", 500.0)], **head},
        {
            "part": "compile",
            "rows": [_row("diffusers", "slow", "full", 200.0), _row("diffusers", "fast", "full", 100.0)],
            "compile_seconds": {"fast, batch 2": 61.0},
            "left_out": ["slow, batch 8"],
            **head,
        },
        {"part": "inductor", "rows": [engine], "build_seconds": 200.0, "shape": DIT_XL_2, **head},
    ]
    page = _script("bench_gpu_table")["table"](records)
    assert page.startswith("# dit-xl-2, bf16, 50 steps, guidance, on NVIDIA H200\n")
    # 25 ms for 2 images; 500 / 25 and 100 / 25
    denoising = "| 12.50 | 80.0 | 10.0% | 2.50× | 20.00× | 4.00× | 99.0% | 0.200 | 30 | 2.000 |\n"
    assert f"| 2 | inductor | graph | published {denoising}" in page
    # 4 rows: 0.949 TFLOP at 989 TFLOP/s are 0.959 ms, of which 1.92 is the double
    assert "| 2 | inductor | graph | 1.920 | – | – | 0.096 | – | – | – | 5.0% | 0.959 | 2.00× |" in page
    assert "| compile | fast, batch 2 | 61.0 |" in page
    assert "| compile | slow, batch 8 | left out: no time |" in page


def test_a_folder_without_records_is_refused(
    bench_gpu: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "table", "--out", str(tmp_path)])
    assert importlib.import_module("bench_gpu").main() == 1
    assert "holds no records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "--system-torch"),
        ([], 2, "name a folder"),
        (["out", "--parts", "doctor,dance"], 2, "unknown part: dance; known are doctor,tests,"),
        (["out", "--fast"], 2, "unknown argument: --fast"),
    ],
)
def test_the_check_says_how_it_is_used(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=20, check=False)
    assert ran.returncode == code
    assert said in ran.stdout + ran.stderr
    assert not list(tmp_path.iterdir())
