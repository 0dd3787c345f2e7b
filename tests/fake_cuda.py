"""A CUDA runtime without a GPU: device memory lies in host memory, and work waits until somebody waits for it.

`FakeCudart()` stands in for the module `cuda.bindings.runtime`, whose enums and structs it hands on. What a program
notices only on a busy GPU, it notices here always: streams run as late as they may, fresh and freed memory is full of
NaN, and misuse that CUDA leaves undefined is an AssertionError. What CUDA answers with an error, the fake does too.
"""

# ruff: noqa: N802, N803  (CUDA's names)

from __future__ import annotations

import functools
import inspect
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Final, Literal

import numpy as np
from cuda.bindings import runtime
from numpy.typing import NDArray

ALIGNMENT: Final = 256
GARBAGE: Final = 0xFF  # bytes of fresh and of freed memory; NaN as float16, bfloat16 and float32, -1 as int64
WORK_MS: Final = 1.0  # what each piece of work takes on the fake's clock
GRAPH_NODE_BYTES: Final = 1 << 16  # device memory of an instantiated graph, per node
GRAVEYARD: Final = 64  # freed allocations whose addresses are not given out again

Space = Literal["device", "pinned"]
Error: Final = runtime.cudaError_t
Mode: Final = runtime.cudaStreamCaptureMode
Status: Final = runtime.cudaStreamCaptureStatus
WAITS: Final = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


@dataclass(frozen=True, slots=True)
class Call:
    """One call; handles and addresses are integers: `call["stream"]`."""

    name: str
    arguments: dict[str, Any]

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]


@dataclass(frozen=True, slots=True)
class _Use:
    """Bytes that a piece of work reads or writes, and where they must lie."""

    address: int
    num_bytes: int
    space: Space | None
    is_write: bool

    def clashes(self, other: _Use) -> bool:
        is_apart = self.address + self.num_bytes <= other.address or other.address + other.num_bytes <= self.address
        return not is_apart and (self.is_write or other.is_write)


@dataclass(eq=False, slots=True)
class _Work:
    label: str
    run: Callable[[], None]
    uses: tuple[_Use, ...] = ()
    event: int | None = None  # that this marks; such work takes no time
    stream: int = 0
    number: int = 0  # counts all that is ever enqueued
    finished_ms: float | None = None


@dataclass(slots=True)
class _Capture:
    mode: Any
    thread: int
    nodes: list[_Work] = field(default_factory=list)
    is_invalid: bool = False


@dataclass(slots=True)
class _Stream:
    pending: deque[_Work] = field(default_factory=deque)
    capture: _Capture | None = None
    waited: dict[int, int] = field(default_factory=dict)  # other stream → last number there that this one waits for


@dataclass(slots=True)
class _Event:
    has_timing: bool
    last: _Work | None = None
    is_captured: bool = False


@dataclass(slots=True)
class _Allocation:
    memory: NDArray[np.uint8]
    space: Space


class _RefusedError(Exception):
    """Carries the error that a call answers with."""


def _get(registry: dict[int, Any], handle: Any) -> Any:
    assert int(handle) in registry, f"{int(handle):#x} was never made, or is destroyed"
    return registry[int(handle)]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else int(value)


