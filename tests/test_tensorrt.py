"""The TensorRT backend on a fake GPU: what it computes, enqueues, refuses and leaves behind."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from cuda.bindings import runtime

import fake_tensorrt
from bundles import Made
from fake_cuda import GRAPH_NODE_BYTES, Call, FakeCudart
from gpu_bundles import assert_close, fail_once, install_gpu, install_library, tensorrt_bundle
from hemiola_engines.options import Layout
from hemiola_runtime.backends import BackendOptions, open_backend, tensorrt
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.errors import BundleError, CancelledError, CapacityError, DeviceError, HemiolaError, NumericError
from hemiola_runtime.graphs import ITEMSIZE
from hemiola_runtime.patches import to_patches
from hemiola_runtime.program import Program, lower
from hemiola_runtime.request import Asked, request_from_arguments
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.storage import from_bytes, pack

Error: Final = runtime.cudaError_t
Copy: Final = runtime.cudaMemcpyKind
LAYOUTS: Final[tuple[Layout, ...]] = ("separate", "segmented")
WITHIN_A_TRAJECTORY: Final = {"set_tensor_address", "execute_async_v3", "cudaEventRecord"}
NUM_ENGINES: Final = 6  # of `latent`, in either layout

REQUEST: Final[dict[str, Any]] = {"labels": [3, 4], "seeds": [5, 9], "guidance_scale": [2.0, 3.5]}
OTHER: Final[dict[str, Any]] = {"labels": [7, 1], "seeds": [20, 3], "guidance_scale": [5.0, 1.5]}
PROMPTS: Final[dict[str, Any]] = {
    "prompts": ["a red circle", "a green square left of it"],
    "negative_prompts": ["", "blue"],
    "seeds": [5, 9],
}
SIZES: Final = [(8, 8), (16, 16), (8, 24), (24, 24)]  # of pictures; those with a side of 24 are decoded in tiles


@dataclass(frozen=True, slots=True)
class Gpu:
    """A fake machine and the fake library that runs on it."""

    cudart: FakeCudart
    library: Any


@pytest.fixture(scope="module")
def bundles(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    folder = tmp_path_factory.mktemp("tensorrt")
    return {layout: tensorrt_bundle(latent.graphs, folder / layout, layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def bundle(bundles: Mapping[Layout, Path]) -> Path:
    return bundles["separate"]


@pytest.fixture(scope="module")
def expected(latent: Made) -> Result:
    """What ONNX Runtime draws."""
    with Sampler.open(latent.bundle) as sampler:
        return sampler.generate(**REQUEST)


@pytest.fixture(scope="module")
def text_bundles(text: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    folder = tmp_path_factory.mktemp("tensorrt_text")
    return {layout: tensorrt_bundle(text.graphs, folder / layout, layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def text_bundle(text_bundles: Mapping[Layout, Path]) -> Path:
    return text_bundles["separate"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A machine with TensorRT; whatever a test does to it, nothing may be left on it."""
    cudart = install_gpu(monkeypatch)
    yield Gpu(cudart, install_library(monkeypatch, cudart))
    tensorrt._listeners.cache_clear()
    assert not cudart.live


def assert_equal(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.images, expected.images)


def streamed(sampler: Sampler, **request: Any) -> Result:
    *before, last = sampler.stream(**request)
    assert last.result is not None
    assert all(progress.result is None for progress in before)
    return last.result


def program_of(bundle: Path, name: str, batch_size: int) -> Program:
    opened = open_bundle(bundle)
    schedule = opened.schedule(name)
    return lower(opened.manifest, schedule, opened.solver_table(schedule), batch_size)


def executed(cudart: FakeCudart, mark: int = 0) -> list[Call]:
    return cudart.since(mark, "execute_async_v3")


def base_addresses(cudart: FakeCudart) -> dict[int, int]:
    """Return where the workspace of each stream lies: zeros are written to all of it when it is made."""
    return {call["stream"]: call["devPtr"] for call in cudart.since(name="cudaMemsetAsync")}


# what comes out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_images_are_those_of_onnx_runtime(
    bundles: Mapping[Layout, Path], gpu: Gpu, expected: Result, layout: Layout, cuda_graphs: bool
) -> None:
    with Sampler.open(bundles[layout], cuda_graphs=cuda_graphs) as sampler:
        assert_close(sampler.generate(**REQUEST), expected)


