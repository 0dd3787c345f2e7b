"""CUDA's calls, memory, streams, events and graphs, on a fake GPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
from cuda.bindings import runtime

from fake_cuda import GRAPH_NODE_BYTES, FakeCudart
from gpu_bundles import install_driver, install_gpu
from hemiola_runtime.backends import cuda
from hemiola_runtime.backends.cuda import Cuda, CudaWorkspace, Gpu, PinnedBuffer
from hemiola_runtime.errors import CapacityError, DeviceError

Error: Final = runtime.cudaError_t
NUM_BYTES: Final = 1000  # of the workspaces here, of which the host writes the first STAGED_BYTES
STAGED_BYTES: Final = 512
ACTIVATION_BYTES: Final = 300


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudart]:
    """A machine on which nothing may be left."""
    machine = install_gpu(monkeypatch)
    yield machine
    assert not machine.live


@pytest.fixture
def calls(cudart: FakeCudart) -> Cuda:
    return Cuda()


@pytest.fixture
def workspace(calls: Cuda) -> Iterator[CudaWorkspace]:
    made = CudaWorkspace(calls, NUM_BYTES, STAGED_BYTES, ACTIVATION_BYTES)
    yield made
    made.close()


class Increment:
    """Adds 1 to the first byte of a workspace, on its stream."""

    def __init__(self, cudart: FakeCudart, workspace: CudaWorkspace, *, engine: str = "increment") -> None:
        self.engine = engine
        self._cudart = cudart
        self._workspace = workspace

    def enqueue(self) -> None:
        span = (self._workspace.address, 1)
        memory = self._cudart.memory(*span)

        def run() -> None:
            memory[0] += 1

        self._cudart.enqueue_work(self._workspace.stream, run, reads=[span], writes=[span], label=self.engine)


class Waits:
    """Waits for its workspace instead of launching."""

    engine = "waits"

    def __init__(self, workspace: CudaWorkspace) -> None:
        self._workspace = workspace

    def enqueue(self) -> None:
        self._workspace.wait()


def bytes_of(*values: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.array(values, dtype=np.uint8)


# calls


def test_a_call_gives_nothing_one_value_or_several(cudart: FakeCudart, calls: Cuda) -> None:
    stream = calls.stream()
    assert calls.call("cudaStreamSynchronize", stream) is None
    assert calls.call("cudaGetDeviceCount") == 1
    assert calls.call("cudaMemGetInfo") == (cudart.total_bytes, cudart.total_bytes)
    calls.call("cudaStreamDestroy", stream)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Error.cudaErrorMemoryAllocation, CapacityError, r"Lower max_concurrency, or build with a smaller --max-batch"),
        (Error.cudaErrorIllegalAddress, DeviceError, r"a process cannot use the GPU any more: start it again"),
        (Error.cudaErrorInvalidValue, DeviceError, "`nvidia-smi` and the kernel's log"),
    ],
)
def test_a_call_that_fails_is_told_with_its_name_and_cudas_text(
    cudart: FakeCudart, calls: Cuda, error: Any, kind: type[Exception], message: str
) -> None:
    text = runtime.cudaGetErrorString(error)[1].decode()
    cudart.fail("cudaMalloc", error)
    with pytest.raises(kind, match=rf"cudaMalloc failed: {text} \({error.name}\)\. .*{message}"):
        calls.call("cudaMalloc", 4)


def test_constants_are_those_of_the_runtime(calls: Cuda) -> None:
    assert calls.cudaStreamNonBlocking == runtime.cudaStreamNonBlocking
    with pytest.raises(AttributeError):
        _ = calls.cudaNoSuchConstant


@pytest.mark.parametrize("name", [b"NVIDIA H200", b"NVIDIA H200\0\0"])
def test_the_gpu_is_told_by_name_capability_and_memory(
    cudart: FakeCudart, calls: Cuda, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    properties = SimpleNamespace(name=name, major=9, minor=0, totalGlobalMem=141 << 30)
    monkeypatch.setattr(cudart, "cudaGetDeviceProperties", lambda device: (Error.cudaSuccess, properties))
    assert calls.gpu == Gpu("NVIDIA H200", "9.0", 141 << 30)


def test_streams_do_not_wait_for_the_default_one(cudart: FakeCudart, calls: Cuda) -> None:
    calls.call("cudaStreamDestroy", calls.stream())
    assert cudart.since(name="cudaStreamCreateWithFlags")[0]["flags"] == runtime.cudaStreamNonBlocking


def test_all_that_is_called_and_used_is_there_in_cudas_runtime() -> None:
    """The fake could have what the real one lacks."""
    calls = [name for name in vars(FakeCudart) if name.startswith("cuda")]
    assert len(calls) > 20
    for name in calls:
        assert callable(getattr(runtime, name))
    assert runtime.cudaDeviceProp().name == b""
    assert int(runtime.cudaStream_t(5)) == 5


# obstacles


def test_a_machine_with_driver_and_bindings_has_no_obstacle(cudart: FakeCudart) -> None:
    assert cuda.obstacle() is None


def load_nothing(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (load_nothing, "no NVIDIA driver (libcuda.so.1 is not found)"),
        (lambda _: SimpleNamespace(cuInit=lambda _: 100), "the NVIDIA driver sees no GPU"),
        (lambda _: SimpleNamespace(cuInit=lambda _: 999), "the NVIDIA driver does not start (cuInit gives 999)"),
    ],
)
def test_a_driver_that_is_missing_or_does_not_start_is_told_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any], reason: str
) -> None:
    def import_module(name: str) -> Any:
        raise AssertionError(f"{name} is imported")

    install_driver(monkeypatch, load)
    monkeypatch.setattr(cuda, "importlib", SimpleNamespace(import_module=import_module))
    assert reason in str(cuda.obstacle())


def test_a_driver_older_than_cuda_is_told_so(cudart: FakeCudart) -> None:
    cudart.fail("cudaGetDeviceCount", Error.cudaErrorInsufficientDriver)
    assert "driver version is insufficient for CUDA runtime version (cudaErrorInsuff" in str(cuda.obstacle())


def test_bindings_that_are_not_installed_are_told_with_their_command(
    cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, cuda.BINDINGS, None)
    assert "pip install 'cuda-bindings>=13,<14'" in str(cuda.obstacle())


# pinned memory


def test_a_pinned_buffer_is_the_memory_at_its_address(cudart: FakeCudart, calls: Cuda) -> None:
    buffer = PinnedBuffer(calls, 5)
    buffer.array[:] = (1, 2, 3, 4, 5)
    assert list(cudart.memory(buffer.address, 5, "pinned")) == [1, 2, 3, 4, 5]
    buffer.close()
    assert buffer.array.size == 0
    assert not cudart.live


def test_pinned_memory_that_cannot_be_had_is_told_with_its_size(cudart: FakeCudart, calls: Cuda) -> None:
    cudart.fail("cudaMallocHost", Error.cudaErrorMemoryAllocation)
    with pytest.raises(CapacityError, match=r"5\.0 kB of pinned host memory are wanted: cudaMallocHost failed: out of"):
        PinnedBuffer(calls, 5000)


# workspaces


def test_a_workspace_is_zeros_and_ends_in_aligned_activation_memory(
    cudart: FakeCudart, workspace: CudaWorkspace
) -> None:
    assert workspace.activation_address == workspace.address + 1024  # 1000 bytes, rounded up to 256
    assert workspace.activation_bytes == ACTIVATION_BYTES
    assert not cudart.memory(workspace.address, 1024 + ACTIVATION_BYTES, "device").any()
    assert cudart.live == {"device": 1, "pinned": 1, "streams": 1}


def test_a_workspace_may_be_without_activation_memory(cudart: FakeCudart, calls: Cuda) -> None:
    made = CudaWorkspace(calls, 256, 256, 0)
    assert cudart.live_bytes("device") == 256
    made.close()


def test_what_was_written_is_read_back_in_order(workspace: CudaWorkspace) -> None:
    workspace.write(0, bytes_of(1, 2, 3))
    workspace.write(3, bytes_of(4))
    assert list(workspace.read(0, 6)) == [1, 2, 3, 4, 0, 0]
    workspace.write(1, bytes_of(9))
    assert list(workspace.read(0, 4)) == [1, 9, 3, 4]
    assert list(workspace.read(2, 2)) == [3, 4]


def test_a_write_waits_for_nothing_and_takes_the_data_at_once(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    mark, data = cudart.mark(), bytes_of(1, 2)
    workspace.write(8, data)
    data[:] = 7
    assert cudart.names(mark) == ["cudaMemcpyAsync"]
    assert list(workspace.read(8, 2)) == [1, 2]


def test_what_was_read_is_a_copy(workspace: CudaWorkspace) -> None:
    workspace.write(0, bytes_of(1))
    first = workspace.read(0, 1)
    workspace.write(0, bytes_of(2))
    workspace.read(0, 1)
    assert first[0] == 1


def test_reading_allocates_only_where_more_is_read_than_ever_before(
    cudart: FakeCudart, workspace: CudaWorkspace
) -> None:
    made = []
    for num_bytes in (10, 10, 4, 20, 10, 20):
        mark = cudart.mark()
        workspace.read(0, num_bytes)
        made.append(cudart.names(mark).count("cudaMallocHost"))
    assert made == [1, 0, 0, 1, 0, 0]
    assert cudart.live["pinned"] == 2


def test_a_larger_buffer_that_cannot_be_had_is_not_missed_later(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    workspace.write(0, bytes_of(5))
    workspace.read(0, 1)
    cudart.fail("cudaMallocHost", Error.cudaErrorMemoryAllocation)
    with pytest.raises(CapacityError):
        workspace.read(0, 100)
    assert workspace.read(0, 100)[0] == 5


def test_bytes_are_written_where_the_host_has_no_mirror(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    workspace.write_anywhere(900, bytes_of(1, 2, 3))
    assert list(cudart.memory(workspace.address + 900, 3)) == [1, 2, 3]  # it has waited
    assert cudart.live["pinned"] == 1
    cudart.fail("cudaMemcpyAsync", Error.cudaErrorInvalidValue)
    with pytest.raises(DeviceError):
        workspace.write_anywhere(900, bytes_of(1))
    assert cudart.live["pinned"] == 1


def test_a_timeline_tells_when_and_how_long(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    timeline, work = workspace.timeline(3), Increment(cudart, workspace)
    timeline.mark(0)
    work.enqueue()
    timeline.mark(1)
    work.enqueue()
    work.enqueue()
    timeline.mark(2)
    timeline.wait(1)
    assert cudart.num_pending == 3
    assert timeline.elapsed_ms(0, 1) == 1.0  # each piece of work takes one on the fake's clock
    with pytest.raises(DeviceError, match="cudaErrorNotReady"):
        timeline.elapsed_ms(0, 2)
    timeline.wait(2)
    assert timeline.elapsed_ms(1, 2) == 2.0
    timeline.mark(0)
    work.enqueue()
    timeline.mark(1)
    timeline.wait(1)
    assert timeline.elapsed_ms(0, 1) == 1.0


def test_programs_of_one_length_share_a_timeline(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    assert workspace.timeline(4) is workspace.timeline(4)
    assert workspace.timeline(4) is not workspace.timeline(6)
    assert cudart.live["events"] == 4 + 6


def test_closing_waits_and_frees_everything(cudart: FakeCudart, calls: Cuda) -> None:
    made = CudaWorkspace(calls, NUM_BYTES, STAGED_BYTES, ACTIVATION_BYTES)
    work = Increment(cudart, made)
    made.timeline(2).mark(0)
    made.capture([work])
    made.read(0, 10)
    work.enqueue()
    made.close()
    assert not cudart.live
    assert cudart.free_bytes == cudart.total_bytes


def test_a_stream_of_others_is_used_and_left_to_them(cudart: FakeCudart, calls: Cuda) -> None:
    stream = calls.stream()
    made = CudaWorkspace(calls, NUM_BYTES, STAGED_BYTES, 0, stream)
    assert made.stream is stream
    made.close()
    assert cudart.live == {"streams": 1}
    calls.call("cudaStreamDestroy", stream)


@pytest.mark.parametrize(
    ("name", "error", "kind", "message"),
    [
        ("cudaStreamCreateWithFlags", Error.cudaErrorUnknown, DeviceError, "cudaStreamCreateWithFlags failed"),
        (
            "cudaMalloc",
            Error.cudaErrorMemoryAllocation,
            CapacityError,
            r"a workspace takes 1\.3 kB, but 51\.5 GB are f",
        ),
        (
            "cudaMallocHost",
            Error.cudaErrorMemoryAllocation,
            CapacityError,
            r"512 B of pinned host memory are wanted",
        ),
        ("cudaMemsetAsync", Error.cudaErrorInvalidValue, DeviceError, "cudaMemsetAsync failed"),
        ("cudaStreamSynchronize", Error.cudaErrorLaunchFailure, DeviceError, "cudaStreamSynchronize failed"),
    ],
)
def test_a_workspace_that_cannot_be_made_leaves_nothing_behind(
    cudart: FakeCudart, calls: Cuda, name: str, error: Any, kind: type[Exception], message: str
) -> None:
    cudart.fail(name, error)
    with pytest.raises(kind, match=message):
        CudaWorkspace(calls, NUM_BYTES, STAGED_BYTES, ACTIVATION_BYTES)
    assert not cudart.live


def test_a_timeline_that_cannot_be_made_leaves_nothing_behind(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    cudart.fail("cudaEventCreateWithFlags", Error.cudaErrorMemoryAllocation, after=3)
    with pytest.raises(CapacityError):
        workspace.timeline(5)
    assert "events" not in cudart.live
    assert workspace.timeline(5) is workspace.timeline(5)


# captured graphs


def test_launches_run_once_to_settle_and_then_at_every_replay(cudart: FakeCudart, workspace: CudaWorkspace) -> None:
    work = Increment(cudart, workspace)
    graph = workspace.capture([work, Increment(cudart, workspace, engine="again")])
    assert graph is not None
    assert workspace.read(0, 1)[0] == 2  # the capture itself runs nothing
    for expected in (4, 6):
        graph.enqueue()
        assert workspace.read(0, 1)[0] == expected
    assert graph.engines == ("increment", "again")
    assert graph.num_bytes == 2 * GRAPH_NODE_BYTES
    assert cudart.live["graph_execs"] == 1
    assert "graphs" not in cudart.live


def test_released_graphs_and_timelines_are_freed_and_the_workspace_goes_on(
    cudart: FakeCudart, workspace: CudaWorkspace
) -> None:
    work = Increment(cudart, workspace)
    workspace.capture([work])
    old = workspace.timeline(3)
    workspace.release()
    assert not {"events", "graph_execs"} & set(cudart.live)
    assert workspace.timeline(3) is not old
    graph = workspace.capture([work])
    assert graph is not None
    before = int(workspace.read(0, 1)[0])
    graph.enqueue()
    assert workspace.read(0, 1)[0] == before + 1


def test_other_threads_may_allocate_and_wait_while_a_trajectory_is_captured(
    cudart: FakeCudart, calls: Cuda, workspace: CudaWorkspace
) -> None:
    class Interrupted(Increment):
        def enqueue(self) -> None:
            super().enqueue()
            thread = threading.Thread(target=lambda: CudaWorkspace(calls, 256, 256, 0).close())
            thread.start()
            thread.join()

    graph = workspace.capture([Interrupted(cudart, workspace)])
    assert graph is not None
    graph.enqueue()
    assert workspace.read(0, 1)[0] == 2
    modes = {call["mode"] for call in cudart.since(name="cudaStreamBeginCapture")}
    assert modes == {runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal}


class FailsAfter:
    """Launches nothing a few times, then fails."""

    engine = "broken"

    def __init__(self, num_runs: int) -> None:
        self._left = num_runs

    def enqueue(self) -> None:
        if not self._left:
            raise DeviceError("the engine does not run")
        self._left -= 1


@pytest.mark.parametrize("num_runs", [0, 1])
def test_a_capture_that_fails_half_way_leaves_the_stream_as_it_was(
    cudart: FakeCudart, workspace: CudaWorkspace, num_runs: int
) -> None:
    work, broken = Increment(cudart, workspace), FailsAfter(num_runs)
    with pytest.raises(DeviceError, match="the engine does not run"):
        workspace.capture([work, broken])
    assert cudart.names().count("cudaStreamBeginCapture") == num_runs
    assert not cudart.is_capturing(workspace.stream)
    assert not {"graphs", "graph_execs"} & set(cudart.live)
    work.enqueue()
    assert workspace.read(0, 1)[0] == 2  # one settling run, and this
    assert workspace.capture([work]) is not None


def test_a_launch_that_waits_spoils_the_capture_and_is_told_what_is_not_allowed(
    cudart: FakeCudart, workspace: CudaWorkspace
) -> None:
    work = Increment(cudart, workspace)
    with pytest.raises(DeviceError, match="cudaStreamSynchronize failed: operation not permitted when stream is captu"):
        workspace.capture([work, Waits(workspace)])
    assert not cudart.is_capturing(workspace.stream)
    work.enqueue()
    assert workspace.read(0, 1)[0] == 2


@pytest.mark.parametrize(
    ("name", "error", "kind"),
    [
        ("cudaStreamBeginCapture", Error.cudaErrorIllegalState, DeviceError),
        ("cudaGraphInstantiate", Error.cudaErrorMemoryAllocation, CapacityError),
        ("cudaGraphUpload", Error.cudaErrorInvalidValue, DeviceError),
    ],
)
def test_a_graph_that_cannot_be_made_leaves_the_stream_as_it_was(
    cudart: FakeCudart, workspace: CudaWorkspace, name: str, error: Any, kind: type[Exception]
) -> None:
    work = Increment(cudart, workspace)
    cudart.fail(name, error)
    with pytest.raises(kind, match=f"{name} failed"):
        workspace.capture([work])
    assert not cudart.is_capturing(workspace.stream)
    graph = workspace.capture([work])
    assert graph is not None
    graph.enqueue()
    assert workspace.read(0, 1)[0] == 3
