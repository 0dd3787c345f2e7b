"""The fakes compute, and catch what a real GPU would leave undefined."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from cuda.bindings import runtime
from onnx import TensorProto, helper

from fake_cuda import FakeCudart
from fake_tensorrt import Logger, fake_engine_bytes, fake_tensorrt
from hemiola_runtime.manifest import Profile

Error: Final = runtime.cudaError_t
Copy: Final = runtime.cudaMemcpyKind
GLOBAL: Final = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
ROWS: Final = (2, 3)


def done(answer: tuple[Any, ...]) -> Any:
    """Return the result of a call that must succeed."""
    assert answer[0] == Error.cudaSuccess, answer
    return answer[1] if len(answer) == 2 else answer[1:]


def floats(cudart: FakeCudart, address: int, count: int) -> Any:
    """Return numbers as they are now."""
    return cudart.memory(address, 4 * count).view(np.float32)


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


@pytest.fixture
def stream(cudart: FakeCudart) -> Any:
    return done(cudart.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))


def save_graph(folder: Path, dtype: int = TensorProto.FLOAT) -> Path:
    """Write `total = 2 · x + Σ shift`, the sum over images, in float32: x (R, 3) for R = 2B rows, shift (B, 3)."""
    nodes = [
        helper.make_node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x32", "two"], ["scaled"]),
        helper.make_node("ReduceSum", ["shift", "first"], ["row"], keepdims=1),
        helper.make_node("Add", ["scaled", "row"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["total"], to=dtype),
    ]
    graph = helper.make_graph(
        nodes,
        "scale",
        [
            helper.make_tensor_value_info("x", dtype, ["R", 3]),
            helper.make_tensor_value_info("shift", TensorProto.FLOAT, ["B", 3]),
        ],
        [helper.make_tensor_value_info("total", dtype, ["R", 3])],
        [
            helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0]),
            helper.make_tensor("first", TensorProto.INT64, [1], [0]),
        ],
    )
    path = folder / "scale.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Bench:
    """One context of the graph with everything set, for one image: x (2, 3), shift (1, 3)."""

    def __init__(self, cudart: FakeCudart, path: Path, stream: Any, dtype: Any = np.float32, **options: Any) -> None:
        self.cudart, self.stream, self.dtype = cudart, stream, np.dtype(dtype)
        self.trt = fake_tensorrt(cudart, **options)
        self.logger = self.trt.Logger()
        self.data = fake_engine_bytes(path, [Profile({"B": (1, 1, 4)}), Profile({"B": (1, 64, 64)})], 2)
        self.engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(self.data)
        self.context = self.engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.activation_bytes = self.engine.get_device_memory_size_for_profile_v2(0)
        self.activations = done(cudart.cudaMalloc(self.activation_bytes))
        self.at = {name: done(cudart.cudaMalloc(256)) for name in ("x", "shift", "total")}
        self.context.set_device_memory(self.activations, self.activation_bytes)
        assert self.context.set_optimization_profile_async(0, int(stream))
        assert self.context.set_input_shape("x", ROWS)
        assert self.context.set_input_shape("shift", (1, 3))
        for name, address in self.at.items():
            assert self.context.set_tensor_address(name, address)
        self.put("x", np.arange(6).reshape(ROWS))
        cudart.memory(self.at["shift"], 12).view(np.float32)[:] = 10.0

    def put(self, name: str, values: Any) -> None:
        """Write a tensor of the graph's dtype at once."""
        data = np.ascontiguousarray(values, self.dtype)
        self.cudart.memory(self.at[name], data.nbytes)[:] = data.reshape(-1).view(np.uint8)

    def total(self) -> list[float]:
        """Return the output as it is now."""
        raw = self.cudart.memory(self.at["total"], 6 * self.dtype.itemsize)
        return [float(value) for value in raw.view(self.dtype)]

    def run(self) -> list[float]:
        """Enqueue, wait, return the output."""
        assert self.context.execute_async_v3(int(self.stream)), self.logger.messages
        done(self.cudart.cudaStreamSynchronize(self.stream))
        return self.total()


@pytest.fixture
def bench(cudart: FakeCudart, stream: Any, tmp_path: Path) -> Bench:
    return Bench(cudart, save_graph(tmp_path), stream)