@pytest.mark.parametrize("schedule", ["mixed", "fewer", "full"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_captured_launched_and_streamed_trajectories_are_equal(
    bundle: Path, gpu: Gpu, schedule: str, batch_size: int
) -> None:
    request: dict[str, Any] = {"labels": list(range(batch_size)), "seeds": 3, "schedule": schedule}
    with Sampler.open(bundle) as captured, Sampler.open(bundle, cuda_graphs=False) as launched:
        first = captured.generate(**request)
        for found in (
            captured.generate(**request),
            launched.generate(**request),
            streamed(captured, **request),
            streamed(launched, **request),
            captured.generate(**request, cancel=threading.Event()),
        ):
            assert_equal(found, first)


def test_separate_and_segmented_engines_draw_the_same(bundles: Mapping[Layout, Path], gpu: Gpu) -> None:
    with Sampler.open(bundles["separate"]) as separate, Sampler.open(bundles["segmented"]) as segmented:
        for schedule in separate.schedules:
            one, other = (sampler.generate(**REQUEST, schedule=schedule) for sampler in (separate, segmented))
            assert_close(other, one)
            assert other.report.rhythm == one.report.rhythm
        assert segmented.generate(**REQUEST).report.counts["front"] == 1


def test_a_model_of_pixels_without_guidance_is_read_back_in_one_copy(unguided: Made, gpu: Gpu, tmp_path: Path) -> None:
    bundle = tensorrt_bundle(unguided.graphs, tmp_path / "bundle", max_batch_size=2)
    with Sampler.open(unguided.bundle) as reference, Sampler.open(bundle) as sampler:
        sampler.prepare([2])
        mark = gpu.cudart.mark()
        assert_close(sampler.generate(labels=[1, 2]), reference.generate(labels=[1, 2]))
    assert copies(gpu.cudart, mark)[Copy.cudaMemcpyDeviceToHost] == 1


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_eight_threads_on_two_slots_draw_what_one_draws(bundle: Path, gpu: Gpu, cuda_graphs: bool) -> None:
    requests: list[dict[str, Any]] = [
        {"labels": [i, (3 * i) % 10], "seeds": 2 * i, "schedule": ["mixed", "fewer"][i % 2]} for i in range(8)
    ]
    with Sampler.open(bundle, max_concurrency=2, cuda_graphs=cuda_graphs) as sampler:
        alone = [sampler.generate(**request) for request in requests]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda request: sampler.generate(**request), requests * 2))
    for found, one in zip(together, alone * 2, strict=True):
        assert_equal(found, one)


def test_the_backend_alone_runs_a_program_launch_by_launch(bundle: Path, gpu: Gpu) -> None:
    opened, program = open_bundle(bundle), program_of(bundle, "mixed", 2)
    table = opened.solver_table(opened.schedule("mixed"))
    manifest = opened.manifest
    asked = Asked(**REQUEST, prompts=None, negative_prompts=None, latents=None, height=None, width=None)
    request = request_from_arguments(manifest, asked)
    inputs = request.tensors(manifest.pipeline, table.init_noise_sigma, {"labels": np.array(REQUEST["labels"])})
    constants = [(constant.place, np.reshape(constant.values, constant.place.shape)) for constant in program.constants]

    backend = open_backend(manifest.backend, BackendOptions(opened.weights, opened.folder, None, "hemiola build"))
    engines = {name: backend.load(spec, opened.files[spec.graph.file]) for name, spec in manifest.engines.items()}
    workspace = backend.workspace(program.num_bytes, program.staged_bytes)
    launches = [engines[launch.engine].bind(launch, workspace) for launch in program.launches]
    workspace.write(*pack((*constants, *((place, inputs[name]) for name, place in program.inputs.items()))))
    for launch in launches:
        launch.enqueue()
    place = program.results["latents"]
    patches = from_bytes(workspace.read(place.offset, place.num_bytes), place)
    workspace.close()
    for engine in engines.values():
        engine.close()
    backend.close()

    with Sampler.open(bundle) as sampler:
        expected = sampler.generate(**REQUEST).latents
    np.testing.assert_array_equal(patches, to_patches(expected, manifest.pipeline.patch_size))


# prompts and sizes


def drawn_at_all_sizes(sampler: Sampler) -> list[Result]:
    """Draw every size under every schedule, all of them twice: the second time nothing is new."""
    return [
        sampler.generate(**PROMPTS, height=height, width=width, schedule=schedule)
        for height, width in SIZES * 2
        for schedule in sampler.schedules
    ]


