"""TensorRT: one code path for `tensorrt`, its lean runtime and `tensorrt_rtx`, which share an API.

Where they differ, what the library offers decides, not its name. TensorRT returns None or False where other libraries
raise; every such value is checked where the call is made, and what the library said about it goes into the exception.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections import deque
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from hemiola_runtime.backends import BackendOptions, Workspace, cuda
from hemiola_runtime.errors import BundleError, DeviceError
from hemiola_runtime.graphs import DType, TensorSpec
from hemiola_runtime.manifest import BackendSpec, EngineSpec, Profile
from hemiola_runtime.program import Launch

logger = logging.getLogger(__name__)

LIBRARIES: Final[Mapping[str, tuple[str, ...]]] = {  # what runs the engines of a backend, the first choice first
    "tensorrt": ("tensorrt", "tensorrt_lean"),
    "tensorrt_rtx": ("tensorrt_rtx",),
}
LEAN: Final = "tensorrt_lean"
DTYPES: Final[Mapping[str, DType]] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}


def obstacle(built: BackendSpec) -> str | None:
    """Say why engines of this kind do not run here; None if they do.

    In this order: driver, library, version, GPU. The driver comes first, since the lean runtime crashes without one.
    """
    if (reason := cuda.obstacle()) is not None:
        return reason
    try:
        library = _library(built)
    except BundleError as error:
        return str(error)
    here = str(library.__version__)
    if not _runs(here, built):
        kind = "or newer" if built.is_version_compatible else "exactly"
        return (
            f"the engines need {built.name} {built.version} {kind}, but {here} is installed. Install that version, or "
            "build the bundle again with this one"
        )
    gpu = cuda.Cuda().gpu
    found = f"{gpu.name} (compute capability {gpu.compute_capability})"
    capabilities = ", ".join(built.compute_capabilities)
    if built.gpu not in (None, gpu.name):
        return f"the engines were built on {built.gpu} ({capabilities}) and run on no other GPU, but this is {found}"
    if built.compute_capabilities and gpu.compute_capability not in built.compute_capabilities:
        return f"the engines were built for compute capability {capabilities}, but this is {found}"
    return None


def _library(built: BackendSpec) -> ModuleType:
    names = [name for name in LIBRARIES[built.name] if name != LEAN or built.is_version_compatible]
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # the wheels of some releases raise at import
            reasons.append(f"{name}: {error}")
    extra = built.name.replace("_", "-")
    raise BundleError(f"no library runs its engines ({'; '.join(reasons)}). pip install 'hemiola[{extra}]'")


def _runs(here: str, built: BackendSpec) -> bool:
    mine, theirs = _release(here), _release(built.version)
    return mine >= theirs if built.is_version_compatible else mine == theirs


def _release(version: str) -> tuple[int, ...]:
    """Engines are bound to the first three numbers of a version; the fourth counts builds of one release."""
    return tuple(int(part) for part in version.split(".")[:3])


def make_backend(built: BackendSpec, options: BackendOptions) -> TensorRT:
    """Make the backend; `obstacle` has found none."""
    return TensorRT(_library(built), cuda.Cuda(), allows_host_code=built.is_version_compatible)


class Messages:
    """What TensorRT says, from whichever thread: all of it to `logging`, errors also to the next exception."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=8)
        self._lock = threading.Lock()

    def add_error(self, text: str) -> None:
        """Keep an error for the next exception."""
        logger.debug("TensorRT: %s", text)
        with self._lock:
            self._errors.append(text.strip())

    def take(self) -> str:
        """Return what was said since the last time, and forget it."""
        with self._lock:
            said = "; ".join(dict.fromkeys(self._errors)) or "TensorRT gave no reason"
            self._errors.clear()
        return said