def test_a_copy_happens_when_somebody_waits_and_takes_the_bytes_of_that_moment(cudart: FakeCudart, stream: Any) -> None:
    device, host = done(cudart.cudaMalloc(8)), done(cudart.cudaMallocHost(8))
    assert device % 256 == host % 256 == 0
    cudart.memory(host, 8)[:] = 1
    assert cudart.cudaMemcpyAsync(device, host, 8, Copy.cudaMemcpyHostToDevice, stream) == (Error.cudaSuccess,)
    assert np.isnan(floats(cudart, device, 2)).all()
    cudart.memory(host, 8)[:] = 2  # too early: the copy was not waited for
    done(cudart.cudaStreamSynchronize(stream))
    assert (cudart.memory(device, 8) == 2).all()


def test_an_event_is_behind_the_work_before_it_and_not_behind_the_work_after(cudart: FakeCudart, stream: Any) -> None:
    device = done(cudart.cudaMalloc(8))
    start, end = (done(cudart.cudaEventCreateWithFlags(0)) for _ in range(2))
    done(cudart.cudaEventRecord(start, stream))
    done(cudart.cudaMemsetAsync(device, 1, 4, stream))
    done(cudart.cudaEventRecord(end, stream))
    done(cudart.cudaMemsetAsync(device + 4, 1, 4, stream))
    assert cudart.cudaEventElapsedTime(start, end) == (Error.cudaErrorNotReady, None)
    done(cudart.cudaEventSynchronize(end))
    assert list(cudart.memory(device, 8)) == [1] * 4 + [255] * 4
    assert done(cudart.cudaEventElapsedTime(start, end)) == 1.0
    assert cudart.cudaEventQuery(end) == (Error.cudaSuccess,)


def test_polling_an_event_lets_its_stream_go_on(cudart: FakeCudart, stream: Any) -> None:
    device, event = done(cudart.cudaMalloc(4)), done(cudart.cudaEventCreateWithFlags(0))
    done(cudart.cudaMemsetAsync(device, 7, 4, stream))
    done(cudart.cudaEventRecord(event, stream))
    answers = [cudart.cudaEventQuery(event)[0] for _ in range(3)]
    assert answers == [Error.cudaErrorNotReady, Error.cudaErrorNotReady, Error.cudaSuccess]
    assert (cudart.memory(device, 4) == 7).all()


def test_two_streams_that_do_not_wait_for_each_other_race(cudart: FakeCudart, stream: Any) -> None:
    device, event = done(cudart.cudaMalloc(4)), done(cudart.cudaEventCreateWithFlags(0))
    other = done(cudart.cudaStreamCreateWithFlags(0))
    done(cudart.cudaMemsetAsync(device, 1, 4, stream))
    done(cudart.cudaEventRecord(event, stream))
    with pytest.raises(AssertionError, match="races"):
        cudart.cudaMemsetAsync(device, 2, 4, other)
    done(cudart.cudaStreamWaitEvent(other, event, 0))
    done(cudart.cudaMemsetAsync(device, 2, 4, other))
    done(cudart.cudaDeviceSynchronize())
    assert (cudart.memory(device, 4) == 2).all()


def test_captured_work_runs_at_every_launch_and_not_before(cudart: FakeCudart, stream: Any) -> None:
    device, host = done(cudart.cudaMalloc(4)), done(cudart.cudaHostAlloc(4, 0))
    event = done(cudart.cudaEventCreateWithFlags(0))
    done(cudart.cudaStreamBeginCapture(stream, GLOBAL))
    done(cudart.cudaMemcpyAsync(device, host, 4, Copy.cudaMemcpyHostToDevice, stream))
    done(cudart.cudaEventRecordWithFlags(event, stream, runtime.cudaEventRecordExternal))
    assert done(cudart.cudaStreamIsCapturing(stream)).name == "cudaStreamCaptureStatusActive"
    graph = done(cudart.cudaStreamEndCapture(stream))
    free = done(cudart.cudaMemGetInfo())[0]
    replay = done(cudart.cudaGraphInstantiate(graph, 0))
    assert done(cudart.cudaMemGetInfo())[0] < free
    done(cudart.cudaGraphDestroy(graph))
    for value in (3, 4):
        cudart.memory(host, 4)[:] = value
        done(cudart.cudaGraphLaunch(replay, stream))
        assert not (cudart.memory(device, 4) == value).any()
        done(cudart.cudaEventSynchronize(event))
        assert (cudart.memory(device, 4) == value).all()
    done(cudart.cudaGraphExecDestroy(replay))
    assert done(cudart.cudaMemGetInfo())[0] == free


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaFree"])
def test_what_a_capture_forbids_spoils_it(cudart: FakeCudart, stream: Any, call: str) -> None:
    arguments = {"cudaMalloc": (4,), "cudaStreamSynchronize": (stream,), "cudaFree": (done(cudart.cudaMalloc(4)),)}
    done(cudart.cudaStreamBeginCapture(stream, GLOBAL))
    assert len(done(cudart.cudaMemGetInfo())) == 2
    answer = getattr(cudart, call)(*arguments.get(call, ()))
    assert answer[0] == Error.cudaErrorStreamCaptureUnsupported
    assert cudart.cudaStreamEndCapture(stream) == (Error.cudaErrorStreamCaptureInvalidated, None)