@pytest.fixture(scope="module")
def expected_at_all_sizes(text: Made) -> list[Result]:
    """What ONNX Runtime draws."""
    with Sampler.open(text.bundle) as sampler:
        return drawn_at_all_sizes(sampler)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_prompts_are_drawn_at_all_sizes_as_onnx_runtime_draws_them(
    text_bundles: Mapping[Layout, Path],
    gpu: Gpu,
    expected_at_all_sizes: list[Result],
    layout: Layout,
    cuda_graphs: bool,
) -> None:
    with Sampler.open(text_bundles[layout], cuda_graphs=cuda_graphs) as sampler:
        found = drawn_at_all_sizes(sampler)
    for one, other in zip(found, expected_at_all_sizes, strict=True):
        assert_close(one, other)
        assert (one.report.rhythm, one.report.text) == (other.report.rhythm, other.report.text)
        assert (one.report.graph_bytes is not None) is cuda_graphs


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_captured_launched_and_streamed_pictures_of_prompts_are_equal(
    text_bundle: Path, gpu: Gpu, height: int, width: int
) -> None:
    request = PROMPTS | {"height": height, "width": width}
    with Sampler.open(text_bundle) as captured, Sampler.open(text_bundle, cuda_graphs=False) as launched:
        first = captured.generate(**request)
        for found in (launched.generate(**request), streamed(captured, **request), streamed(launched, **request)):
            assert_equal(found, first)


def test_eight_threads_on_two_slots_draw_the_prompts_that_one_draws(text_bundle: Path, gpu: Gpu) -> None:
    requests: list[dict[str, Any]] = [
        {"prompts": ["a red circle", f"{'a ' * i}square"], "seeds": i, "height": height, "width": width}
        for i, (height, width) in enumerate(SIZES * 2)
    ]
    with Sampler.open(text_bundle) as sampler:
        alone = [sampler.generate(**request) for request in requests]
    with Sampler.open(text_bundle, max_concurrency=2) as sampler, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: sampler.generate(**request), requests))
    for found, one in zip(together, alone, strict=True):
        assert_equal(found, one)


def test_each_size_is_captured_once_and_engines_that_run_by_themselves_never(text_bundle: Path, gpu: Gpu) -> None:
    captured = []
    with Sampler.open(text_bundle) as sampler:
        for height, width in [*SIZES, *SIZES]:
            mark = gpu.cudart.mark()
            sampler.generate(**PROMPTS, height=height, width=width)
            captured.append(gpu.cudart.names(mark).count("cudaStreamBeginCapture"))
    assert captured == [1, 1, 1, 1, 0, 0, 0, 0]
    ran = Counter((call["engine"], call["is_captured"]) for call in executed(gpu.cudart))
    assert ran["text_encoder", False] == 4  # two prompts, the empty one and `blue`
    assert ran["vae_decoder", True] == 2  # two of the sizes end with it
    # Of two images: two tiles at 8 × 24 pixels, four at 24 × 24; each size was drawn twice. Warm-ups are two more.
    assert ran["vae_decoder", False] == 2 * 2 * (2 + 4) + 2
    assert ran["text_encoder", True] == 0


