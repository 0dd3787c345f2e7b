"""CUDA through cuda-bindings: memory, streams, events and graphs of GPU 0, and nothing heavier.

CUDA_VISIBLE_DEVICES chooses which GPU that is. Every return value is checked where the call is made, by `Cuda.call`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.artifacts import in_words
from hemiola_runtime.backends import Bound
from hemiola_runtime.errors import CapacityError, DeviceError, HemiolaError
from hemiola_runtime.program import ALIGNMENT

DRIVER: Final = "libcuda.so.1"
BINDINGS: Final = "cuda.bindings.runtime"
NO_DEVICE: Final = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that engines run on.

    Attributes:
        name: as its maker calls it.
        compute_capability: as in "9.0".
        total_bytes: of its memory.
    """

    name: str
    compute_capability: str
    total_bytes: int


def obstacle() -> str | None:
    """Say why no GPU can be used here; None if one can.

    The driver itself is asked, and first: libraries built on it crash where there is none.
    """
    try:
        code = ctypes.CDLL(DRIVER).cuInit(0)
    except OSError:
        return f"this machine has no NVIDIA driver ({DRIVER} is not found)"
    if code == NO_DEVICE:
        return "the NVIDIA driver sees no GPU; CUDA_VISIBLE_DEVICES may hide it"
    if code != 0:
        return f"the NVIDIA driver does not start (cuInit gives {code}); `nvidia-smi` may tell more"
    try:
        runtime: Any = importlib.import_module(BINDINGS)
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error}). Install it with: pip install 'cuda-bindings>=13,<14'"
    status, _ = runtime.cudaGetDeviceCount()  # refuses a driver that is older than itself
    if int(status) != 0:
        return f"CUDA does not start: {_text(runtime, status)}; `nvidia-smi` tells the version of the driver"
    return None


def _text(runtime: Any, error: Any) -> str:
    """Put an error of CUDA's runtime into words."""
    _, text = runtime.cudaGetErrorString(error)
    return f"{text.decode()} ({error.name})"


class Cuda:
    """The calls of CUDA's runtime that Hemiola makes."""

    def __init__(self) -> None:
        self._runtime: Any = importlib.import_module(BINDINGS)

    def __getattr__(self, name: str) -> Any:
        """Return a constant of CUDA's runtime."""
        return getattr(self._runtime, name)

    def call(self, name: str, *arguments: Any) -> Any:
        """Make a call and return what it gives: nothing, one value, or a tuple.

        Raises:
            CapacityError: there is not enough memory.
            DeviceError: it failed otherwise.
        """
        error, *values = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            what = f"{name} failed: {_text(self._runtime, error)}"
            if error == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
                raise CapacityError(f"{what}. Lower max_concurrency, or build with a smaller --max-batch-size")
            raise DeviceError(
                f"{what}. After most faults a process cannot use the GPU any more: start it again; "
                "`nvidia-smi` and the kernel's log may tell what happened"
            )
        return values[0] if len(values) == 1 else tuple(values) or None

    @property
    def gpu(self) -> Gpu:
        """GPU 0."""
        properties = self.call("cudaGetDeviceProperties", 0)
        capability = f"{properties.major}.{properties.minor}"
        return Gpu(properties.name.decode().rstrip("\0"), capability, properties.totalGlobalMem)

    @property
    def free_bytes(self) -> int:
        """Memory of the GPU that is free."""
        free: int = self.call("cudaMemGetInfo")[0]
        return free

    def stream(self) -> Any:
        """Make a stream that does not wait for the default one."""
        return self.call("cudaStreamCreateWithFlags", self.cudaStreamNonBlocking)


class PinnedBuffer:
    """Host memory that the GPU copies from and to by itself."""

    def __init__(self, cuda: Cuda, num_bytes: int) -> None:
        self._cuda = cuda
        try:
            self.address: int = cuda.call("cudaMallocHost", num_bytes)
        except CapacityError as error:
            raise CapacityError(f"{in_words(num_bytes)} of pinned host memory are wanted: {error}") from error
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        self.array: NDArray[np.uint8] = np.frombuffer(memoryview(memory), dtype=np.uint8)

    def close(self) -> None:
        """Free it; `array` must not be used any more."""
        self.array = np.zeros(0, dtype=np.uint8)
        self._cuda.call("cudaFreeHost", self.address)