def test_freed_memory_is_found_at_the_call_in_the_queue_and_in_a_graph(cudart: FakeCudart, stream: Any) -> None:
    device = done(cudart.cudaMalloc(4))
    done(cudart.cudaStreamBeginCapture(stream, GLOBAL))
    done(cudart.cudaMemsetAsync(device, 1, 4, stream))
    replay = done(cudart.cudaGraphInstantiate(done(cudart.cudaStreamEndCapture(stream)), 0))
    done(cudart.cudaGraphLaunch(replay, stream))
    with pytest.raises(AssertionError, match="synchronize first"):
        cudart.cudaFree(device)
    done(cudart.cudaStreamSynchronize(stream))
    done(cudart.cudaFree(device))
    with pytest.raises(AssertionError, match=r"memset.*do not lie within one live allocation"):
        cudart.cudaGraphLaunch(replay, stream)
    with pytest.raises(AssertionError, match="do not lie within one live allocation"):
        cudart.cudaMemsetAsync(device, 1, 4, stream)


def test_copies_stay_within_allocations_of_the_right_kind(cudart: FakeCudart, stream: Any) -> None:
    device, host = done(cudart.cudaMalloc(8)), done(cudart.cudaMallocHost(8))
    with pytest.raises(AssertionError, match="12 bytes"):
        cudart.cudaMemcpyAsync(device, host, 12, Copy.cudaMemcpyHostToDevice, stream)
    with pytest.raises(AssertionError, match="pinned memory, where device belongs"):
        cudart.cudaMemcpyAsync(device, host, 8, Copy.cudaMemcpyDeviceToDevice, stream)
    pageable = np.zeros(8, np.uint8)
    with pytest.raises(AssertionError, match="live allocation"):
        cudart.cudaMemcpyAsync(device, pageable.ctypes.data, 8, Copy.cudaMemcpyHostToDevice, stream)


def test_calls_are_logged_counted_and_made_to_fail(cudart: FakeCudart) -> None:
    cudart.fail("cudaMalloc", Error.cudaErrorMemoryAllocation, after=1)
    first = done(cudart.cudaMalloc(1 << 10))
    mark = cudart.mark()
    assert cudart.cudaMalloc(5) == (Error.cudaErrorMemoryAllocation, None)
    assert cudart.cudaGetLastError() == (Error.cudaErrorMemoryAllocation,)
    assert cudart.since(mark, "cudaMalloc")[0]["size"] == 5
    assert cudart.cudaMalloc(1 << 40) == (Error.cudaErrorMemoryAllocation, None)
    assert done(cudart.cudaMemGetInfo()) == ((48 << 30) - (1 << 10), 48 << 30)
    assert cudart.live == {"device": 1}
    done(cudart.cudaFree(first))
    assert not cudart.live
    assert cudart.names(mark)[-2:] == ["cudaMemGetInfo", "cudaFree"]
    assert cudart.cudaError_t is Error
    with pytest.raises(AttributeError, match="the fake has no cudaMemPrefetchAsync"):
        cudart.cudaMemPrefetchAsync()


def test_work_that_was_waited_for_in_vain_is_lost(cudart: FakeCudart, stream: Any) -> None:
    device = done(cudart.cudaMalloc(4))
    cudart.fail("cudaStreamSynchronize", Error.cudaErrorLaunchFailure)
    done(cudart.cudaMemsetAsync(device, 1, 4, stream))
    assert cudart.cudaStreamSynchronize(stream) == (Error.cudaErrorLaunchFailure,)
    done(cudart.cudaFree(device))
    done(cudart.cudaStreamDestroy(stream))
    assert not cudart.live


