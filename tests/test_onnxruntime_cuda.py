"""ONNX Runtime on a fake GPU: sessions of the CPU stand in for those of CUDAExecutionProvider.

What the fake device adds is what a real one does: runs wait on the stream that the session was given, and read and
write device memory alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import pytest
from cuda.bindings import runtime
from onnx import TensorProto, helper

from bundles import Made
from fake_cuda import FakeCudart
from gpu_bundles import assert_close, install_driver, install_gpu, onnxruntime_cuda_bundle
from hemiola_runtime.backends import BackendOptions, cuda, onnxruntime_cuda, open_backend
from hemiola_runtime.backends.onnxruntime import ONNX_TYPES, open_session
from hemiola_runtime.backends.onnxruntime_cuda import PROVIDER, OnnxRuntimeCuda
from hemiola_runtime.errors import BundleError, CancelledError, CapacityError, DeviceError
from hemiola_runtime.graphs import GraphSpec, TensorSpec, WeightSpec
from hemiola_runtime.manifest import BackendSpec, EngineSpec
from hemiola_runtime.program import Launch, Placed
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler

Error: Final = runtime.cudaError_t
SIZES: Final = {onnx_type: 8 if dtype == "int64" else 4 for dtype, onnx_type in ONNX_TYPES.items()}
REQUEST: Final[dict[str, Any]] = {"labels": [3, 4], "seeds": [5, 9], "guidance_scale": [2.0, 3.5]}


class DeviceBinding:
    """Binds device memory, of which it keeps account."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.binding = session.io_binding()
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []

    def bind_input(self, **place: Any) -> None:
        self._bind(self.binding.bind_input, self.reads, **place)

    def bind_output(self, **place: Any) -> None:
        self._bind(self.binding.bind_output, self.writes, **place)

    def _bind(self, bind: Any, spans: list[tuple[int, int]], *, device_type: str, **place: Any) -> None:
        assert (device_type, place["device_id"]) == ("cuda", 0)
        bind(device_type="cpu", **place)
        spans.append((place["buffer_ptr"], int(np.prod(place["shape"])) * SIZES[place["element_type"]]))


class DeviceSession:
    """A session that runs on its stream, later."""

    def __init__(self, session: ort.InferenceSession, cudart: FakeCudart, provider: dict[str, str], name: str) -> None:
        assert provider["device_id"] == "0"
        assert provider["use_tf32"] == "0"
        self.stream = int(provider["user_compute_stream"])
        self._session = session
        self._cudart = cudart
        self._name = name

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def io_binding(self) -> DeviceBinding:
        return DeviceBinding(self._session)

    def run_with_iobinding(self, bound: DeviceBinding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        for start, size in bound.writes:
            assert all(start + size <= at or at + length <= start for at, length in bound.reads), "reads what it writes"
        self._cudart.note("run", engine=self._name, stream=self.stream)
        self._cudart.enqueue_work(
            self.stream,
            lambda: self._session.run_with_iobinding(bound.binding),
            reads=bound.reads,
            writes=bound.writes,
            label=self._name,
        )


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudart]:
    """A machine with CUDAExecutionProvider, on which nothing may be left."""
    machine = install_gpu(monkeypatch)

    def open_on_device(graph: GraphSpec, data: bytes, settings: Any, providers: Sequence[Any]) -> DeviceSession:
        ((name, provider),) = providers
        assert name == PROVIDER
        return DeviceSession(
            open_session(graph, data, settings, ["CPUExecutionProvider"]), machine, provider, graph.name
        )

    monkeypatch.setattr(onnxruntime_cuda, "open_session", open_on_device)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    yield machine
    assert not machine.live


@pytest.fixture(scope="module")
def bundle(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnxruntime_cuda_bundle(latent.graphs, tmp_path_factory.mktemp("onnxruntime_cuda") / "bundle")


@pytest.fixture(scope="module")
def text_bundle(text: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnxruntime_cuda_bundle(text.graphs, tmp_path_factory.mktemp("onnxruntime_cuda_text") / "bundle")


def assert_equal(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.images, expected.images)


def test_images_are_those_of_the_cpu(latent: Made, bundle: Path, cudart: FakeCudart) -> None:
    with Sampler.open(latent.bundle) as cpu, Sampler.open(bundle) as gpu:
        for schedule in cpu.schedules:
            expected, found = (sampler.generate(**REQUEST, schedule=schedule) for sampler in (cpu, gpu))
            assert_close(found, expected)
            assert found.report.counts == expected.report.counts


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (8, 24), (24, 24)])
def test_pictures_of_prompts_are_those_of_the_cpu(
    text: Made, text_bundle: Path, cudart: FakeCudart, height: int, width: int
) -> None:
    request: dict[str, Any] = {"prompts": ["a red circle", "a square"], "seeds": 3, "height": height, "width": width}
    with Sampler.open(text.bundle) as cpu, Sampler.open(text_bundle) as gpu:
        for schedule in cpu.schedules:
            expected, found = (sampler.generate(**request, schedule=schedule) for sampler in (cpu, gpu))
            assert_close(found, expected)
            assert (found.report.counts, found.report.text) == (expected.report.counts, expected.report.text)


