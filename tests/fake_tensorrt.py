"""TensorRT's runtime without a GPU: engines are ONNX graphs, run by ONNX Runtime on the memory of a `FakeCudart`.

`fake_tensorrt(cudart)` stands in for the module `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`, as far as one that runs
engines needs it. What TensorRT answers with None or False it answers so too, with a text for the recorder or the
logger; what TensorRT leaves undefined, such as an output in the place of an input, is an AssertionError. Every call
that changes something is in the log of the `FakeCudart`. It knows nothing of building: `fake_engine_bytes` wraps an
ONNX file.
"""

from __future__ import annotations

import enum
import json
import math
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal

import numpy as np
import onnx
import onnxruntime as ort

from fake_cuda import ALIGNMENT, GARBAGE, FakeCudart
from hemiola_runtime.manifest import Profile

Kind = Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"]
Dims = tuple[int | str, ...]
Multiples = Mapping[str, Sequence[Any]]  # symbol → another, and how often it holds that

MAGIC: Final = b"fakeTRT\0"
HEADER: Final = struct.Struct("<8s16s16sBB?xII12x")  # magic, kind, version, compute capability, compatible, JSON, ONNX
NO_MAGIC: Final = (
    "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed. Trying to load an engine created with "
    "incompatible serialization version. Check that the engine was not created using safety runtime"
)


class _Enum(enum.Enum):
    """As pybind11's: members turn into integers, and are none."""

    def __int__(self) -> int:
        return int(self.value)


def _enum(name: str, members: str | dict[str, int]) -> Any:
    make: Any = _Enum
    return make(name, members, start=0)  # `start` counts names only