def test_an_engine_computes_when_its_stream_is_waited_for(bench: Bench) -> None:
    assert bench.context.infer_shapes() == []
    assert bench.context.get_tensor_shape("total") == ROWS
    assert bench.context.execute_async_v3(int(bench.stream))
    assert np.isnan(bench.total()).all()
    done(bench.cudart.cudaStreamSynchronize(bench.stream))
    assert bench.total() == [10.0, 12.0, 14.0, 16.0, 18.0, 20.0]
    call = bench.cudart.since(name="execute_async_v3")[0]
    assert (call["engine"], call["addresses"], call["is_captured"]) == ("scale", bench.at, False)


def test_an_engine_describes_itself(bench: Bench) -> None:
    engine, trt = bench.engine, bench.trt
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert names == ["x", "shift", "total"]
    assert engine.get_tensor_mode("total") is trt.TensorIOMode.OUTPUT
    assert engine.get_tensor_dtype("x") is trt.DataType.FLOAT
    assert engine.get_tensor_shape("x") == (-1, 3)
    assert engine.get_tensor_profile_shape("x", 1) == [(2, 3), (128, 3), (128, 3)]
    assert engine.device_memory_size_v2 == engine.get_device_memory_size_for_profile_v2(1)


@pytest.mark.parametrize(("dtype", "onnx_type"), [(np.float16, TensorProto.FLOAT16), (np.float32, TensorProto.FLOAT)])
def test_an_engine_reads_and_writes_its_dtype(
    cudart: FakeCudart, stream: Any, tmp_path: Path, dtype: Any, onnx_type: int
) -> None:
    assert Bench(cudart, save_graph(tmp_path, onnx_type), stream, dtype).run() == [10, 12, 14, 16, 18, 20]


def test_an_engine_is_replayed_with_what_was_set_when_it_was_captured(bench: Bench) -> None:
    cudart, stream = bench.cudart, bench.stream
    done(cudart.cudaStreamBeginCapture(stream, GLOBAL))
    assert not bench.context.execute_async_v3(int(stream))  # shapes are new: it would allocate
    done(cudart.cudaGraphDestroy(done(cudart.cudaStreamEndCapture(stream))))
    bench.run()
    done(cudart.cudaStreamBeginCapture(stream, GLOBAL))
    assert bench.context.execute_async_v3(int(stream))
    replay = done(cudart.cudaGraphInstantiate(done(cudart.cudaStreamEndCapture(stream)), 0))
    assert bench.context.set_tensor_address("x", bench.activations)
    bench.put("x", np.ones(ROWS))
    done(cudart.cudaGraphLaunch(replay, stream))
    done(cudart.cudaStreamSynchronize(stream))
    assert bench.total() == [12.0] * 6