def test_a_trajectory_is_never_captured_and_nothing_waits_within_it(bundle: Path, cudart: FakeCudart) -> None:
    with Sampler.open(bundle) as sampler:
        sampler.prepare([2])
        mark = cudart.mark()
        report = sampler.generate(**REQUEST).report
        names = cudart.names(mark)
    ran = [i for i, name in enumerate(names) if name == "run"]
    assert set(names[ran[0] : ran[-1]]) == {"run", "cudaEventRecord"}
    assert not {"cudaStreamBeginCapture", "cudaGraphLaunch"} & set(cudart.names())
    assert report.graph_bytes is None
    assert report.engine_ms == report.counts  # each run takes a millisecond on the fake's clock


def test_a_stream_of_steps_ends_with_what_is_drawn_at_once(bundle: Path, cudart: FakeCudart) -> None:
    with Sampler.open(bundle) as sampler:
        last = list(sampler.stream(**REQUEST))[-1].result
        assert last is not None
        assert_equal(last, sampler.generate(**REQUEST))


def test_all_sessions_and_workspaces_share_one_stream(bundle: Path, cudart: FakeCudart) -> None:
    with Sampler.open(bundle, max_concurrency=3) as sampler:
        sampler.prepare([1])
        sampler.generate(**REQUEST)
        assert cudart.live["streams"] == 1
    streams = {call["stream"] for call in cudart.calls if "stream" in call.arguments}
    assert len(streams) == 1
    assert cudart.names().count("cudaStreamDestroy") == 1
    assert cudart.names()[-1] == "cudaStreamDestroy"  # behind all memory that is used on it


