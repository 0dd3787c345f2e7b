"""The backend `inductor`. On a machine without a GPU it builds for the CPU; what only a GPU can show is marked so."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import create_autospec

import diffusers
import numpy as np
import pytest
import torch
from torch._C._aoti import AOTIModelPackageLoader

from bundles import schedule_from_rhythm
from gpu_bundles import install_gpu
from hemiola_engines import inductor_compile
from hemiola_engines.build import build_bundle
from hemiola_engines.builder import EngineJob
from hemiola_engines.errors import BuildError
from hemiola_engines.inductor import INDUCTOR, signature
from hemiola_engines.inductor_compile import _specialized
from hemiola_engines.inductor_runtime import InductorWorkspace, make_backend, obstacle
from hemiola_engines.options import BuildOptions
from hemiola_export.export import export_pipeline
from hemiola_export.model import load_model
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.backends import BackendOptions, cuda
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.errors import BundleError, DeviceError
from hemiola_runtime.graph_set import GraphSet, write_graph_set
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import BackendSpec, FileSpec, Profile, read_manifest, write_manifest
from hemiola_runtime.sampler import Sampler
from models import save_tiny_model, tiny_dit

# Relative L2 of final latents in float32: measured are 7e-7 on a CPU.
BOUND: Final = 1e-4
MAX_BATCH_SIZE: Final = 3  # one image alone is a profile of fixed sizes, 2 and 3 share one with a range


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder of exported programs, and what it says about itself."""

    folder: Path
    graph_set: GraphSet

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        return self.graph_set.precisions["fp32"].graphs


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Programs of a random DiT with 2 blocks, for one full step and one of reuse."""
    folder = tmp_path_factory.mktemp("programs")
    transformer = tiny_dit(num_blocks=2, channels=1, has_learned_sigma=False)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    save_tiny_model(folder / "model", has_vae=False, transformer=transformer, scheduler=scheduler)
    model = load_model(str(folder / "model"))
    schedule = schedule_from_rhythm(model, model.scheduler, "FC")
    graph_set = export_pipeline(model, {"short": schedule}, folder / "graphs", format="torch")
    return Exported(folder / "graphs", graph_set)


@pytest.fixture(scope="module")
def built(programs: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; making it compiles six models."""
    bundle = tmp_path_factory.mktemp("inductor") / "bundle"
    build_bundle(programs.folder, bundle, BuildOptions("inductor", MAX_BATCH_SIZE))
    return bundle


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes copies of the bundle whose manifest, or one of whose engines, is another."""

    def copy(*, backend: dict[str, Any] | None = None, engine: tuple[str, bytes] | None = None) -> Path:
        bundle = tmp_path / "bundle"
        manifest = read_manifest(built)
        for name in manifest.files:
            (bundle / name).parent.mkdir(parents=True, exist_ok=True)
            (bundle / name).write_bytes((built / name).read_bytes())
        if backend is not None:
            manifest = replace(manifest, backend=replace(manifest.backend, **backend))
        if engine is not None:
            file, data = f"engines/{engine[0]}.pt2", engine[1]
            (bundle / file).write_bytes(data)
            manifest = replace(manifest, files={**manifest.files, file: FileSpec(sha256_of(data), len(data))})
        write_manifest(manifest, bundle)
        return bundle

    return copy


def test_a_program_holds_no_weights(programs: Exported) -> None:
    weights = (programs.folder / "fp32" / "weights.bin").read_bytes()
    for graph in programs.graphs.values():
        data = (programs.folder / graph.file).read_bytes()
        assert graph.weights
        for weight in graph.weights:
            assert weights[weight.offset : weight.offset + min(weight.num_bytes, 64)] not in data, weight.name
        stored = [info for info in zipfile.ZipFile(io.BytesIO(data)).infolist() if "/data/weights/" in info.filename]
        assert sum(info.file_size for info in stored) < 100, "more than an empty list"


def test_a_program_lists_only_the_weights_that_it_uses(programs: Exported) -> None:
    names = {name: {weight.name for weight in graph.weights} for name, graph in programs.graphs.items()}
    assert names["reuse"] < names["full"]  # without blocks
    assert not any(".blocks." in name for name in names["reuse"])
    assert not names["conditioning"] & names["full"]


def test_programs_are_the_same_byte_for_byte(programs: Exported, tmp_path: Path) -> None:
    model = load_model(str(programs.folder.parent / "model"))
    schedule = schedule_from_rhythm(model, model.scheduler, "FC")
    again = export_pipeline(model, {"short": schedule}, tmp_path / "graphs", format="torch")
    assert again.precisions == programs.graph_set.precisions


def test_a_program_tells_nothing_of_where_it_was_made(programs: Exported) -> None:
    for graph in programs.graphs.values():
        data = (programs.folder / graph.file).read_bytes()
        assert b"hemiola" not in data
        assert b"site-packages" not in data


def test_onnx_graphs_are_refused_with_the_command_that_makes_programs(programs: Exported, tmp_path: Path) -> None:
    write_graph_set(replace(programs.graph_set, format="onnx"), tmp_path)
    with pytest.raises(BuildError, match="Export again with --format torch"):
        build_bundle(tmp_path, tmp_path / "bundle", BuildOptions("inductor", 1))


def test_programs_are_refused_by_other_backends(programs: Exported, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="Export again with --format onnx"):
        build_bundle(programs.folder, tmp_path / "bundle", BuildOptions("onnxruntime", 1))


@pytest.mark.parametrize(
    "asked",
    [
        {"timing_cache": Path("cache")},
        {"is_timing_cache_pinned": True},
        {"is_version_compatible": True},
        {"compute_capabilities": ("8.9",)},
    ],
)
def test_what_only_tensorrt_has_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(BuildError, match="are TensorRT's"):
        INDUCTOR.check(BuildOptions("inductor", 1, **asked), "fp32")


@pytest.mark.parametrize(("sides", "ranges"), [((1, 1, 1), set()), ((3, 3, 3), set()), ((2, 8, 8), {(2, 8), (4, 16)})])
def test_sides_of_one_size_become_constants(
    programs: Exported, sides: tuple[int, int, int], ranges: set[tuple[int, int]]
) -> None:
    graph = programs.graphs["reuse"]
    whole = torch.export.load(io.BytesIO((programs.folder / graph.file).read_bytes()))
    traced = _specialized(whole, graph, Profile({"B": sides}), rows_per_image=2)
    assert {(int(found.lower), int(found.upper)) for found in traced.range_constraints.values()} == ranges


def test_a_table_may_be_open_in_steps_and_images_at_once(programs: Exported) -> None:
    graph = programs.graphs["conditioning"]
    whole = torch.export.load(io.BytesIO((programs.folder / graph.file).read_bytes()))
    traced = _specialized(whole, graph, Profile({"B": (2, 4, 4), "T": (2, 5, 5)}), rows_per_image=2)
    found = {(int(found.lower), int(found.upper)) for found in traced.range_constraints.values()}
    assert {(2, 4), (2, 5)} <= found


@pytest.fixture(scope="module")
def forecasting(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Programs of a random DiT with 2 blocks that forecast, and count tokens of each block."""
    folder = tmp_path_factory.mktemp("forecasting")
    transformer = tiny_dit(num_blocks=2, channels=1, has_learned_sigma=False)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    save_tiny_model(folder / "model", has_vae=False, transformer=transformer, scheduler=scheduler)
    model = load_model(str(folder / "model"))
    schedule = schedule_from_rhythm(model, model.scheduler, "FF1S", num_tokens=((4, 9),), deep_start=0)
    graph_set = export_pipeline(model, {"short": schedule}, folder / "graphs", format="torch")
    return Exported(folder / "graphs", graph_set)