Severity: Final = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
TensorIOMode: Final = _enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation: Final = _enum("TensorLocation", "DEVICE HOST")
DataType: Final = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64")
AllocationStrategy: Final = _enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
Specialization: Final = _enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")
CudaGraphStrategy: Final = _enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
EngineValidity: Final = _enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
Diagnostics: Final = _enum(
    "EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "MALFORMED_ENGINE": 32}
)
ErrorCode: Final = _enum(
    "ErrorCodeTRT",
    "SUCCESS UNSPECIFIED_ERROR INTERNAL_ERROR INVALID_ARGUMENT INVALID_CONFIG FAILED_ALLOCATION FAILED_INITIALIZATION "
    "FAILED_EXECUTION FAILED_COMPUTATION INVALID_STATE UNSUPPORTED_STATE",
)
TYPES: Final[Mapping[int, tuple[Any, int]]] = {  # of ONNX → TensorRT's, and bytes of one element
    onnx.TensorProto.FLOAT: (DataType.FLOAT, 4),
    onnx.TensorProto.FLOAT16: (DataType.HALF, 2),
    onnx.TensorProto.BFLOAT16: (DataType.BF16, 2),
    onnx.TensorProto.INT64: (DataType.INT64, 8),
    onnx.TensorProto.INT32: (DataType.INT32, 4),
    onnx.TensorProto.BOOL: (DataType.BOOL, 1),
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    mode: Any
    onnx_type: int
    dims: Dims


def _tensors(model: onnx.ModelProto) -> dict[str, _Tensor]:
    found = {}
    for mode, values in ((TensorIOMode.INPUT, model.graph.input), (TensorIOMode.OUTPUT, model.graph.output)):
        for value in values:
            kind = value.type.tensor_type
            dims = tuple(side.dim_param or side.dim_value for side in kind.shape.dim)
            found[value.name] = _Tensor(mode, kind.elem_type, dims)
    return found


def _multiples(model: onnx.ModelProto, rows_per_image: int) -> Multiples:
    """Return which symbols follow from others; how large a token is drawn, a graph that draws one tells."""
    multiples = {"R": ("B", rows_per_image)}
    tensors = _tensors(model)
    if "images" in tensors and "height" in tensors["images"].dims:
        one_token = np.zeros(_resolve(tensors["latents"].dims, {"B": 1, "rows": 1, "columns": 1}), dtype=np.float32)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (drawn,) = session.run(["images"], {"latents": one_token})
        multiples |= {"height": ("rows", drawn.shape[1]), "width": ("columns", drawn.shape[2])}
    return multiples


def _symbols(known: Mapping[str, int], multiples: Multiples) -> dict[str, int]:
    """Add what follows from the known symbols: multiples of others and what they are multiples of, TR is T times R."""
    symbols = dict(known)
    for symbol, (unit, factor) in multiples.items():
        if unit in symbols:
            symbols.setdefault(symbol, symbols[unit] * factor)
        elif symbol in symbols:
            symbols[unit] = symbols[symbol] // factor
    if "T" in symbols and "R" in symbols:
        symbols.setdefault("TR", symbols["T"] * symbols["R"])
    return symbols


def _resolve(dims: Dims, symbols: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(symbols.get(side, -1) if isinstance(side, str) else side for side in dims)


def fake_engine_bytes(
    onnx_path: Path,
    profiles: Sequence[Profile],
    rows_per_image: int = 1,
    *,
    kind: Kind = "tensorrt",
    version: str = "11.4.0",
    compute_capability: tuple[int, int] | None = None,
    is_version_compatible: bool = False,
) -> bytes:
    """Serialize a fake engine, called as the file is.

    Args:
        onnx_path: its weights are copied in; its dynamic sides are called as in a `TensorSpec`.
        profiles: in order; none for a graph without dynamic sides.
        rows_per_image: R / B.
        kind: of the library that loads it; `tensorrt` also stands for what `tensorrt_lean` loads.
        version: of the library that built it.
        compute_capability: of the GPU that it is for; None for any.
        is_version_compatible: whether other versions load it, where host code is allowed.
    """
    model = onnx.load(onnx_path)
    sides = [{symbol: list(side) for symbol, side in profile.sides.items()} for profile in profiles] or [{}]
    multiples = _multiples(model, rows_per_image)
    for profile in sides:
        symbols = _symbols({symbol: side[0] for symbol, side in profile.items()}, multiples)
        for name, tensor in _tensors(model).items():
            if -1 in _resolve(tensor.dims, symbols):
                raise ValueError(f"{name} is {tensor.dims}, but a profile has {', '.join(profile) or 'nothing'}")
    meta = json.dumps({"name": onnx_path.stem, "multiples": multiples, "profiles": sides}).encode()
    graph: bytes = model.SerializeToString(deterministic=True)
    capability = compute_capability or (0, 0)
    header = HEADER.pack(
        MAGIC, kind.encode(), version.encode(), *capability, is_version_compatible, len(meta), len(graph)
    )
    return header + meta + graph


@dataclass(slots=True)
class _Library:
    """What all objects of one module share."""

    cudart: FakeCudart
    kind: Kind
    version: str
    needs_warm_up: bool
    failures: dict[str, str | Exception] = field(default_factory=dict)
    num_contexts: int = 0


class ILogger:
    """Base of loggers."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        self.is_initialized = True  # pybind11 raises a TypeError where a subclass forgets to call this

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    """Keeps what it is told."""

    def __init__(self, min_severity: Any = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity
        self.messages: list[tuple[Any, str]] = []

    def log(self, severity: Any, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            self.messages.append((severity, msg))


class IErrorRecorder:
    """Base of recorders."""

    def __init__(self) -> None:
        self.is_initialized = True

    def report_error(self, code: Any, desc: str) -> bool:
        raise NotImplementedError


class _Object:
    """Has a library, a logger and perhaps a recorder, which it hands on to what is made from it."""

    def __init__(self, library: _Library, logger: ILogger, error_recorder: Any = None) -> None:
        assert getattr(logger, "is_initialized", False), "ILogger.__init__() must be called when overriding __init__"
        self._library = library
        self.logger = logger
        self.error_recorder = error_recorder
        self._said: dict[str, Any] = {}  # goes into every note of the log

    def _report(self, text: str, code: Any = ErrorCode.INVALID_ARGUMENT) -> None:
        if self.error_recorder is not None:
            assert getattr(self.error_recorder, "is_initialized", False), "IErrorRecorder.__init__() was not called"
            self.error_recorder.report_error(code, text)
        else:
            self.logger.log(Severity.ERROR, text)

    def _fails(self, method: str, /, **arguments: Any) -> bool:
        """Log a call, and tell whether it was told to fail."""
        self._library.cudart.note(method, **self._said, **arguments)
        told = self._library.failures.get(method)
        if isinstance(told, Exception):
            raise told
        if told is not None:
            self._report(told, ErrorCode.INTERNAL_ERROR)
        return told is not None


@dataclass(frozen=True, slots=True)
class _Header:
    kind: str
    version: str
    compute_capability: tuple[int, int]
    is_version_compatible: bool
    meta_bytes: int
    graph_bytes: int


def _read_header(data: bytes) -> _Header | None:
    if len(data) < HEADER.size:
        return None
    magic, kind, version, major, minor, is_compatible, meta_bytes, graph_bytes = HEADER.unpack(data[: HEADER.size])
    names = [raw.rstrip(b"\0").decode(errors="replace") for raw in (kind, version)]
    is_mine = magic == MAGIC
    return _Header(names[0], names[1], (major, minor), is_compatible, meta_bytes, graph_bytes) if is_mine else None


class Runtime(_Object):
    """Loads engines."""

    def __init__(self, library: _Library, logger: ILogger) -> None:
        super().__init__(library, logger)
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        data = bytes(serialized_engine)
        if self._fails("deserialize_cuda_engine", num_bytes=len(data)):
            return None
        header = _read_header(data)
        if header is None or HEADER.size + header.meta_bytes + header.graph_bytes != len(data):
            self._report(NO_MAGIC if data else "Cannot deserialize engine with an empty memory buffer.")
            return None
        if (refusal := self._refusal(header)) is not None:
            self._report(refusal[1])
            return None
        cudart = self._library.cudart
        if header.graph_bytes > cudart.free_bytes:
            self._report("Cuda Runtime (out of memory)", ErrorCode.FAILED_ALLOCATION)
            return None
        graph_at = HEADER.size + header.meta_bytes
        return Engine(self, json.loads(data[HEADER.size : graph_at]), data[graph_at:])

    def _refusal(self, header: _Header) -> tuple[Any, str] | None:
        """Return why an engine does not fit this library or this GPU."""
        mine, is_rtx = self._library, self._library.kind == "tensorrt_rtx"
        if (header.kind == "tensorrt_rtx") != is_rtx:
            return Diagnostics.MALFORMED_ENGINE, NO_MAGIC
        if header.is_version_compatible and not self.engine_host_code_allowed:
            return Diagnostics.VERSION_MISMATCH, "IRuntime::getEngineHostCodeAllowed() is false"
        if header.version != mine.version and not header.is_version_compatible:
            return Diagnostics.VERSION_MISMATCH, (
                f"The engine has been created with TensorRT-RTX version {header.version}, but the current runtime is "
                f"{mine.version}. Rebuild the engine"
                if is_rtx
                else "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{mine.version} got {header.version}, please rebuild."
            )
        if mine.kind == "tensorrt_lean" and not header.is_version_compatible:
            return Diagnostics.VERSION_MISMATCH, "Cannot deserialize engine with lean runtime"
        if header.compute_capability not in ((0, 0), mine.cudart.compute_capability):
            wanted, found = mine.cudart.compute_capability, header.compute_capability
            return Diagnostics.UNSUPPORTED_CC, (
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{wanted[0]}.{wanted[1]} got compute {found[0]}.{found[1]}, please rebuild."
            )
        return None


class RtxRuntime(Runtime):
    """Also judges an engine by its first bytes."""

    engine_header_size = HEADER.size

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        if self._fails("get_engine_validity"):
            return EngineValidity.INVALID, 0
        header = _read_header(bytes(buffer))
        refusal = (Diagnostics.MALFORMED_ENGINE, NO_MAGIC) if header is None else self._refusal(header)
        return (EngineValidity.VALID, 0) if refusal is None else (EngineValidity.INVALID, int(refusal[0]))


class RuntimeConfig:
    """How a context is made."""

    def __init__(self, is_rtx: bool) -> None:
        self._strategy: Any = AllocationStrategy.STATIC
        if is_rtx:
            self.cuda_graph_strategy: Any = CudaGraphStrategy.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy: Any = Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any = AllocationStrategy.STATIC) -> None:
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy


class Engine(_Object):
    """One ONNX graph; its session is opened at the first run, and shared by all contexts."""

    def __init__(self, runtime: Runtime, meta: dict[str, Any], graph: bytes) -> None:
        super().__init__(runtime._library, runtime.logger, runtime.error_recorder)
        self.name: str = meta["name"]
        self._said = {"engine": self.name}
        self._multiples: Multiples = meta["multiples"]
        self._profiles: list[dict[str, list[int]]] = meta["profiles"]
        self._graph = graph
        self._session: ort.InferenceSession | None = None
        self._tensors = _tensors(onnx.load_from_string(graph))
        cudart = self._library.cudart
        cudart.reserved_bytes += len(graph)  # its weights

        def release() -> None:
            cudart.reserved_bytes -= len(graph)

        weakref.finalize(self, release).atexit = False

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return max(self.get_device_memory_size_for_profile_v2(i) for i in range(len(self._profiles)))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """As large as all inputs and outputs at the profile's most."""
        shapes = {name: self.get_tensor_profile_shape(name, profile_index)[2] for name in self._tensors}
        return sum(-(-self._num_bytes(name, shape) // ALIGNMENT) * ALIGNMENT for name, shape in shapes.items())

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._tensors[name].mode if name in self._tensors else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[self._tensors[name].onnx_type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return _resolve(self._tensors[name].dims, {})

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        sides = self._profiles[profile_index]
        moments = [{symbol: side[i] for symbol, side in sides.items()} for i in range(3)]
        return [_resolve(self._tensors[name].dims, _symbols(moment, self._multiples)) for moment in moments]

    def _num_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * TYPES[self._tensors[name].onnx_type][1]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self._library.kind == "tensorrt_rtx")

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Context | None:
        config = strategy if isinstance(strategy, RuntimeConfig) else runtime_config
        if config is None:
            config = self.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy or AllocationStrategy.STATIC)
        if self._fails("create_execution_context", **{key.lstrip("_"): value for key, value in vars(config).items()}):
            return None
        own_address = None
        if config._strategy is not AllocationStrategy.USER_MANAGED:
            own_address = self._library.cudart.cudaMalloc(self.device_memory_size_v2)[1]
            if own_address is None:
                self._report("Cuda Runtime (out of memory)", ErrorCode.FAILED_ALLOCATION)
                return None
        return Context(self, own_address)

    def _run(self, places: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        if self._session is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            self._session = ort.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        binding = self._session.io_binding()
        for name, (address, shape) in places.items():
            tensor = self._tensors[name]
            bind = binding.bind_input if tensor.mode is TensorIOMode.INPUT else binding.bind_output
            bind(name, "cpu", 0, tensor.onnx_type, shape, address)
        self._session.run_with_iobinding(binding)


class Context(_Object):
    """Shapes, addresses and activation memory; what is enqueued keeps those of its moment."""

    def __init__(self, engine: Engine, own_address: int | None) -> None:
        super().__init__(engine._library, engine.logger, engine.error_recorder)
        self.engine = engine
        self.active_optimization_profile = 0
        self._library.num_contexts += 1
        self._said = {"engine": engine.name, "context": self._library.num_contexts}
        self._is_user_managed = own_address is None
        self._activations = (own_address or 0, 0 if own_address is None else engine.device_memory_size_v2)
        self._addresses: dict[str, int] = {}
        self._is_warm = False
        self._forget_shapes()
        if own_address:
            weakref.finalize(self, self._library.cudart.cudaFree, own_address).atexit = False

    def _forget_shapes(self) -> None:
        shapes = {name: self.engine.get_tensor_shape(name) for name in self._inputs}
        self._shapes = {name: shape for name, shape in shapes.items() if -1 not in shape}
        self._is_warm = False

    @property
    def _inputs(self) -> list[str]:
        return [name for name, tensor in self.engine._tensors.items() if tensor.mode is TensorIOMode.INPUT]

    def _refuse(self, text: str) -> bool:
        self._report(f"{self.engine.name}: {text}")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        if self._fails("set_optimization_profile_async", profile_index=profile_index, stream=int(stream_handle)):
            return False
        if profile_index not in range(self.engine.num_optimization_profiles):
            return self._refuse(f"there is no profile {profile_index}")
        if self._library.cudart.is_capturing(stream_handle):
            return self._refuse("operation not permitted when stream is capturing")
        self.active_optimization_profile = profile_index
        self._forget_shapes()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        given = tuple(shape)
        if self._fails("set_input_shape", name=name, shape=given):
            return False
        if name not in self._inputs:
            return self._refuse(f"{name} is no input")
        least, _, most = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        fits = len(given) == len(least) and all(a <= side <= b for a, side, b in zip(least, given, most, strict=True))
        if not fits:
            profile = self.active_optimization_profile
            return self._refuse(f"setInputShape: {name} {given} is outside profile {profile}, {least} to {most}")
        self._is_warm = self._is_warm and self._shapes.get(name) == given
        self._shapes[name] = given
        return True

    def _sizes(self) -> dict[str, int] | None:
        """Return the symbols, or None where two inputs disagree on one."""
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for side, size in zip(self.engine._tensors[name].dims, shape, strict=True):
                if isinstance(side, str) and sizes.setdefault(side, size) != size:
                    return None
        symbols = _symbols(sizes, self.engine._multiples)
        base = {symbol: size for symbol, size in symbols.items() if symbol not in (*self.engine._multiples, "TR")}
        return symbols if symbols == symbols | _symbols(base, self.engine._multiples) else None

    def _insufficient(self) -> list[str]:
        missing = [name for name in self._inputs if name not in self._shapes]
        return self._inputs if self._sizes() is None else missing

    def infer_shapes(self) -> list[str]:
        return self._inputs if self._fails("infer_shapes") else self._insufficient()

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        is_known = name not in self._inputs and len(self._shapes) == len(self._inputs)
        return _resolve(self.engine._tensors[name].dims, (self._sizes() or {}) if is_known else {})

    def set_tensor_address(self, name: str, memory: Any) -> bool:
        if self._fails("set_tensor_address", name=name, address=int(memory)):
            return False
        if name not in self.engine._tensors:
            return self._refuse(f"{name} is no input or output")
        if int(memory) % ALIGNMENT:
            return self._refuse(f"setTensorAddress: {name} at {int(memory):#x} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: Any, size: int) -> None:
        if self._fails("set_device_memory", address=int(memory), size=size):
            return
        if not self._is_user_managed or int(memory) % ALIGNMENT:
            self._refuse("setDeviceMemory: the context has its own memory, or the address is not aligned")
            return
        self._activations = (int(memory), size)

    def is_stream_capturable(self, stream: Any) -> bool:
        return True

    def execute_async_v3(self, stream_handle: Any) -> bool:
        cudart, stream = self._library.cudart, int(stream_handle)
        is_captured = cudart.is_capturing(stream)
        if (problem := self._unset(is_captured)) is not None:
            return self._refuse(f"enqueueV3: {problem}")
        places = {name: (self._addresses[name], self.get_tensor_shape(name)) for name in self.engine._tensors}
        addresses, shapes = ({name: place[i] for name, place in places.items()} for i in range(2))
        if self._fails(
            "execute_async_v3", stream=stream, addresses=addresses, shapes=shapes, is_captured=is_captured,
            profile=self.active_optimization_profile, activations=self._activations,
        ):  # fmt: skip
            return False
        spans = {name: (address, self.engine._num_bytes(name, shape)) for name, (address, shape) in places.items()}
        reads = {name: spans.pop(name) for name in self._inputs}
        writes = spans | {"activations": self._activations}
        self._check_overlaps(reads, writes)
        cudart.enqueue_work(
            stream,
            self._kernel(places),
            reads=list(reads.values()),
            writes=list(writes.values()),
            label=self.engine.name,
        )
        self._is_warm = True
        return True

    def _unset(self, is_captured: bool) -> str | None:
        if missing := self._insufficient():
            return f"the shapes of {', '.join(missing)} are not set, or contradict each other: {self._shapes}"
        if missing := [name for name in self.engine._tensors if not self._addresses.get(name)]:
            return f"the addresses of {', '.join(missing)} are not set"
        needed = self.engine.get_device_memory_size_for_profile_v2(self.active_optimization_profile)
        if self._activations[1] < needed:
            return f"{self._activations[1]} bytes of device memory are set, {needed} are needed"
        if is_captured and not self._is_warm and self._library.needs_warm_up:
            return "operation not permitted when stream is capturing: shapes or profile are new, run once before"
        return None

    def _check_overlaps(self, reads: Mapping[str, tuple[int, int]], writes: Mapping[str, tuple[int, int]]) -> None:
        spans = {**reads, **writes}
        for name, (start, size) in writes.items():
            for other, (begin, length) in spans.items():
                is_apart = other == name or start + size <= begin or begin + length <= start
                assert is_apart, f"{self.engine.name} writes {name} where {other} lies"

    def _kernel(self, places: Mapping[str, tuple[int, tuple[int, ...]]]) -> Callable[[], None]:
        engine, activations, cudart = self.engine, self._activations, self._library.cudart

        def run() -> None:
            cudart.memory(*activations, "device").fill(GARBAGE)
            engine._run(places)

        return run


def fake_tensorrt(
    cudart: FakeCudart, *, version: str = "11.4.0", kind: Kind = "tensorrt", needs_warm_up: bool = True
) -> SimpleNamespace:
    """Make what stands in for the module.

    Its `failures` is a dict: a method's name → a text with which it fails from now on, or an exception that it raises.

    Args:
        cudart: whose memory and streams the engines use, and whose log gets the calls.
        version: loads engines of this version only.
        kind: of library.
        needs_warm_up: whether a capture is refused until the context ran once with the same shapes.
    """
    library = _Library(cudart, kind, version, needs_warm_up)
    is_rtx = kind == "tensorrt_rtx"

    class BoundRuntime(RtxRuntime if is_rtx else Runtime):  # type: ignore[misc]
        def __init__(self, logger: ILogger) -> None:
            super().__init__(library, logger)

    only_rtx = {
        "EngineValidity": EngineValidity,
        "EngineInvalidityDiagnostics": Diagnostics,
        "DynamicShapesKernelSpecializationStrategy": Specialization,
        "CudaGraphStrategy": CudaGraphStrategy,
    }
    return SimpleNamespace(
        __name__=kind,
        __version__=version,
        failures=library.failures,
        Logger=Logger,
        ILogger=ILogger,
        IErrorRecorder=IErrorRecorder,
        Runtime=BoundRuntime,
        ICudaEngine=Engine,
        IExecutionContext=Context,
        IRuntimeConfig=RuntimeConfig,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        DataType=DataType,
        ExecutionContextAllocationStrategy=AllocationStrategy,
        ErrorCodeTRT=ErrorCode,
        **(only_rtx if is_rtx else {}),
    )