def test_a_run_leaves_nothing_of_its_activation_memory(bench: Bench) -> None:
    bench.cudart.memory(bench.activations, bench.activation_bytes)[:] = 0
    bench.run()
    assert np.isnan(floats(bench.cudart, bench.activations, bench.activation_bytes // 4)).all()


@pytest.mark.parametrize(("tensor", "where"), [("total", "x"), ("total", "activations"), ("x", "activations")])
def test_outputs_and_activations_lie_apart_from_all_else(bench: Bench, tensor: str, where: str) -> None:
    assert bench.context.set_tensor_address(tensor, (bench.at | {"activations": bench.activations})[where])
    with pytest.raises(AssertionError, match="writes"):
        bench.context.execute_async_v3(int(bench.stream))


def test_two_contexts_never_run_at_once_on_one_activation_block(bench: Bench, tmp_path: Path) -> None:
    other = done(bench.cudart.cudaStreamCreateWithFlags(0))
    twin = Bench(bench.cudart, save_graph(tmp_path), other)
    twin.context.set_device_memory(bench.activations, bench.activation_bytes)
    assert bench.context.execute_async_v3(int(bench.stream))
    with pytest.raises(AssertionError, match="races"):
        twin.context.execute_async_v3(int(other))
    done(bench.cudart.cudaStreamSynchronize(bench.stream))
    assert twin.run() == bench.total()


def test_what_is_not_set_or_does_not_fit_is_refused_with_a_text(bench: Bench) -> None:
    context, texts = bench.context, bench.logger.messages
    assert not context.set_tensor_address("x", bench.at["x"] + 4)
    assert "not aligned" in texts[-1][1]
    assert not context.set_input_shape("x", (10, 3))
    assert "outside profile 0" in texts[-1][1]
    assert context.set_input_shape("x", (4, 3))  # R = 4 and B = 1 contradict each other
    assert not context.execute_async_v3(int(bench.stream))
    assert "contradict" in texts[-1][1]
    assert context.set_optimization_profile_async(1, int(bench.stream))
    assert context.infer_shapes() == ["x", "shift"]
    assert context.set_input_shape("x", (128, 3))
    assert context.set_input_shape("shift", (64, 3))
    assert not context.execute_async_v3(int(bench.stream))
    assert "bytes of device memory" in texts[-1][1]


def test_a_method_fails_when_told_to(bench: Bench) -> None:
    bench.trt.failures["execute_async_v3"] = "Cuda failure: 700"
    assert bench.context.execute_async_v3(int(bench.stream)) is False
    assert bench.logger.messages[-1] == (bench.trt.Logger.Severity.ERROR, "Cuda failure: 700")
    bench.trt.failures["create_execution_context"] = MemoryError("none left")
    with pytest.raises(MemoryError, match="none left"):
        bench.engine.create_execution_context()


def test_an_engine_that_does_not_fit_is_none_and_the_recorder_knows_why(cudart: FakeCudart, tmp_path: Path) -> None:
    trt = fake_tensorrt(cudart)
    told: list[str] = []

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc, name-defined]
        def report_error(self, code: Any, desc: str) -> bool:
            told.append(desc)
            return False

    logger = Logger()
    loader = trt.Runtime(logger)
    loader.error_recorder = Recorder()
    path, profiles = save_graph(tmp_path), [Profile({"B": (1, 1, 2)})]
    good = fake_engine_bytes(path, profiles, 2, compute_capability=(8, 9))
    engines = [
        b"",
        b"garbage",
        good[:-1],
        fake_engine_bytes(path, profiles, 2, version="11.3.0"),
        fake_engine_bytes(path, profiles, 2, compute_capability=(9, 0)),
        fake_engine_bytes(path, profiles, 2, is_version_compatible=True),
    ]
    assert [loader.deserialize_cuda_engine(data) for data in engines] == [None] * len(engines)
    reasons = ["empty memory", "magicTag", "magicTag", "got 11.3.0", "got compute 9.0", "HostCodeAllowed"]
    assert all(reason in text for reason, text in zip(reasons, told, strict=True))
    assert not logger.messages
    free = cudart.free_bytes
    engine = loader.deserialize_cuda_engine(good)
    assert cudart.free_bytes < free
    del engine
    assert cudart.free_bytes == free


def test_rtx_judges_an_engine_by_its_header(cudart: FakeCudart, tmp_path: Path) -> None:
    trt = fake_tensorrt(cudart, version="1.7.1.116", kind="tensorrt_rtx")
    loader = trt.Runtime(trt.Logger())
    path, profiles = save_graph(tmp_path), [Profile({"B": (1, 1, 2)})]
    made = {
        capability: fake_engine_bytes(
            path, profiles, 2, kind="tensorrt_rtx", version="1.7.1.116", compute_capability=capability
        )
        for capability in (None, (12, 0))
    }
    size = loader.engine_header_size
    assert loader.get_engine_validity(made[None][:size]) == (trt.EngineValidity.VALID, 0)
    unsupported = trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC.value
    assert loader.get_engine_validity(made[12, 0][:size]) == (trt.EngineValidity.INVALID, unsupported)
    engine = loader.deserialize_cuda_engine(made[None])
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert engine.create_execution_context(config) is not None
    call = cudart.since(name="create_execution_context")[0]
    assert call["dynamic_shapes_kernel_specialization_strategy"].name == "EAGER"
    assert not hasattr(fake_tensorrt(cudart), "EngineValidity")
    assert not cudart.live


def test_a_context_with_its_own_memory_gives_it_back(bench: Bench) -> None:
    before = bench.cudart.live
    context = bench.engine.create_execution_context()
    assert bench.cudart.live != before
    del context
    assert bench.cudart.live == before