@functools.cache
def _listeners(library: ModuleType) -> tuple[Any, Any, Messages]:
    """Make what a library reports to: its logger, of which there is one per process, and an error recorder."""
    messages = Messages()

    class Log(library.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                messages.add_error(text)
            elif severity == library.ILogger.Severity.WARNING:
                logger.info("TensorRT: %s", text)

    class Recorder(library.IErrorRecorder):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            library.IErrorRecorder.__init__(self)

        def report_error(self, code: Any, text: str) -> bool:
            messages.add_error(f"{text} ({code})")
            return True  # the call that met it ends here, as with the recorder of NVIDIA's samples

        def num_errors(self) -> int:
            return 0  # they are told at once, none is kept

        def get_error_code(self, index: int) -> Any:
            raise IndexError(index)

        def get_error_desc(self, index: int) -> str:
            raise IndexError(index)

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            pass

    return Log(), Recorder(), messages


class TensorRT:
    """Deserializes engines and owns the device memory they run in."""

    def __init__(self, library: ModuleType, runtime: cuda.Cuda, *, allows_host_code: bool) -> None:
        self.library: Any = library
        self.cuda = runtime
        log, self._recorder, self.messages = _listeners(library)
        try:
            self._runtime: Any = library.Runtime(log)
        except TypeError as error:  # pybind's way of saying that there is none
            raise DeviceError(f"TensorRT {library.__version__} does not start: {self.messages.take()}") from error
        self._runtime.error_recorder = self._recorder
        # A bundle brings no code for the host, unless newer versions shall run it: then the lean runtime is part of it.
        self._runtime.engine_host_code_allowed = allows_host_code
        self._activation_bytes = 0

    @property
    def available_bytes(self) -> int | None:
        """Free memory of the GPU."""
        return self.cuda.free_bytes

    @property
    def activation_bytes(self) -> int | None:
        """What the hungriest of the loaded engines needs; engines of a workspace run one after the other."""
        return self._activation_bytes

    def load(self, spec: EngineSpec, data: bytes) -> TensorRTEngine:
        """Deserialize an engine, and see that it is what the manifest says.

        Raises:
            BundleError: TensorRT refuses it, or its tensors or profiles are others.
        """
        name = spec.graph.name
        self._check_validity(name, data)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BundleError(
                f"TensorRT {self.library.__version__} refuses the engine `{name}`: {self.messages.take()}. "
                "Build the bundle again on this machine with `hemiola build`"
            )
        _check_tensors(spec, engine, self.library)
        _check_profiles(spec, engine)
        needed = (
            engine.get_device_memory_size_for_profile_v2(index) for index in range(engine.num_optimization_profiles)
        )
        self._activation_bytes = max(self._activation_bytes, *needed)
        return TensorRTEngine(spec, engine, self)

    def _check_validity(self, name: str, data: bytes) -> None:
        """Ask TensorRT-RTX, which can tell from the first bytes, whether an engine runs here."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(data)
        if validity == self.library.EngineValidity.INVALID:
            bits = self.library.EngineInvalidityDiagnostics.__members__.items()
            found = ", ".join(name for name, bit in bits if diagnostics & bit.value) or "no diagnosis"
            raise BundleError(
                f"TensorRT-RTX {self.library.__version__} cannot run the engine `{name}` on {self.cuda.gpu.name} "
                f"({found}): {self.messages.take()}. Build the bundle again with `hemiola build`"
            )

    def workspace(self, num_bytes: int, staged_bytes: int) -> TensorRTWorkspace:
        """Allocate a workspace with the activation memory of the hungriest engine."""
        return TensorRTWorkspace(self.cuda, num_bytes, staged_bytes, self._activation_bytes)

    def close(self) -> None:
        """Drop the runtime; engines must be gone by now."""
        self._runtime = None


class TensorRTWorkspace(cuda.CudaWorkspace):
    """A workspace with one execution context for every engine and set of shapes that runs in it."""

    def __init__(self, runtime: cuda.Cuda, num_bytes: int, staged_bytes: int, activation_bytes: int) -> None:
        super().__init__(runtime, num_bytes, staged_bytes, activation_bytes)
        self.contexts: dict[tuple[str, tuple[tuple[int, ...], ...]], Context] = {}
        self._owned.callback(self.contexts.clear)

    def release(self) -> None:
        """Wait, then free timelines, captured graphs and execution contexts."""
        super().release()
        self.contexts.clear()


class Context:
    """An execution context of one engine for one set of shapes, and the addresses that it has by now."""

    def __init__(self, engine: TensorRTEngine, launch: Launch, workspace: TensorRTWorkspace) -> None:
        self._engine = engine
        self._stream = workspace.stream
        self._addresses: dict[str, int] = {}
        self._context = engine.new_context()
        profile = engine.profile_for(launch.sizes)
        if not self._context.set_optimization_profile_async(profile, int(self._stream)):
            raise engine.fault(f"refuses its profile {profile}")
        for spec in engine.spec.graph.inputs:
            shape = launch.tensors[spec.name].shape
            if not self._context.set_input_shape(spec.name, shape):
                raise engine.fault(f"refuses {spec.name} of shape {shape} under {engine.spec.profiles[profile].sides}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise engine.fault(f"cannot tell its shapes ({error})") from error
        if missing:
            raise engine.fault(f"cannot tell the shapes of {', '.join(missing)}")
        for spec in engine.spec.graph.outputs:
            shape, wanted = tuple(self._context.get_tensor_shape(spec.name)), launch.tensors[spec.name].shape
            if shape != wanted:
                raise engine.fault(f"makes {spec.name} of shape {shape}, not {wanted}")
        self._context.set_device_memory(workspace.activation_address, workspace.activation_bytes)
        workspace.wait()

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Run the engine on tensors at these addresses; those that are where they were cost nothing."""
        current = self._addresses
        for name, address in addresses.items():
            if current.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._engine.fault(f"refuses the address {address:#x} of {name}")
                current[name] = address
        if not self._context.execute_async_v3(int(self._stream)):
            raise self._engine.fault("does not run")


class TensorRTEngine:
    """One engine, shared by all workspaces."""

    def __init__(self, spec: EngineSpec, engine: Any, backend: TensorRT) -> None:
        self.spec = spec
        self._engine = engine
        self._backend = backend

    def bind(self, launch: Launch, workspace: Workspace) -> BoundContext:
        """Fix the address of every tensor; makes an execution context for shapes that are new to the workspace.

        Raises:
            DeviceError: TensorRT refuses a shape or a profile.
        """
        assert isinstance(workspace, TensorRTWorkspace)
        assert self._engine is not None, "the engine is closed"
        addresses = {name: workspace.address + place.offset for name, place in launch.tensors.items()}
        shapes = tuple(launch.tensors[spec.name].shape for spec in self.spec.graph.inputs)
        key = (launch.engine, shapes)
        if key not in workspace.contexts:
            workspace.contexts[key] = Context(self, launch, workspace)
        return BoundContext(launch.engine, workspace.contexts[key], addresses)

    def new_context(self) -> Any:
        """Make an execution context whose activation memory is given to it."""
        strategy = self._backend.library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self._engine, "create_runtime_config"):
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
                # At once: kernels that are exchanged in the background would never reach a captured trajectory.
                eager = self._backend.library.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self.fault("gives no execution context")
        if hasattr(context, "nvtx_verbosity"):  # names of layers cost at every launch, and only profilers want them
            context.nvtx_verbosity = self._backend.library.ProfilingVerbosity.NONE
        return context

    def profile_for(self, sizes: Mapping[str, int]) -> int:
        """Return the first profile that covers some sizes; lowering has made sure that there is one."""
        return next(i for i, profile in enumerate(self.spec.profiles) if profile.covers(sizes))

    def fault(self, what: str) -> DeviceError:
        """Return an exception that tells what this engine did, and what TensorRT says about it."""
        return DeviceError(f"the engine `{self.spec.graph.name}` {what}: {self._backend.messages.take()}")

    def close(self) -> None:
        """Drop the engine; its contexts must be gone by now."""
        self._engine = None