def test_eight_threads_on_two_slots_draw_what_one_draws(bundle: Path, cudart: FakeCudart) -> None:
    requests: list[dict[str, Any]] = [{"labels": [i, (3 * i) % 10], "seeds": 2 * i} for i in range(8)]
    with Sampler.open(bundle, max_concurrency=2) as sampler:
        alone = [sampler.generate(**request) for request in requests]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda request: sampler.generate(**request), requests))
    for found, expected in zip(together, alone, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("name", ["cudaMemcpyAsync", "cudaEventRecord", "cudaStreamSynchronize"])
def test_a_request_that_fails_leaves_its_slot_as_good_as_new(bundle: Path, cudart: FakeCudart, name: str) -> None:
    with Sampler.open(bundle) as sampler:
        right = sampler.generate(**REQUEST)
        sampler.generate(**REQUEST, schedule="fewer")
        cudart.fail(name, Error.cudaErrorUnknown)
        with pytest.raises(DeviceError, match=f"{name} failed"):
            sampler.generate(labels=[1, 2])
        assert_equal(sampler.generate(**REQUEST), right)


def test_a_second_workspace_that_cannot_be_had_leaves_nothing_behind(bundle: Path, cudart: FakeCudart) -> None:
    cudart.fail("cudaMalloc", Error.cudaErrorMemoryAllocation, after=1)
    with pytest.raises(CapacityError, match=r"a workspace takes \d+\.\d kB, but 51\.5 GB are free"):
        Sampler.open(bundle, max_concurrency=2)
    assert not cudart.live


def test_the_plan_counts_the_weights_once_for_every_engine(latent: Made, bundle: Path, cudart: FakeCudart) -> None:
    with Sampler.open(latent.bundle) as cpu, Sampler.open(bundle) as gpu:
        copies = sum(weight.num_bytes for graph in gpu.manifest.graphs.values() for weight in graph.weights)
        assert gpu.memory_plan.weights_bytes == copies > cpu.memory_plan.weights_bytes


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_loaded(
    bundle: Path, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart.total_bytes = 1 << 20
    monkeypatch.setattr(onnxruntime_cuda, "open_session", lambda *_: pytest.fail("a session is opened"))
    with pytest.raises(CapacityError, match=r"but 1\.0 MB are free"):
        Sampler.open(bundle)


# weights


WIDTH: Final = 6


def save_scale(folder: Path, dtype: str) -> bytes:
    """Write `y = x · weight` in float32; the weight lies in the weight file, in its own dtype."""
    weight = helper.make_tensor("weight", ONNX_TYPES[dtype], [WIDTH], np.zeros(WIDTH))
    weight.ClearField("raw_data")
    num_bytes = len(stored([0] * WIDTH, dtype))
    for key, value in (("location", "weights.bin"), ("offset", "256"), ("length", str(num_bytes))):
        weight.external_data.add(key=key, value=value)
    weight.data_location = TensorProto.EXTERNAL
    for numbers in ("float_data", "int32_data", "int64_data"):
        weight.ClearField(numbers)
    nodes = [
        helper.make_node("Cast", ["weight"], ["weight32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "weight32"], ["y"]),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "scale", sides[:1], sides[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data


def stored(values: Any, dtype: str) -> Any:
    """Return numbers as a weight file stores them; those here are whole in 8 bits, so bfloat16 cuts nothing off."""
    if dtype == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return np.asarray(values, dtype).view(np.uint8)


def backend_of(weights: Any, folder: Path) -> Any:
    return open_backend(BackendSpec("onnxruntime_cuda", "1.20.0"), BackendOptions(weights, folder, 1, "hemiola build"))


def spec_of(dtype: Any) -> EngineSpec:
    x, y = (TensorSpec(name, "float32", (WIDTH,)) for name in ("x", "y"))
    weight = WeightSpec("weight", dtype, (WIDTH,), offset=256)
    return EngineSpec(GraphSpec("scale", "scale.onnx", "", (x,), (y,), (weight,), 0), "", ())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_weights_of_every_dtype_are_handed_over_from_the_mapping(
    cudart: FakeCudart, tmp_path: Path, dtype: str
) -> None:
    values = [1.0, -2.0, 3.0, 0.0, 5.0, 96.0]
    weights = np.concatenate([np.zeros(256, np.uint8), stored(values, dtype)])
    weights.flags.writeable = False  # as a mapping is
    backend = backend_of(weights, tmp_path)  # where no weight file lies
    engine = backend.load(spec_of(dtype), save_scale(tmp_path, dtype))
    workspace = backend.workspace(1024, 256)
    place = {"x": Placed(0, (WIDTH,), "float32"), "y": Placed(256, (WIDTH,), "float32")}
    workspace.write(0, np.arange(WIDTH, dtype=np.float32).view(np.uint8))
    engine.bind(Launch("scale", None, {}, place), workspace).enqueue()
    np.testing.assert_array_equal(workspace.read(256, 4 * WIDTH).view(np.float32), np.arange(WIDTH) * values)
    workspace.close()
    engine.close()
    backend.close()


# what is refused


def test_a_provider_that_falls_back_to_the_cpu_is_refused(
    bundle: Path, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "open_session", open_session)  # the real one, which has no such provider
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BundleError, match=r"would run `\w+` on the CPU: .*pip install 'hemiola\[gpu\]'"):
            Sampler.open(bundle)
    assert not cudart.live


def test_an_onnxruntime_without_the_provider_is_an_obstacle_with_its_command(bundle: Path) -> None:
    with pytest.raises(
        BundleError,
        match=rf"onnxruntime \S+ has no {PROVIDER}\. .*pip uninstall --yes onnxruntime onnxruntime-gpu && pip in",
    ):
        Sampler.open(bundle)


def test_cudas_libraries_are_loaded_before_the_provider_is_looked_for_and_silently(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    available = ["CPUExecutionProvider"]

    def preload_dlls() -> None:
        print("Failed to load libcudnn.so.9: cannot open shared object file")
        available.insert(0, PROVIDER)

    install_gpu(monkeypatch)
    monkeypatch.setattr(ort, "preload_dlls", preload_dlls)
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    assert onnxruntime_cuda.obstacle(BackendSpec("onnxruntime_cuda", "1.20.0")) is None
    assert capsys.readouterr().out == ""


def test_a_machine_without_a_driver_is_an_obstacle(
    bundle: Path, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_driver(monkeypatch, lambda _: SimpleNamespace(cuInit=lambda _: 100))
    with pytest.raises(BundleError, match="the NVIDIA driver sees no GPU; CUDA_VISIBLE_DEVICES may hide it"):
        Sampler.open(bundle)


def test_an_older_onnxruntime_is_an_obstacle_with_both_versions(cudart: FakeCudart) -> None:
    built = BackendSpec("onnxruntime_cuda", "99.0.0")
    assert f"built with onnxruntime 99.0.0, but {ort.__version__} is" in str(onnxruntime_cuda.obstacle(built))


def test_a_graph_that_is_refused_leaves_nothing_behind(cudart: FakeCudart, tmp_path: Path) -> None:
    backend = OnnxRuntimeCuda(BackendOptions(np.zeros(512, np.uint8), tmp_path, 1, "hemiola build"), cuda.Cuda())
    with pytest.raises(BundleError, match="refuses the engine `scale`"):
        backend.load(spec_of("float32"), b"no graph")
    backend.close()


def test_requests_that_are_cancelled_leave_their_slot_as_good_as_new(bundle: Path, cudart: FakeCudart) -> None:
    cancel = threading.Event()
    cancel.set()
    with Sampler.open(bundle) as sampler:
        right = sampler.generate(**REQUEST)
        with pytest.raises(CancelledError, match="after step 1 of 6"):
            sampler.generate(labels=[1, 2], cancel=cancel)
        assert cudart.num_pending == 0
        assert_equal(sampler.generate(**REQUEST), right)