class CudaWorkspace:
    """A workspace on the GPU: one allocation, which ends in the activation memory that its engines share.

    What the host writes lies at the start and has a mirror in pinned memory, at the same offsets; so no write waits for
    the one before it.

    Attributes:
        address: of the memory, on the device.
        activation_address: of the part that engines use for intermediate tensors, one after the other.
        activation_bytes: of that part.
        stream: on which everything is ordered.
    """

    def __init__(
        self, cuda: Cuda, num_bytes: int, staged_bytes: int, activation_bytes: int, stream: Any | None = None
    ) -> None:
        self._cuda = cuda
        self._results: PinnedBuffer | None = None
        self._timelines: dict[int, CudaTimeline] = {}
        self._bound = contextlib.ExitStack()  # timelines and graphs
        start = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.activation_bytes = activation_bytes
        with contextlib.ExitStack() as owned:  # if one thing cannot be had, those before it are given back
            self.stream: Any = cuda.stream() if stream is None else stream
            if stream is None:
                owned.callback(cuda.call, "cudaStreamDestroy", self.stream)
            self.address: int = self._allocate(start + activation_bytes)
            owned.callback(cuda.call, "cudaFree", self.address)
            self._mirror = PinnedBuffer(cuda, staged_bytes)
            owned.callback(self._mirror.close)
            owned.callback(self._drop_results)
            self.activation_address = self.address + start
            cuda.call("cudaMemsetAsync", self.address, 0, start + activation_bytes, self.stream)
            self.wait()
            owned.callback(self._bound.close)
            self._owned = owned.pop_all()  # freed from the last to the first

    def _allocate(self, num_bytes: int) -> int:
        try:
            address: int = self._cuda.call("cudaMalloc", num_bytes)
        except CapacityError as error:
            free = in_words(self._cuda.free_bytes)
            raise CapacityError(f"a workspace takes {in_words(num_bytes)}, but {free} are free: {error}") from error
        return address

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to the part that has a mirror; a range is written once between two waits."""
        self._mirror.array[offset : offset + len(data)] = data
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = self._mirror.address + offset
        self._cuda.call("cudaMemcpyAsync", self.address + offset, source, len(data), kind, self.stream)

    def write_anywhere(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to a place that has no mirror, and wait; for checks, not for requests."""
        with contextlib.closing(PinnedBuffer(self._cuda, len(data))) as staging:
            staging.array[:] = data
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            self._cuda.call("cudaMemcpyAsync", self.address + offset, staging.address, len(data), kind, self.stream)
            self.wait()

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Wait for all that was enqueued before, then return a copy of some bytes."""
        if self._results is None or len(self._results.array) < num_bytes:
            self._drop_results()
            self._results = PinnedBuffer(self._cuda, num_bytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        source = self.address + offset
        self._cuda.call("cudaMemcpyAsync", self._results.address, source, num_bytes, kind, self.stream)
        self.wait()
        return self._results.array[:num_bytes].copy()

    def _drop_results(self) -> None:
        if self._results is not None:
            dropped, self._results = self._results, None
            dropped.close()

    def timeline(self, num_marks: int) -> CudaTimeline:
        """Make a timeline of events; programs of one length share it, since they run one after the other."""
        if num_marks not in self._timelines:
            made = self._timelines[num_marks] = CudaTimeline(self._cuda, self.stream, num_marks)
            self._bound.callback(made.close)
        return self._timelines[num_marks]

    def capture(self, launches: Sequence[Bound]) -> CudaGraph | None:
        """Run some launches, which lets engines settle, then capture them as one CUDA graph.

        Raises:
            DeviceError: an engine does what no graph can hold, such as waiting.
        """
        for launch in launches:
            launch.enqueue()
        self.wait()
        made = CudaGraph(self._cuda, self.stream, launches)
        self._bound.callback(made.close)
        return made

    def wait(self) -> None:
        """Return when all that was enqueued is done."""
        self._cuda.call("cudaStreamSynchronize", self.stream)

    def release(self) -> None:
        """Wait, then free timelines and captured graphs."""
        self.wait()
        self._timelines.clear()
        self._bound.close()

    def close(self) -> None:
        """Free the memory and all that belongs to the workspace; all of it, whatever fails on the way."""
        with self._owned:
            self.release()


class CudaTimeline:
    """Moments on a stream, as events."""

    def __init__(self, cuda: Cuda, stream: Any, num_marks: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._events: list[Any] = []
        with contextlib.ExitStack() as owned:
            for _ in range(num_marks):
                self._events.append(cuda.call("cudaEventCreateWithFlags", cuda.cudaEventDefault))
                owned.callback(cuda.call, "cudaEventDestroy", self._events[-1])
            self._owned = owned.pop_all()

    def mark(self, index: int) -> None:
        """Note the moment at which all that was enqueued so far is done."""
        self._cuda.call("cudaEventRecord", self._events[index], self._stream)

    def wait(self, index: int) -> None:
        """Return when that moment has come."""
        self._cuda.call("cudaEventSynchronize", self._events[index])

    def elapsed_ms(self, first: int, last: int) -> float:
        """Return the milliseconds between two moments that have come."""
        elapsed: float = self._cuda.call("cudaEventElapsedTime", self._events[first], self._events[last])
        return elapsed

    def close(self) -> None:
        """Destroy the events."""
        self._owned.close()


class CudaGraph:
    """Launches captured as one CUDA graph; shapes and addresses are those of the capture for good.

    Attributes:
        engines: names of those that were captured, in order.
        num_bytes: device memory that the graph takes, as the free memory before and after tells.
    """

    def __init__(self, cuda: Cuda, stream: Any, launches: Sequence[Bound]) -> None:
        self._cuda = cuda
        self._stream = stream
        before = cuda.free_bytes
        # Other threads may allocate and wait meanwhile: they work on other streams.
        cuda.call("cudaStreamBeginCapture", stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        engines = []
        try:
            for launch in launches:
                launch.enqueue()
                engines.append(launch.engine)
        except BaseException:
            self._abandon()
            raise
        graph = cuda.call("cudaStreamEndCapture", stream)
        try:
            self._executable = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.call("cudaGraphDestroy", graph)
        self.engines = tuple(engines)
        with contextlib.ExitStack() as owned:
            owned.callback(self.close)
            cuda.call("cudaGraphUpload", self._executable, stream)
            cuda.call("cudaStreamSynchronize", stream)
            self.num_bytes = max(0, before - cuda.free_bytes)
            owned.pop_all()

    def _abandon(self) -> None:
        """End a capture whose launches failed; the graph, if there is one, is of no use."""
        try:
            graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        except HemiolaError:  # the capture was broken by the call that failed: nothing is left of it
            return
        self._cuda.call("cudaGraphDestroy", graph)

    def enqueue(self) -> None:
        """Launch the graph."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        """Destroy the graph."""
        self._cuda.call("cudaGraphExecDestroy", self._executable)
