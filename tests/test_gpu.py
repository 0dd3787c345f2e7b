"""Every backend of this machine's GPU, with real libraries: what it draws, what it leaves behind, what it takes.

Skipped where there is no NVIDIA GPU. The model is small, and the width such that TensorRT takes it.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import pytest

from bundles import schedule_from_rhythm
from hemiola.commands.doctor import examine
from hemiola_engines.build import BUILDERS, build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_engines.parity import BOUNDS
from hemiola_export.export import export_pipeline
from hemiola_export.model import Model, load_model
from hemiola_export.reference import beyond_bounds, compare_forwards
from hemiola_runtime.backends import BACKENDS, cuda
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.errors import CancelledError, NumericError, RequestError
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import GraphFormat, Precision
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler
from models import save_tiny_model, tiny_dit

OBSTACLE: Final = cuda.obstacle()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(OBSTACLE is not None, reason=f"no NVIDIA GPU can be used here: {OBSTACLE}"),
]

GPU_BACKENDS: Final = [name for name in BACKENDS if name != "onnxruntime"]
CAPTURING: Final = {"tensorrt", "tensorrt_rtx", "inductor"}
PRECISIONS: Final[tuple[Precision, ...]] = ("bf16", "fp32")
# PyTorch's compiler takes some 8 s a graph and profile: fewer forwards for it, no decoder, and in fp32 one profile.
RHYTHMS: Final[dict[GraphFormat, str]] = {"onnx": "FCSDF1", "torch": "FCSCFC"}
REQUEST: Final[dict[str, Any]] = {"labels": [3, 4], "seeds": [5, 9], "guidance_scale": [2.0, 3.5]}
OTHER: Final[dict[str, Any]] = {"labels": [7, 1], "seeds": [20, 3], "guidance_scale": [5.0, 1.5]}

NUM_GENERATIONS: Final = 100
GROWTH_BYTES: Final = 16 << 20  # a leak of one workspace, graph or context each time would be many times that


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("gpu") / "model"
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    transformer = tiny_dit(1, num_blocks=2, num_heads=2, head_width=32)
    return load_model(str(save_tiny_model(folder, seed=1, transformer=transformer, scheduler=scheduler)))


@pytest.fixture(scope="module")
def graphs(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[GraphFormat], Path]:
    @functools.cache
    def exported(graph_format: GraphFormat) -> Path:
        folder = tmp_path_factory.mktemp("gpu") / graph_format
        schedule = schedule_from_rhythm(model, model.scheduler, RHYTHMS[graph_format], deep_start=1)
        exportable = replace(model, vae=None) if graph_format == "torch" else model
        export_pipeline(exportable, {"mixed": schedule}, folder, format=graph_format, precisions=PRECISIONS)
        return folder

    return exported


@pytest.fixture(scope="module")
def bundles(
    graphs: Callable[[GraphFormat], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Precision], Path]:
    """Bundles by backend and precision, built once; a build compares the final latents with PyTorch's."""

    @functools.cache
    def built(backend: str, precision: Precision) -> Path:
        bundle, graph_format = tmp_path_factory.mktemp("gpu") / f"{backend}-{precision}", BUILDERS[backend].format
        max_batch_size = 1 if (graph_format, precision) == ("torch", "fp32") else 2
        build_bundle(graphs(graph_format), bundle, BuildOptions(backend, max_batch_size, precision))
        return bundle

    return built


