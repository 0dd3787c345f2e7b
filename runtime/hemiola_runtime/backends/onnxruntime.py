"""ONNX Runtime on the CPU: engines are sessions, and a launch is one run on a workspace in host memory.

All sessions share one read-only mapping of the weight file. That needs prepacking off: a prepacked weight is a private
copy per session, three sessions three times the memory, for 5 % of speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import onnxruntime as ort

from hemiola_runtime.backends import BackendOptions, Workspace
from hemiola_runtime.backends.host import Addressed, HostWorkspace
from hemiola_runtime.errors import BundleError
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import BackendSpec, EngineSpec
from hemiola_runtime.memory import available_host_bytes
from hemiola_runtime.program import Launch

PROVIDERS: Final = ["CPUExecutionProvider"]
TYPE_NAMES: Final = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
ONNX_TYPES: Final = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # TensorProto.DataType


def obstacle(built: BackendSpec) -> str | None:
    """An ONNX Runtime runs the graphs of any release that is not newer than itself."""
    if _release(ort.__version__) >= _release(built.version):
        return None
    return (
        f"the bundle was built with onnxruntime {built.version}, but {ort.__version__} is installed, which is older. "
        f"Install onnxruntime>={built.version}, or build the bundle again"
    )


def make_backend(built: BackendSpec, options: BackendOptions) -> OnnxRuntime:
    """Make the backend."""
    return OnnxRuntime(options)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


class OnnxRuntime:
    """Loads sessions over one shared mapping of the weights."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options

    @property
    def available_bytes(self) -> int | None:
        """Free host memory."""
        return available_host_bytes()

    @property
    def activation_bytes(self) -> int | None:
        """None: sessions allocate intermediate tensors themselves."""
        return None

    def load(self, spec: EngineSpec, data: bytes) -> OnnxRuntimeEngine:
        """Open a session on the bytes of a graph.

        Raises:
            BundleError: ONNX Runtime refuses it, or its inputs and outputs are not those of the manifest.
        """
        settings = session_options(self._options)
        settings.add_session_config_entry("session.disable_prepacking", "1")
        weights = []
        for weight in spec.graph.weights:
            raw = self._options.weights[weight.offset : weight.offset + weight.num_bytes]
            value = ort.OrtValue.ortvalue_from_numpy(raw.view(weight.dtype).reshape(weight.shape))
            settings.add_initializer(weight.name, value)
            weights.append(value)
        return OnnxRuntimeEngine(spec.graph, open_session(spec.graph, data, settings, PROVIDERS), "cpu", weights)

    def workspace(self, num_bytes: int, staged_bytes: int) -> HostWorkspace:
        """Allocate a workspace in host memory."""
        return HostWorkspace(num_bytes)

    def close(self) -> None:
        """Nothing to free: the mapping of the weights belongs to the bundle."""


def session_options(options: BackendOptions) -> ort.SessionOptions:
    """Return what sessions have in common on every device."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what goes wrong is raised, and told by whoever catches it
    # In the order of the graph. The default order runs all gates of `reuse` before all its sums, so that every
    # product is evicted from the cache of the processor before it is read again: 20 % slower.
    settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(options.folder))
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.num_threads is not None:
        settings.intra_op_num_threads = options.num_threads
    return settings


def open_session(
    graph: GraphSpec, data: bytes, settings: ort.SessionOptions, providers: Sequence[Any]
) -> ort.InferenceSession:
    """Open a session, and see that it reads and writes what the manifest says.

    Raises:
        BundleError: ONNX Runtime refuses it, or its inputs and outputs are not those of the manifest.
    """
    try:
        session = ort.InferenceSession(data, settings, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise BundleError(f"onnxruntime {ort.__version__} refuses the engine `{graph.name}`: {error}") from error
    _check_io(graph, session)
    return session


def _check_io(graph: GraphSpec, session: ort.InferenceSession) -> None:
    for declared, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        mine = [(spec.name, f"tensor({TYPE_NAMES[spec.dtype]})", len(spec.shape)) for spec in declared]
        theirs = [(value.name, value.type, len(value.shape)) for value in found]
        if mine != theirs:
            difference = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), (mine, theirs))
            raise BundleError(
                f"the engine `{graph.name}` is not what the manifest says: {difference[0]} there, {difference[1]} in "
                "the engine. Build the bundle again with `hemiola build`"
            )


class OnnxRuntimeEngine:
    """One session, shared by all requests; sessions may run from many threads at once."""

    def __init__(
        self, graph: GraphSpec, session: ort.InferenceSession, device: str, weights: list[ort.OrtValue]
    ) -> None:
        self.graph = graph
        self.session: ort.InferenceSession | None = session
        self._device = device
        self._weights = weights  # the session reads their memory without owning it

    def bind(self, launch: Launch, workspace: Workspace) -> BoundSession:
        """Fix every input and output to the workspace's memory."""
        assert isinstance(workspace, Addressed)
        assert self.session is not None, "the engine is closed"
        binding = self.session.io_binding()
        for specs, bind in ((self.graph.inputs, binding.bind_input), (self.graph.outputs, binding.bind_output)):
            for spec in specs:
                place = launch.tensors[spec.name]
                bind(
                    name=spec.name,
                    device_type=self._device,
                    device_id=0,
                    element_type=ONNX_TYPES[spec.dtype],
                    shape=place.shape,
                    buffer_ptr=workspace.address + place.offset,
                )
        return BoundSession(self.graph.name, self.session, binding)

    def close(self) -> None:
        """Drop the session."""
        self.session = None


class BoundSession:
    """A session with all its tensors at fixed addresses."""

    def __init__(self, engine: str, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        self._engine = engine
        self._session = session
        self._binding = binding
        self.run_options: ort.RunOptions | None = None

    @property
    def engine(self) -> str:
        """Name of the engine that runs."""
        return self._engine

    def enqueue(self) -> None:
        """Run the session; returns when it has finished."""
        self._session.run_with_iobinding(self._binding, self.run_options)