def test_a_prompt_that_was_kept_is_no_launch(text_bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(text_bundle, cuda_graphs=False) as sampler:
        sampler.generate(**PROMPTS)
        mark = gpu.cudart.mark()
        sampler.generate(**PROMPTS)
    assert [call["engine"] for call in executed(gpu.cudart, mark)] == [
        "conditioning",
        *("full", "reuse", "tokens", "deep", "reuse", "tokens"),
        "vae_decoder",
    ]


@pytest.mark.parametrize("engine", ["text_encoder", "vae_decoder"])
def test_an_engine_that_runs_by_itself_and_fails_leaves_its_workspace_as_good_as_new(
    text_bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    request = PROMPTS | {"height": 24, "width": 24}
    # Ahead of the first prompt: seven launches to warm up, seven to be captured. Ahead of the first tile: four prompts.
    after = {"text_encoder": 2 * 7, "vae_decoder": 2 * 7 + 4}[engine]
    with Sampler.open(text_bundle) as sampler:
        expected = sampler.generate(**request)
    with Sampler.open(text_bundle) as sampler:
        sampler.prepare([2])
        fail_once(monkeypatch, fake_tensorrt.Context, "execute_async_v3", False, after=after)
        with pytest.raises(DeviceError, match=f"the engine `{engine}` does not run"):
            sampler.generate(**request)
        assert_equal(sampler.generate(**request), expected)


def test_the_plan_of_a_bundle_that_draws_prompts_is_what_is_taken(text_bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(text_bundle, max_concurrency=2) as sampler:
        plan = sampler.memory_plan
        assert gpu.cudart.live_bytes("device") == plan.total_bytes - plan.weights_bytes


# what is enqueued


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", ["mixed", "fewer"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_launch_gets_the_addresses_shapes_and_profile_of_the_program(
    bundles: Mapping[Layout, Path], gpu: Gpu, layout: Layout, schedule: str, batch_size: int
) -> None:
    with Sampler.open(bundles[layout], cuda_graphs=False) as sampler:
        program = program_of(bundles[layout], schedule, batch_size)
        sampler.generate(labels=[1] * batch_size, schedule=schedule)
        calls = executed(gpu.cudart)
        base = base_addresses(gpu.cudart)[calls[0]["stream"]]
        assert [call["engine"] for call in calls] == [launch.engine for launch in program.launches]
        for call, launch in zip(calls, program.launches, strict=True):
            profile = sampler.manifest.engines[launch.engine].profiles[call["profile"]]
            assert call["addresses"] == {name: base + place.offset for name, place in launch.tensors.items()}
            assert call["shapes"] == {name: place.shape for name, place in launch.tensors.items()}
            assert profile.covers(launch.sizes)
            assert not call["is_captured"]
            assert call["activations"][0] >= base + program.num_bytes


@pytest.mark.parametrize("batch_size", [1, 2])
def test_one_image_runs_under_a_profile_of_its_own(bundle: Path, gpu: Gpu, batch_size: int) -> None:
    with Sampler.open(bundle, cuda_graphs=False) as sampler:
        sampler.generate(labels=[1] * batch_size)
    assert {call["profile"] for call in executed(gpu.cudart)} == {batch_size - 1}


def test_a_captured_trajectory_is_the_launches_of_the_program(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle) as sampler:
        sampler.prepare([2])
        engines = [launch.engine for launch in program_of(bundle, "mixed", 2).launches]
    warm_up, captured = ([call for call in executed(gpu.cudart) if call["is_captured"] == is_it] for is_it in (0, 1))
    assert [call["engine"] for call in warm_up] == [call["engine"] for call in captured] == engines
    assert [call["addresses"] for call in warm_up] == [call["addresses"] for call in captured]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_between_the_first_and_the_last_launch_only_addresses_change(
    bundles: Mapping[Layout, Path], gpu: Gpu, layout: Layout
) -> None:
    with Sampler.open(bundles[layout], cuda_graphs=False) as sampler:
        sampler.prepare([2])
        mark = gpu.cudart.mark()
        sampler.generate(**REQUEST)
        first = gpu.cudart.names(mark)
        mark = gpu.cudart.mark()
        sampler.generate(**OTHER)
        second = gpu.cudart.names(mark)
    for names in (first, second):
        ran = [i for i, name in enumerate(names) if name == "execute_async_v3"]
        assert set(names[ran[0] : ran[-1]]) == WITHIN_A_TRAJECTORY
    assert sum(name == "set_tensor_address" for name in second) < sum(name == "set_tensor_address" for name in first)


def copies(cudart: FakeCudart, mark: int) -> Counter[Any]:
    return Counter(call["kind"] for call in cudart.since(mark, "cudaMemcpyAsync"))


def test_a_captured_request_is_one_copy_in_one_launch_and_one_copy_out_per_result(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle) as sampler:
        sampler.prepare([2], schedules=["mixed", "fewer"])
        for schedule, num_copies_in in (("mixed", 2), ("mixed", 1), ("fewer", 2), ("fewer", 1), ("mixed", 2)):
            mark = gpu.cudart.mark()
            sampler.generate(**REQUEST, schedule=schedule)
            names = Counter(gpu.cudart.names(mark))
            kinds = {Copy.cudaMemcpyHostToDevice: num_copies_in, Copy.cudaMemcpyDeviceToHost: 2}
            assert copies(gpu.cudart, mark) == kinds
            assert names["cudaGraphLaunch"] == 1
            assert set(names) == {
                "cudaMemcpyAsync",
                "cudaGraphLaunch",
                "cudaEventRecord",
                "cudaEventElapsedTime",
                "cudaStreamSynchronize",
            }


def test_an_address_is_set_only_where_it_changed(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle, cuda_graphs=False) as sampler:
        for request in (REQUEST, OTHER, REQUEST):
            sampler.generate(**request)
        streamed(sampler, **REQUEST)
        sampler.generate(**REQUEST, schedule="fewer")
    current: dict[tuple[int, str], int] = {}
    for call in gpu.cudart.since(name="set_tensor_address"):
        key = (call["context"], call["name"])
        assert current.get(key) != call["address"]
        current[key] = call["address"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", ["mixed", "full"])
def test_no_launch_writes_where_it_reads(
    bundles: Mapping[Layout, Path], gpu: Gpu, layout: Layout, schedule: str
) -> None:
    with Sampler.open(bundles[layout], cuda_graphs=False) as sampler:
        sampler.generate(**REQUEST, schedule=schedule)
        graphs = sampler.manifest.graphs
    for call in executed(gpu.cudart):
        graph = graphs[call["engine"]]
        spans = {
            spec.name: (at := call["addresses"][spec.name], at + int(np.prod(shape)) * ITEMSIZE[spec.dtype])
            for spec in (*graph.inputs, *graph.outputs)
            if (shape := call["shapes"][spec.name]) is not None
        }
        for output in graph.outputs:
            start, end = spans[output.name]
            assert all(end <= begin or stop <= start for name, (begin, stop) in spans.items() if name != output.name)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_workspace_has_one_context_for_each_engine_and_set_of_shapes(
    bundle: Path, gpu: Gpu, cuda_graphs: bool
) -> None:
    shapes: set[Any] = set()
    with Sampler.open(bundle, max_concurrency=2, cuda_graphs=cuda_graphs) as sampler:
        sampler.prepare([1, 2], schedules=["mixed", "fewer"])
        for schedule in ("mixed", "fewer"):
            for batch_size in (1, 2):
                for launch in program_of(bundle, schedule, batch_size).launches:
                    inputs = [launch.tensors[spec.name].shape for spec in sampler.manifest.graphs[launch.engine].inputs]
                    shapes.add((launch.engine, *inputs))
        mark = gpu.cudart.mark()
        for schedule in ("mixed", "fewer"):
            sampler.generate(**REQUEST, schedule=schedule)
            streamed(sampler, labels=[1], schedule=schedule)
    before = Counter(gpu.cudart.names()[:mark])
    # For each of 1 and 2 images: 6 engines, and `conditioning` again for the other number of steps.
    assert len(shapes) == 2 * (NUM_ENGINES + 1)
    assert before["create_execution_context"] == before["set_optimization_profile_async"] == 2 * len(shapes)
    assert not {"create_execution_context", "set_optimization_profile_async", "set_input_shape"} & set(
        gpu.cudart.names(mark)
    )


def test_a_trajectory_is_captured_once_for_each_schedule_and_batch_size(bundle: Path, gpu: Gpu) -> None:
    captured = []
    with Sampler.open(bundle) as sampler:
        for schedule, batch_size in (("mixed", 1), ("mixed", 1), ("mixed", 2), ("fewer", 1), ("mixed", 2)):
            mark = gpu.cudart.mark()
            sampler.generate(labels=[0] * batch_size, schedule=schedule)
            captured.append(gpu.cudart.names(mark).count("cudaStreamBeginCapture"))
    assert captured == [1, 0, 1, 1, 0]


def test_prepare_does_ahead_what_the_first_request_would_do(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle, max_concurrency=2) as sampler:
        sampler.prepare([1, 2], schedules=["mixed", "fewer"])
        assert gpu.cudart.names().count("cudaStreamBeginCapture") == 2 * 2 * 2
        sampler.prepare([2])
        mark = gpu.cudart.mark()
        live = gpu.cudart.live
        for _ in range(2):
            for schedule in ("mixed", "fewer"):
                sampler.generate(**REQUEST, schedule=schedule)
        assert gpu.cudart.live == live
    made = {"cudaStreamBeginCapture", "cudaMalloc", "cudaMallocHost", "create_execution_context"}
    assert not made & set(gpu.cudart.names(mark))


def test_without_cuda_graphs_nothing_is_captured(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle, cuda_graphs=False) as sampler:
        sampler.prepare([1])
        report = sampler.generate(labels=[1]).report
    assert not {"cudaStreamBeginCapture", "cudaGraphLaunch"} & set(gpu.cudart.names())
    assert report.graph_bytes is None


def test_the_report_tells_what_the_captured_trajectory_takes(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle) as sampler:
        num_launches = len(program_of(bundle, "mixed", 2).launches)
        captured, launched = sampler.generate(**REQUEST).report, streamed(sampler, **REQUEST).report
    assert captured.graph_bytes == num_launches * GRAPH_NODE_BYTES
    assert captured.engine_ms == {}
    assert captured.trajectory_ms == num_launches  # each takes a millisecond on the fake's clock
    assert launched.graph_bytes is None
    assert launched.engine_ms == captured.counts == launched.counts
    assert sum(captured.counts.values()) == num_launches


# requests that fail


def fail_call(name: str, error: Any = Error.cudaErrorIllegalAddress, after: int = 0) -> Callable[..., None]:
    """Return what lets a call of CUDA's runtime fail once."""
    return lambda gpu, patch: gpu.cudart.fail(name, error, after=after)


def refuse_launch(after: int) -> Callable[..., Any]:
    """Return what lets a launch answer False once."""
    return lambda gpu, patch: fail_once(patch, fake_tensorrt.Context, "execute_async_v3", False, after=after)


CAPTURED: Final = [
    (fail_call("cudaMemcpyAsync"), "cudaMemcpyAsync failed: an illegal memory access"),
    (fail_call("cudaMemcpyAsync", after=1), "cudaMemcpyAsync failed"),
    (fail_call("cudaMemcpyAsync", after=2), "cudaMemcpyAsync failed"),
    (fail_call("cudaGraphLaunch"), "cudaGraphLaunch failed"),
    (fail_call("cudaEventRecord", after=1), "cudaEventRecord failed"),
    (fail_call("cudaStreamSynchronize"), "cudaStreamSynchronize failed"),
    (fail_call("cudaEventElapsedTime"), "cudaEventElapsedTime failed"),
]


@pytest.mark.parametrize("is_first_of_its_program", [True, False])
@pytest.mark.parametrize(("let_fail", "message"), CAPTURED)
def test_a_captured_request_that_fails_leaves_its_slot_as_good_as_new(
    bundle: Path,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    let_fail: Callable[..., None],
    message: str,
    is_first_of_its_program: bool,
) -> None:
    with Sampler.open(bundle) as sampler:
        right = sampler.generate(**REQUEST)
        if is_first_of_its_program:  # then a failure may lose the constants, which are written once
            sampler.generate(**REQUEST, schedule="fewer")
        let_fail(gpu, monkeypatch)
        with pytest.raises(DeviceError, match=message):
            sampler.generate(**OTHER)
        for _ in range(2):
            assert_equal(sampler.generate(**REQUEST), right)


@pytest.mark.parametrize("after", [0, 3, 7])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_launch_that_is_refused_leaves_its_slot_as_good_as_new(
    bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, after: int, is_streamed: bool
) -> None:
    with Sampler.open(bundle, cuda_graphs=False) as sampler:
        right = sampler.generate(**REQUEST)
        draw = streamed if is_streamed else Sampler.generate
        with monkeypatch.context() as patch:
            refuse_launch(after)(gpu, patch)
            with pytest.raises(DeviceError, match=r"the engine `\w+` does not run: TensorRT gave no reason"):
                draw(sampler, **OTHER)
        assert gpu.cudart.num_pending == 0  # the launches before it have run
        for _ in range(2):
            assert_equal(sampler.generate(**REQUEST), right)


@pytest.mark.parametrize(
    ("let_fail", "kind", "message"),
    [
        (refuse_launch(3), DeviceError, "`tokens` does not run"),  # while engines settle
        (refuse_launch(8 + 3), DeviceError, "`tokens` does not run"),  # within the capture
        (fail_call("cudaStreamBeginCapture"), DeviceError, "cudaStreamBeginCapture"),
        (fail_call("cudaGraphInstantiate", Error.cudaErrorMemoryAllocation), CapacityError, "Lower max_concurrency"),
        (fail_call("cudaGraphUpload"), DeviceError, "cudaGraphUpload"),
        (fail_call("cudaEventCreateWithFlags", after=5), DeviceError, "cudaEventCreateWithFlags"),
        (fail_call("cudaMallocHost", Error.cudaErrorMemoryAllocation, after=0), CapacityError, "of pinned host memory"),
        (fail_call("cudaMallocHost", Error.cudaErrorMemoryAllocation, after=1), CapacityError, "of pinned host memory"),
    ],
)
def test_a_trajectory_that_cannot_be_captured_can_be_at_the_next_request(
    bundle: Path,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    expected: Result,
    let_fail: Callable[..., None],
    kind: type[HemiolaError],
    message: str,
) -> None:
    with Sampler.open(bundle) as sampler:
        with monkeypatch.context() as patch:
            let_fail(gpu, patch)
            with pytest.raises(kind, match=message):
                sampler.generate(**REQUEST)
        for _ in range(2):
            assert_close(sampler.generate(**REQUEST), expected)


def test_trajectories_that_fail_again_and_again_take_no_more_and_more(bundle: Path, gpu: Gpu) -> None:
    taken = []
    with Sampler.open(bundle) as sampler:
        for _ in range(3):
            gpu.cudart.fail("cudaGraphInstantiate", Error.cudaErrorMemoryAllocation)
            with pytest.raises(CapacityError):
                sampler.prepare([1])
            taken.append((gpu.cudart.live, gpu.cudart.free_bytes))
    assert taken[0] == taken[1] == taken[2]


def test_latents_that_overflow_are_told_with_the_launch_and_leave_the_slot_as_good_as_new(
    bundle: Path, gpu: Gpu
) -> None:
    with Sampler.open(bundle) as sampler:
        right = sampler.generate(**REQUEST)
        huge = np.full((2, *sampler.manifest.pipeline.model.latent_shape), 3e38, dtype=np.float32)
        with pytest.raises(NumericError, match=r"The first to hold any was the tensor \S+ of `full` at step 0"):
            sampler.generate(labels=[1, 2], latents=huge)
        assert_equal(sampler.generate(**REQUEST), right)


def test_a_request_that_is_cancelled_or_left_leaves_its_slot_as_good_as_new(bundle: Path, gpu: Gpu) -> None:
    cancel = threading.Event()
    cancel.set()
    with Sampler.open(bundle) as sampler:
        right = sampler.generate(**REQUEST)
        with pytest.raises(CancelledError, match="after step 1 of 6"):
            sampler.generate(**OTHER, cancel=cancel)
        assert_equal(sampler.generate(**REQUEST), right)
        stream = sampler.stream(**OTHER)
        assert [next(stream).step for _ in range(3)] == [0, 1, 2]
        stream.close()  # type: ignore[attr-defined]
        assert gpu.cudart.num_pending == 0
        assert_equal(sampler.generate(**REQUEST), right)


def test_a_step_is_told_when_it_is_done_and_the_next_is_under_way(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle) as sampler:
        stream = sampler.stream(**REQUEST)
        mark = gpu.cudart.mark()
        assert next(stream).step == 0
        names = gpu.cudart.names(mark)
        assert names.count("cudaEventSynchronize") == 1
        assert "cudaStreamSynchronize" not in names[names.index("cudaEventRecord") :]
        stream.close()  # type: ignore[attr-defined]


class Slowly:
    """Slots that are given one after the other, so that each of two threads that want them all gets some."""

    def __init__(self, slots: queue.SimpleQueue[Any]) -> None:
        self._slots = slots
        self.put = slots.put

    def get(self) -> Any:
        slot = self._slots.get()
        time.sleep(0.02)
        return slot


def test_two_threads_that_prepare_at_once_do_not_wait_for_each_other_for_ever(
    bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler.open(bundle, max_concurrency=3)
    monkeypatch.setattr(sampler, "_free", Slowly(sampler._free))
    threads = [threading.Thread(target=sampler.prepare, args=([1],), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    sampler.close()


# memory


def test_everything_is_freed_when_the_sampler_is_closed(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle, max_concurrency=2) as sampler:
        for schedule in sampler.schedules:
            sampler.generate(**REQUEST, schedule=schedule)
        assert set(gpu.cudart.live) == {"device", "pinned", "streams", "events", "graph_execs"}
    assert not gpu.cudart.live
    assert gpu.cudart.free_bytes == gpu.cudart.total_bytes  # the engines are gone too


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("cudaStreamSynchronize", {}),
        ("cudaGraphExecDestroy", {"graph_execs": 1}),
        ("cudaEventDestroy", {"events": 1}),
        ("cudaFreeHost", {"pinned": 1}),
        ("cudaFree", {"device": 1}),
        ("cudaStreamDestroy", {"streams": 1}),
    ],
)
def test_what_cannot_be_freed_keeps_nothing_else(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: dict[str, int]
) -> None:
    cudart = install_gpu(monkeypatch)
    install_library(monkeypatch, cudart)
    sampler = Sampler.open(bundle, max_concurrency=2)
    sampler.prepare([1])
    cudart.fail(name, Error.cudaErrorUnknown)
    with pytest.raises(DeviceError, match=f"{name} failed"):
        sampler.close()
    assert cudart.live == left
    with pytest.raises(HemiolaError, match="closed"):
        sampler.generate(labels=[1])


@pytest.mark.parametrize(
    ("name", "after", "error", "kind", "message"),
    [
        ("cudaStreamCreateWithFlags", 1, Error.cudaErrorUnknown, DeviceError, "cudaStreamCreateWithFlags failed"),
        (
            "cudaMalloc",
            1,
            Error.cudaErrorMemoryAllocation,
            CapacityError,
            r"a workspace takes \d+\.\d kB, but \d+\.\d GB are free: cudaMalloc failed: out of memory .*Lower max_conc",
        ),
        (
            "cudaMallocHost",
            1,
            Error.cudaErrorMemoryAllocation,
            CapacityError,
            r"\d+\.\d kB of pinned host memory are wanted: cudaMallocHost failed: out of memory .*Lower max_conc",
        ),
        ("cudaMemsetAsync", 1, Error.cudaErrorInvalidValue, DeviceError, "cudaMemsetAsync failed"),
        ("cudaStreamSynchronize", 1, Error.cudaErrorLaunchFailure, DeviceError, "cudaStreamSynchronize failed"),
    ],
)
def test_a_second_workspace_that_cannot_be_had_leaves_nothing_behind(
    bundle: Path, gpu: Gpu, name: str, after: int, error: Any, kind: type[HemiolaError], message: str
) -> None:
    gpu.cudart.fail(name, error, after=after)
    with pytest.raises(kind, match=message) as caught:
        Sampler.open(bundle, max_concurrency=2)
    del caught  # its frames hold the engines
    assert not gpu.cudart.live
    assert gpu.cudart.free_bytes == gpu.cudart.total_bytes


def test_a_third_engine_that_is_refused_leaves_nothing_behind(
    bundle: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, fake_tensorrt.Runtime, "deserialize_cuda_engine", None, after=2)
    with pytest.raises(BundleError, match="refuses the engine `deep`"):
        Sampler.open(bundle)
    assert gpu.cudart.free_bytes == gpu.cudart.total_bytes
    assert not gpu.cudart.live


def test_what_went_wrong_first_is_told_even_if_nothing_can_be_freed(bundle: Path, gpu: Gpu) -> None:
    gpu.cudart.fail("cudaMalloc", Error.cudaErrorMemoryAllocation, after=1)
    gpu.cudart.fail("cudaStreamSynchronize", Error.cudaErrorLaunchFailure, after=1)
    with pytest.raises(CapacityError, match="a workspace takes"):
        Sampler.open(bundle, max_concurrency=2)
    assert "cudaFree" in gpu.cudart.names()


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = install_gpu(monkeypatch, total_bytes=1 << 20)
    install_library(monkeypatch, cudart)
    with pytest.raises(CapacityError, match=r"the bundle needs 1\.\d MB .*, but 1\.0 MB are free\. Lower max_concurr"):
        Sampler.open(bundle, max_concurrency=2)
    assert set(cudart.names()) == {"cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaMemGetInfo"}


def test_engines_that_need_more_than_was_estimated_are_refused_before_workspaces_are_made(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = install_gpu(monkeypatch, total_bytes=1 << 30)
    install_library(monkeypatch, cudart)
    monkeypatch.setattr(fake_tensorrt.Engine, "get_device_memory_size_for_profile_v2", lambda engine, index: 700 << 20)
    with pytest.raises(CapacityError, match=r"734\.0 MB activations.*but 1\.1 GB are free \(the weights are loaded\)"):
        Sampler.open(bundle, max_concurrency=2)
    assert "cudaMalloc" not in cudart.names()
    assert not cudart.live


def test_the_plan_is_what_is_taken(bundle: Path, gpu: Gpu) -> None:
    with Sampler.open(bundle, max_concurrency=2) as sampler:
        plan = sampler.memory_plan
        assert gpu.cudart.live_bytes("device") == 2 * (plan.workspace_bytes + plan.activation_bytes)
        sampler.generate(labels=[1, 2, 3])  # the largest batch finds all the memory that it needs