@pytest.fixture(params=[(backend, precision) for backend in GPU_BACKENDS for precision in PRECISIONS], ids="-".join)
def bundle(request: pytest.FixtureRequest, bundles: Callable[[str, Precision], Path]) -> Path:
    backend, precision = request.param
    reason = _obstacle(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return bundles(backend, precision)


@functools.cache
def _obstacle(backend: str) -> str | None:
    found = examine(backend)
    if backend == "inductor" and found.build_obstacle is None:
        import torch

        if not torch.cuda.is_available():
            return "PyTorch finds no GPU, and would build for the CPU"
    return found.build_obstacle or found.run_obstacle


@pytest.fixture
def sampler(bundle: Path) -> Iterator[Sampler]:
    with Sampler.open(bundle, max_concurrency=2) as opened:
        yield opened


@pytest.fixture
def asked(sampler: Sampler) -> dict[str, Any]:
    """As many images of REQUEST as the bundle takes."""
    return _fitting(sampler, REQUEST)


def _fitting(sampler: Sampler, request: dict[str, Any]) -> dict[str, Any]:
    return {name: values[: sampler.manifest.max_batch_size] for name, values in request.items()}


def _assert_equal(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.images, expected.images)


def _streamed(sampler: Sampler, **request: Any) -> Result:
    *_, last = sampler.stream(**request)
    assert last.result is not None
    return last.result


@pytest.mark.parametrize("schedule", ["mixed", UNCACHED])
def test_a_captured_trajectory_draws_what_its_launches_draw_one_by_one(
    bundle: Path, sampler: Sampler, asked: dict[str, Any], schedule: str
) -> None:
    drawn = sampler.generate(**asked, schedule=schedule)
    backend = sampler.manifest.backend.name
    assert (drawn.report.graph_bytes is not None) == (backend in CAPTURING)
    _assert_equal(_streamed(sampler, **asked, schedule=schedule), drawn)
    with Sampler.open(bundle, cuda_graphs=False) as launching:
        launched = launching.generate(**asked, schedule=schedule)
    _assert_equal(launched, drawn)
    assert launched.report.graph_bytes is None
    assert sum(launched.report.engine_ms.values()) <= 1.01 * launched.report.trajectory_ms


def test_a_request_is_drawn_alike_again_and_after_others(sampler: Sampler, asked: dict[str, Any]) -> None:
    first = sampler.generate(**asked)
    _assert_equal(sampler.generate(**asked), first)
    sampler.generate(**_fitting(sampler, OTHER), schedule=UNCACHED)
    sampler.generate(labels=[2], seeds=[1])  # another batch size, hence another program in the same memory
    _assert_equal(sampler.generate(**asked), first)


def test_four_threads_draw_what_one_draws(sampler: Sampler, asked: dict[str, Any]) -> None:
    requests = [{**asked, "seeds": 2 * i, "schedule": ("mixed", UNCACHED)[i % 2]} for i in range(8)]
    alone = [sampler.generate(**request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: sampler.generate(**request), requests * 2))
    for expected, found in zip(alone * 2, together, strict=True):
        _assert_equal(found, expected)


def test_a_hundred_generations_take_no_more_memory_than_ten(sampler: Sampler, asked: dict[str, Any]) -> None:
    runtime, other = cuda.Cuda(), _fitting(sampler, OTHER)

    def draw(count: int) -> None:
        for i in range(count):
            sampler.generate(**(asked if i % 2 else other), schedule=("mixed", UNCACHED)[i % 3 == 0])

    draw(10)
    gc.collect()
    before_gpu, before_host = runtime.free_bytes, _resident_bytes()
    draw(NUM_GENERATIONS)
    gc.collect()
    assert before_gpu - runtime.free_bytes <= GROWTH_BYTES
    assert _resident_bytes() - before_host <= GROWTH_BYTES


def test_samplers_that_are_closed_give_their_memory_back(bundle: Path) -> None:
    runtime = cuda.Cuda()

    def serve() -> None:
        with Sampler.open(bundle) as opened:
            opened.generate(**_fitting(opened, REQUEST))

    serve()
    before = runtime.free_bytes
    for _ in range(3):
        serve()
    assert before - runtime.free_bytes <= GROWTH_BYTES


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cancelled(sampler: Sampler) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        sampler.generate(**_fitting(sampler, OTHER), cancel=cancel)


def _abandoned(sampler: Sampler) -> None:
    steps = sampler.stream(**_fitting(sampler, OTHER))
    assert next(steps).step == 0
    next(steps)
    del steps


def _refused(sampler: Sampler) -> None:
    with pytest.raises(RequestError):
        sampler.generate(labels=[10_000])


def _failed(sampler: Sampler) -> None:
    with pytest.raises(NumericError):
        sampler.generate(labels=[1], guidance_scale=3e38)  # times what differs by more than 1 is infinity


@pytest.mark.parametrize("spoil", [_cancelled, _abandoned, _refused, _failed])
def test_a_request_that_ends_early_leaves_no_trace(
    sampler: Sampler, asked: dict[str, Any], spoil: Callable[[Sampler], None]
) -> None:
    expected = sampler.generate(**asked)
    for _ in range(3):  # more than there are workspaces
        spoil(sampler)
    _assert_equal(sampler.generate(**asked), expected)
    _assert_equal(_streamed(sampler, **asked), expected)


def test_final_latents_are_pytorchs_within_the_bound(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert set(manifest.parity) == {"mixed", UNCACHED}
    assert max(manifest.parity.values()) <= BOUNDS[manifest.precision]


def test_every_forward_is_pytorchs_within_the_bound(bundle: Path, model: Model) -> None:
    opened = open_bundle(bundle)
    found = compare_forwards(copy.deepcopy(model), opened)  # which it moves to the GPU
    assert set(found) == set(opened.manifest.forwards)
    assert beyond_bounds(found, opened.manifest.precision) == {}