def _api(method: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Make a method that returns its results answer as CUDA does; log it, lock it, let it fail when told to."""
    signature, name = inspect.signature(method), method.__name__
    num_results = {"Any": 1, "tuple[int, int]": 2, "None": 0}[str(signature.return_annotation)]

    @functools.wraps(method)
    def answer(self: Machine, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with self.lock:
            given = list(signature.bind(self, *args, **kwargs).arguments.items())[1:]
            self.note(name, **{key: _plain(value) for key, value in given})
            try:
                self._fail_if_told(name)
                result = method(self, *args, **kwargs)
            except _RefusedError as refused:
                self._last_error = refused.args[0]
                return (self._last_error, *[None] * num_results)
            return (Error.cudaSuccess, *(result if num_results == 2 else [result] * num_results))

    return answer


class Machine:
    """A host that plays a GPU: memory, streams, and what a test may ask.

    Attributes:
        calls: every call so far, in order.
        reserved_bytes: device memory that is taken but was not asked for by name: graphs, weights of engines.
        lock: held during every call, and while work runs.
    """

    def __init__(
        self,
        *,
        compute_capability: tuple[int, int] = (8, 9),
        gpu_name: str = "NVIDIA L40S",
        total_bytes: int = 48 << 30,
        num_devices: int = 1,
        num_multiprocessors: int = 142,
        driver_version: int = 13050,
    ) -> None:
        self.compute_capability = compute_capability
        self.gpu_name = gpu_name
        self.total_bytes = total_bytes
        self.num_devices = num_devices
        self.num_multiprocessors = num_multiprocessors
        self.driver_version = driver_version
        self.calls: list[Call] = []
        self.reserved_bytes = 0
        self.lock = threading.RLock()
        self._device = 0
        self._clock_ms = 0.0
        self._last_handle = 0x1000
        self._last_error: Any = Error.cudaSuccess
        self._failures: dict[str, list[Any]] = {}
        self._graveyard: deque[_Allocation] = deque(maxlen=GRAVEYARD)
        self._allocations: dict[int, _Allocation] = {}
        self._streams: dict[int, _Stream] = {0: _Stream()}
        self._events: dict[int, _Event] = {}
        self._graphs: dict[int, list[_Work]] = {}
        self._graph_execs: dict[int, list[_Work]] = {}

    def note(self, name: str, /, **arguments: Any) -> None:
        """Log a call; fakes of other libraries log theirs here too."""
        with self.lock:
            self.calls.append(Call(name, arguments))

    def mark(self) -> int:
        """Return the present end of the log, for `since` and `names`."""
        return len(self.calls)

    def since(self, mark: int = 0, name: str | None = None) -> list[Call]:
        """Return the calls behind a mark: all, or those of one name."""
        return [call for call in self.calls[mark:] if name in (None, call.name)]

    def names(self, mark: int = 0) -> list[str]:
        """Return the names of the calls behind a mark."""
        return [call.name for call in self.calls[mark:]]

    def fail(self, name: str, error: Any, after: int = 0, times: int = 1) -> None:
        """Make `times` calls of a function fail, behind the next `after`; a wait that fails loses all pending work."""
        self._failures[name] = [None] * after + [error] * times

    @property
    def live(self) -> dict[str, int]:
        """Count what was made and not destroyed, by kind; empty if nothing leaks."""
        spaces = [one.space for one in self._allocations.values()]
        counts = {"device": spaces.count("device"), "pinned": spaces.count("pinned")}
        counts |= {"streams": len(self._streams) - 1, "events": len(self._events)}
        counts |= {"graphs": len(self._graphs), "graph_execs": len(self._graph_execs)}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def live_allocations(self) -> int:
        """Number of live allocations, device and pinned."""
        return len(self._allocations)

    @property
    def num_pending(self) -> int:
        """Pieces of work that are enqueued and have not run."""
        return sum(len(stream.pending) for stream in self._streams.values())

    @property
    def free_bytes(self) -> int:
        """Device memory that is left."""
        return self.total_bytes - self.reserved_bytes - self.live_bytes("device")

    def live_bytes(self, space: Space) -> int:
        """Bytes of the live allocations of one kind."""
        return sum(one.memory.nbytes for one in self._allocations.values() if one.space == space)

    def memory(self, address: int, num_bytes: int, space: Space | None = None) -> NDArray[np.uint8]:
        """Return a view of live bytes as they are now, waiting for nothing; of either kind if none is named."""
        with self.lock:
            for start, one in self._allocations.items():
                if start <= address and address + num_bytes <= start + one.memory.nbytes:
                    assert space in (None, one.space), f"{address:#x} is {one.space} memory, where {space} belongs"
                    return one.memory[address - start : address - start + num_bytes]
        raise AssertionError(f"{num_bytes} bytes at {address:#x} do not lie within one live allocation")

    def is_capturing(self, stream: Any) -> bool:
        """Tell whether work on a stream is being captured."""
        return _get(self._streams, stream).capture is not None

    def enqueue_work(
        self,
        stream: Any,
        closure: Callable[[], None],
        *,
        reads: Sequence[tuple[int, int]] = (),
        writes: Sequence[tuple[int, int]] = (),
        label: str = "work",
    ) -> None:
        """Enqueue or capture a kernel: a function, and the (address, num_bytes) on the device that it touches."""
        uses = [_Use(*span, "device", False) for span in reads] + [_Use(*span, "device", True) for span in writes]
        with self.lock:
            self._submit(stream, _Work(label, closure, tuple(uses)))

    def _handle(self) -> int:
        self._last_handle += 1
        return self._last_handle

    def _check(self, work: _Work) -> None:
        for use in work.uses:
            try:
                self.memory(use.address, use.num_bytes, use.space)
            except AssertionError as error:
                raise AssertionError(f"{work.label}: {error}") from None

    def _submit(self, stream: Any, work: _Work) -> None:
        self._check(work)
        if (capture := _get(self._streams, stream).capture) is not None:
            capture.nodes.append(work)
        else:
            self._enqueue(stream, work)

    def _enqueue(self, handle: Any, work: _Work) -> None:
        stream: _Stream = _get(self._streams, handle)
        work = replace(work, stream=int(handle), number=self._handle())
        others = [other for other in self._streams.values() if other is not stream]
        for pending in (pending for other in others for pending in other.pending):
            is_ordered = pending.number <= stream.waited.get(pending.stream, -1)
            clashes = any(mine.clashes(theirs) for mine in work.uses for theirs in pending.uses)
            assert is_ordered or not clashes, f"{work.label} races with {pending.label}: two streams, neither waits"
        stream.pending.append(work)
        if work.event is not None:
            event = _get(self._events, work.event)
            event.last, event.is_captured = work, False

    def _run_one(self, stream: _Stream) -> None:
        work = stream.pending.popleft()
        self._check(work)
        work.run()
        self._clock_ms += WORK_MS if work.uses else 0.0
        work.finished_ms = self._clock_ms

    def _run_until(self, work: _Work | None) -> None:
        while work is not None and work.finished_ms is None:
            self._run_one(self._streams[work.stream])

    def _drain(self, stream: _Stream) -> None:
        while stream.pending:
            self._run_one(stream)

    def _fail_if_told(self, name: str) -> None:
        if (errors := self._failures.get(name)) and (error := errors.pop(0)) is not None:
            for stream in self._streams.values() if name in WAITS else ():
                for lost in stream.pending:
                    lost.finished_ms = self._clock_ms
                stream.pending.clear()
            raise _RefusedError(error)

    def _refuse_in_capture(self, capturing: _Stream | None = None) -> None:
        """Refuse a call, and spoil the capture: of the stream, or of all that forbid unsafe calls to this thread."""
        for stream in self._streams.values():
            if (capture := stream.capture) is not None:
                is_mine = capture.mode == Mode.cudaStreamCaptureModeThreadLocal
                is_mine &= capture.thread == threading.get_ident()
                forbids = capture.mode == Mode.cudaStreamCaptureModeGlobal or is_mine
                if stream is capturing or (capturing is None and forbids):
                    capture.is_invalid = True
                    raise _RefusedError(Error.cudaErrorStreamCaptureUnsupported)


class FakeCudart(Machine):
    """Stands in for `cuda.bindings.runtime`."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(runtime, name)
        if callable(value) and not isinstance(value, type):
            raise AttributeError(f"the fake has no {name}")
        return value

    @_api
    def cudaGetDeviceCount(self) -> Any:
        return self.num_devices

    @_api
    def cudaSetDevice(self, device: int) -> None:
        self._check_device(device)
        self._device = device

    @_api
    def cudaGetDevice(self) -> Any:
        return self._device

    def _check_device(self, device: int) -> None:
        if device not in range(self.num_devices):
            raise _RefusedError(Error.cudaErrorInvalidDevice)

    @_api
    def cudaGetDeviceProperties(self, device: int) -> Any:
        self._check_device(device)
        major, minor = self.compute_capability
        return SimpleNamespace(
            name=self.gpu_name.encode(),
            major=major,
            minor=minor,
            totalGlobalMem=self.total_bytes,
            multiProcessorCount=self.num_multiprocessors,
        )

    @_api
    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> Any:
        self._check_device(device)
        attributes = {
            runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor: self.compute_capability[0],
            runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor: self.compute_capability[1],
            runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount: self.num_multiprocessors,
        }
        return attributes[attr]

    @_api
    def cudaDriverGetVersion(self) -> Any:
        return self.driver_version

    @_api
    def cudaRuntimeGetVersion(self) -> Any:
        return 13050

    @_api
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.free_bytes, self.total_bytes

    def cudaGetErrorName(self, error: Any) -> tuple[Any, ...]:
        return tuple(runtime.cudaGetErrorName(error))

    def cudaGetErrorString(self, error: Any) -> tuple[Any, ...]:
        return tuple(runtime.cudaGetErrorString(error))

    def cudaGetLastError(self) -> tuple[Any]:
        last, self._last_error = self._last_error, Error.cudaSuccess
        return (last,)

    def _allocate(self, size: int, space: Space) -> int:
        self._refuse_in_capture()
        if space == "device" and size > self.free_bytes:
            raise _RefusedError(Error.cudaErrorMemoryAllocation)
        if not size:
            return 0
        raw = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        self._allocations[raw.ctypes.data + skip] = _Allocation(raw[skip : skip + size], space)
        return int(raw.ctypes.data + skip)

    def _free(self, pointer: Any, space: Space) -> None:
        self._refuse_in_capture()
        if address := int(pointer or 0):
            one: _Allocation = _get(self._allocations, address)
            assert one.space == space, f"{address:#x} is {one.space} memory, freed as {space}"
            whole = _Use(address, one.memory.nbytes, None, True)
            pending = [work for stream in self._streams.values() for work in stream.pending]
            users = [work.label for work in pending if any(whole.clashes(use) for use in work.uses)]
            assert not users, f"{address:#x} is freed while {', '.join(users)} is enqueued: synchronize first"
            one.memory.fill(GARBAGE)
            self._graveyard.append(self._allocations.pop(address))

    @_api
    def cudaMalloc(self, size: int) -> Any:
        return self._allocate(size, "device")

    @_api
    def cudaFree(self, devPtr: Any) -> None:
        self._free(devPtr, "device")

    @_api
    def cudaMallocHost(self, size: int) -> Any:
        return self._allocate(size, "pinned")

    @_api
    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self._allocate(size, "pinned")

    @_api
    def cudaFreeHost(self, ptr: Any) -> None:
        self._free(ptr, "pinned")

    @_api
    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: Any, stream: Any) -> None:
        spaces: dict[str, Space] = {"Device": "device", "Host": "pinned"}
        source, _, target = kind.name.removeprefix("cudaMemcpy").partition("To")  # "Default" names no space
        reads = _Use(int(src), count, spaces.get(source), False)
        writes = _Use(int(dst), count, spaces.get(target), True)

        def copy() -> None:
            self.memory(int(dst), count)[:] = self.memory(int(src), count)

        self._submit(stream, _Work(kind.name, copy, (reads, writes)))

    @_api
    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> None:
        target = _Use(int(devPtr), count, "device", True)
        self._submit(stream, _Work("memset", lambda: self.memory(int(devPtr), count).fill(value), (target,)))

    @_api
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        handle = self._handle()
        self._streams[handle] = _Stream()
        return runtime.cudaStream_t(handle)

    @_api
    def cudaStreamDestroy(self, stream: Any) -> None:
        self._drain(_get(self._streams, stream))
        del self._streams[int(stream)]

    @_api
    def cudaStreamSynchronize(self, stream: Any) -> None:
        self._refuse_in_capture(_get(self._streams, stream))
        self._drain(_get(self._streams, stream))

    @_api
    def cudaDeviceSynchronize(self) -> None:
        for stream in self._streams.values():
            self._refuse_in_capture(stream)
        for stream in self._streams.values():
            self._drain(stream)

    @_api
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        last = _get(self._events, event).last
        if self.is_capturing(stream) or _get(self._events, event).is_captured:
            raise _RefusedError(Error.cudaErrorStreamCaptureIsolation)
        if last is not None:
            waited = _get(self._streams, stream).waited
            waited[last.stream] = max(last.number, waited.get(last.stream, 0))
            self._submit(stream, _Work("wait", functools.partial(self._run_until, last)))

    @_api
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        if int(stream) == 0:
            raise _RefusedError(Error.cudaErrorStreamCaptureUnsupported)
        if self.is_capturing(stream):
            raise _RefusedError(Error.cudaErrorIllegalState)
        _get(self._streams, stream).capture = _Capture(mode, threading.get_ident())

    @_api
    def cudaStreamEndCapture(self, stream: Any) -> Any:
        state: _Stream = _get(self._streams, stream)
        if (capture := state.capture) is None:
            raise _RefusedError(Error.cudaErrorIllegalState)
        if capture.thread != threading.get_ident() and capture.mode != Mode.cudaStreamCaptureModeRelaxed:
            raise _RefusedError(Error.cudaErrorStreamCaptureWrongThread)
        state.capture = None
        if capture.is_invalid:
            raise _RefusedError(Error.cudaErrorStreamCaptureInvalidated)
        handle = self._handle()
        self._graphs[handle] = capture.nodes
        return runtime.cudaGraph_t(handle)

    @_api
    def cudaStreamIsCapturing(self, stream: Any) -> Any:
        if (capture := _get(self._streams, stream).capture) is None:
            return Status.cudaStreamCaptureStatusNone
        return Status.cudaStreamCaptureStatusInvalidated if capture.is_invalid else Status.cudaStreamCaptureStatusActive

    @_api
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        handle = self._handle()
        self._events[handle] = _Event(not flags & runtime.cudaEventDisableTiming)
        return runtime.cudaEvent_t(handle)

    @_api
    def cudaEventDestroy(self, event: Any) -> None:
        _get(self._events, event)
        del self._events[int(event)]

    @_api
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        self._record(event, stream, runtime.cudaEventRecordDefault)

    @_api
    def cudaEventRecordWithFlags(self, event: Any, stream: Any, flags: int) -> None:
        self._record(event, stream, flags)

    def _record(self, event: Any, stream: Any, flags: int) -> None:
        """A plain record within a capture marks no moment of a replay; an external one is a node of the graph."""
        state = _get(self._events, event)
        if self.is_capturing(stream) and flags != runtime.cudaEventRecordExternal:
            state.is_captured, state.last = True, None
        else:
            self._submit(stream, _Work("event", lambda: None, event=int(event)))

    def _waitable(self, event: Any) -> _Event:
        state: _Event = _get(self._events, event)
        if state.is_captured:
            raise _RefusedError(Error.cudaErrorCapturedEvent)
        return state

    @_api
    def cudaEventSynchronize(self, event: Any) -> None:
        self._run_until(self._waitable(event).last)

    @_api
    def cudaEventQuery(self, event: Any) -> None:
        """Each answer `not ready` lets the stream do one more piece of its work."""
        self._refuse_in_capture()
        last = self._waitable(event).last
        if last is not None and last.finished_ms is None:
            self._run_one(self._streams[last.stream])
            raise _RefusedError(Error.cudaErrorNotReady)

    @_api
    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        first, last = self._waitable(start), self._waitable(end)
        if first.last is None or last.last is None or not (first.has_timing and last.has_timing):
            raise _RefusedError(Error.cudaErrorInvalidResourceHandle)
        if first.last.finished_ms is None or last.last.finished_ms is None:
            raise _RefusedError(Error.cudaErrorNotReady)
        return last.last.finished_ms - first.last.finished_ms

    @_api
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        nodes = _get(self._graphs, graph)
        if (num_bytes := len(nodes) * GRAPH_NODE_BYTES) > self.free_bytes:
            raise _RefusedError(Error.cudaErrorMemoryAllocation)
        handle = self._handle()
        self.reserved_bytes += num_bytes
        self._graph_execs[handle] = list(nodes)
        return runtime.cudaGraphExec_t(handle)

    @_api
    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> None:
        _get(self._graph_execs, graphExec)
        self._refuse_in_capture(_get(self._streams, stream))

    @_api
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        self._refuse_in_capture(_get(self._streams, stream))
        for work in _get(self._graph_execs, graphExec):
            self._check(work)
            self._enqueue(stream, work)

    @_api
    def cudaGraphDestroy(self, graph: Any) -> None:
        _get(self._graphs, graph)
        del self._graphs[int(graph)]

    @_api
    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        self.reserved_bytes -= len(_get(self._graph_execs, graphExec)) * GRAPH_NODE_BYTES
        del self._graph_execs[int(graphExec)]