def test_the_counts_of_blocks_may_be_open_each_by_itself(forecasting: Exported) -> None:
    graph = forecasting.graphs["tokens"]
    whole = torch.export.load(io.BytesIO((forecasting.folder / graph.file).read_bytes()))
    sides = {"B": (1, 1, 1), "K": (4, 9, 9), "K.mlp.0": (2, 4, 5), "K.mlp.1": (3, 9, 9)}
    traced = _specialized(whole, graph, Profile(sides), rows_per_image=2)
    found = {(int(found.lower), int(found.upper)) for found in traced.range_constraints.values()}
    assert found == {(4, 9), (2, 5), (3, 9)}


@pytest.mark.slow
def test_forecasts_and_counts_of_blocks_are_what_pytorch_computed(forecasting: Exported, tmp_path: Path) -> None:
    build_bundle(forecasting.folder, tmp_path / "bundle", BuildOptions("inductor", 1))
    parity = read_manifest(tmp_path / "bundle").parity
    assert set(parity) == {"short", "full"}
    assert all(0 <= difference < BOUND for difference in parity.values())


def reuse_job(programs: Exported, folder: Path, *profiles: Profile) -> EngineJob:
    """The smallest program."""
    graph = programs.graphs["reuse"]
    return EngineJob(graph, programs.folder / graph.file, folder / "reuse.pt2", profiles)