class BoundContext:
    """An engine with all its tensors at fixed addresses."""

    def __init__(self, engine: str, context: Context, addresses: Mapping[str, int]) -> None:
        self._name = engine
        self._context = context
        self._addresses = addresses

    @property
    def engine(self) -> str:
        """Name of the engine that runs."""
        return self._name

    def enqueue(self) -> None:
        """Run it on the workspace's stream."""
        self._context.enqueue(self._addresses)


def _check_tensors(spec: EngineSpec, engine: Any, library: Any) -> None:
    """Compare names, directions, dtypes and fixed sides of an engine's tensors with the manifest's."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {tensor.name for tensor in spec.graph.inputs}
    found, wanted = {}, {}
    for name in names:
        is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        dtype = DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name)
        found[name] = (is_input, dtype, tuple(engine.get_tensor_shape(name)))
    for tensor in (*spec.graph.inputs, *spec.graph.outputs):
        wanted[tensor.name] = (tensor.name in inputs, tensor.dtype, _with_unknown(tensor))
    for name in {**wanted, **found}:
        if not _same(found.get(name), wanted.get(name)):
            raise BundleError(
                f"the engine `{spec.graph.name}` is not what the manifest says: its tensor {name} is "
                f"{found.get(name, 'missing')} instead of {wanted.get(name, 'absent')} (is input, dtype, shape). "
                "Build the bundle again with `hemiola build`"
            )


def _with_unknown(tensor: TensorSpec) -> tuple[int, ...]:
    return tuple(side if isinstance(side, int) else -1 for side in tensor.shape)


def _same(found: Any, wanted: Any) -> bool:
    """Compare two descriptions; a side that the manifest leaves open may be fixed by a profile of one size."""
    if found is None or wanted is None or found[:2] != wanted[:2] or len(found[2]) != len(wanted[2]):
        return False
    return all(mine == theirs or theirs == -1 for mine, theirs in zip(found[2], wanted[2], strict=True))


def _check_profiles(spec: EngineSpec, engine: Any) -> None:
    """Make sure that an engine was tuned for the sizes that the manifest says."""
    if engine.num_optimization_profiles != len(spec.profiles):
        raise BundleError(
            f"the engine `{spec.graph.name}` has {engine.num_optimization_profiles} optimization profiles, the "
            f"manifest {len(spec.profiles)}. Build the bundle again with `hemiola build`"
        )
    for index, profile in enumerate(spec.profiles):
        for tensor in spec.graph.inputs:
            for axis, side in enumerate(tensor.shape):
                if side in profile.sides and isinstance(side, str):
                    ranges = engine.get_tensor_profile_shape(tensor.name, index)
                    tuned = tuple(shape[axis] for shape in ranges)
                    _check_range(spec.graph.name, index, tensor.name, tuned, profile, side)


def _check_range(engine: str, index: int, tensor: str, tuned: tuple[int, ...], profile: Profile, side: str) -> None:
    if tuned != profile.sides[side]:
        raise BundleError(
            f"profile {index} of the engine `{engine}` takes {side} = {tuned} of {tensor}, the manifest says "
            f"{profile.sides[side]}. Build the bundle again with `hemiola build`"
        )