def test_an_interrupted_build_leaves_no_file(programs: Exported, tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    job = reuse_job(programs, tmp_path, Profile({"B": (1, 1, 1)}))
    with pytest.raises(KeyboardInterrupt):
        INDUCTOR.build_engines([job], BuildOptions("inductor", 1), interrupt, rows_per_image=2)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_program_is_refused(programs: Exported, tmp_path: Path) -> None:
    job = reuse_job(programs, tmp_path)
    changed = replace(job, graph=replace(job.graph, sha256="0" * 64))
    with pytest.raises(BuildError, match="changed since it was exported"):
        INDUCTOR.build_engines([changed], BuildOptions("inductor", 1), print, rows_per_image=2)


@pytest.mark.slow
def test_several_processes_compile_what_one_does(
    programs: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2 * inductor_compile.CORES_PER_WORKER)
    profiles = Profile({"B": (1, 1, 1)}), Profile({"B": (2, 2, 2)})
    job = reuse_job(programs, tmp_path, *profiles)
    told: list[str] = []
    INDUCTOR.build_engines([job], BuildOptions("inductor", 2, optimization_level=0), told.append, rows_per_image=2)
    assert told == [
        "compiling reuse",
        "engine reuse: compiled (1 of 2 models)",
        "engine reuse: compiled (2 of 2 models)",
    ]
    for i, profile in enumerate(profiles):
        model = AOTIModelPackageLoader(str(job.target), f"profile_{i}", True, 1, -1)
        assert model.get_metadata()["HEMIOLA_SIGNATURE"] == signature(job.graph, profile)


def test_what_another_process_cannot_compile_is_told_by_name(
    programs: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2 * inductor_compile.CORES_PER_WORKER)
    (tmp_path / "graphs").mkdir()
    job = reuse_job(programs, tmp_path, Profile({"B": (1, 1, 1)}), Profile({"B": (2, 2, 2)}))
    garbage = tmp_path / "graphs" / "reuse.pt2"
    garbage.write_bytes(b"no program")
    job = replace(job, source=garbage, graph=replace(job.graph, sha256=sha256_of(b"no program")))
    with pytest.raises(BuildError, match="cannot compile `reuse`"):
        INDUCTOR.build_engines([job], BuildOptions("inductor", 2), print, rows_per_image=2)
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


def test_other_builds_of_the_same_release_run_its_engines() -> None:
    release = torch.__version__.partition("+")[0]
    assert obstacle(BackendSpec("inductor", f"{release}+cu999")) is None
    assert "Install torch==1.0.0" in str(obstacle(BackendSpec("inductor", "1.0.0+cpu")))


def test_engines_for_another_gpu_do_not_run_here() -> None:
    assert obstacle(BackendSpec("inductor", torch.__version__, compute_capabilities=("1.0",))) is not None


def test_building_with_other_backends_needs_no_pytorch() -> None:
    code = "import sys; sys.modules['torch'] = None; import hemiola_engines.build"
    subprocess.run([sys.executable, "-c", code], check=True)


class Noted:
    """A launch that does nothing but tell."""

    def __init__(self, engine: str, log: list[str]) -> None:
        self.engine = engine
        self._log = log

    def enqueue(self) -> None:
        self._log.append(self.engine)


class Waits:
    """A launch of what no CUDA graph can hold: it fails while it is captured."""

    engine = "waits"

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def enqueue(self) -> None:
        if "begin" in self._log:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def torch_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts fakes in place of CUDA and of what PyTorch does with it; tells what was called. Signatures are the real."""
    install_gpu(monkeypatch)
    log: list[str] = []
    graph = create_autospec(torch.cuda.graph)
    graph.return_value.__enter__.side_effect = lambda: log.append("begin")
    graph.return_value.__exit__.side_effect = lambda *_: log.append("end")
    captured = create_autospec(torch.cuda.CUDAGraph)
    for method in ("replay", "reset"):
        getattr(captured.return_value, method).side_effect = functools.partial(log.append, method)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", captured)
    for name in ("ExternalStream", "graph_pool_handle", "stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    return log


def test_a_trajectory_runs_once_before_it_is_captured(torch_cuda: list[str]) -> None:
    workspace = InductorWorkspace(cuda.Cuda(), num_bytes=1024, staged_bytes=256)
    graph = workspace.capture([Noted("full", torch_cuda), Noted("reuse", torch_cuda)])
    assert graph is not None
    assert graph.engines == ("full", "reuse")
    graph.enqueue()
    assert torch_cuda == ["full", "reuse", "begin", "full", "reuse", "end", "replay"]
    workspace.close()
    assert torch_cuda[-1] == "reset"


def test_what_cannot_be_captured_is_told_with_the_way_round(torch_cuda: list[str]) -> None:
    workspace = InductorWorkspace(cuda.Cuda(), num_bytes=1024, staged_bytes=256)
    with pytest.raises(DeviceError, match=r"stream is capturing.* cuda_graphs=False"):
        workspace.capture([Waits(torch_cuda)])
    workspace.close()


@pytest.mark.slow
def test_engines_compute_what_pytorch_computed(built: Path) -> None:
    parity = read_manifest(built).parity
    assert set(parity) == {"short", "full"}
    assert all(0 <= difference < BOUND for difference in parity.values())


@pytest.mark.slow
def test_profiles_of_one_size_and_of_many_draw_the_same_images(built: Path) -> None:
    with Sampler.open(built) as sampler:
        alone = [sampler.generate(labels=[label], seeds=[label]).latents[0] for label in range(MAX_BATCH_SIZE)]
        for batch_size in range(1, MAX_BATCH_SIZE + 1):
            labels = list(range(batch_size))
            drawn = sampler.generate(labels=labels, seeds=labels)
            assert drawn.report.rhythm == "FC"
            for label in labels:
                difference = np.linalg.norm(drawn.latents[label] - alone[label]) / np.linalg.norm(alone[label])
                assert difference < BOUND, f"image {label} of {batch_size}"


@pytest.mark.slow
def test_concurrent_requests_draw_what_sequential_ones_draw(built: Path) -> None:
    with Sampler.open(built, max_concurrency=2) as sampler:

        def draw(seed: int) -> bytes:
            return sampler.generate(labels=[seed % 10], seeds=[seed]).latents.tobytes()

        expected = [draw(seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(draw, range(8))) == expected


@pytest.mark.slow
def test_weights_are_in_memory_once(built: Path) -> None:
    bundle = open_bundle(built)
    backend = make_backend(bundle.manifest.backend, BackendOptions(bundle.weights, built, None, ""))
    engines = [backend.load(spec, bundle.files[spec.graph.file]) for spec in bundle.manifest.engines.values()]
    storages = {weight.untyped_storage().data_ptr() for engine in engines for weight in engine.weights}
    assert storages == {backend.weights.data_ptr()}
    if not bundle.manifest.backend.compute_capabilities:
        assert storages == {bundle.weights.ctypes.data}  # the mapping itself


@pytest.mark.slow
def test_a_second_build_takes_every_engine_from_the_first(programs: Exported, copied: Callable[..., Path]) -> None:
    bundle = copied()
    told: list[str] = []
    build_bundle(programs.folder, bundle, BuildOptions("inductor", MAX_BATCH_SIZE), progress=told.append)
    assert [text for text in told if text.startswith("engine")] == [
        f"engine {name}: up to date" for name in programs.graphs
    ]


@pytest.mark.slow
def test_a_bundle_of_another_pytorch_is_refused_with_both_versions(copied: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"built with torch 1\.0\.0, but .* is installed.* Install torch==1\.0\.0"):
        Sampler.open(copied(backend={"version": "1.0.0"}))


@pytest.mark.slow
def test_an_engine_that_is_not_what_the_manifest_says_is_refused(built: Path, copied: Callable[..., Path]) -> None:
    other = (built / "engines" / "full.pt2").read_bytes()
    with pytest.raises(BundleError, match="`reuse` is not what the manifest says"):
        Sampler.open(copied(engine=("reuse", other)))


@pytest.mark.slow
def test_a_file_that_is_no_package_is_refused(copied: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match="refuses the engine `reuse`"):
        Sampler.open(copied(engine=("reuse", b"this is no package")))
