"""ONNX Runtime on the CPU: engines are sessions, a workspace is one numpy array, a launch is one run on its memory.

All sessions share one read-only mapping of the weight file. That needs prepacking off: a prepacked weight is a private
copy per session, three sessions three times the memory, for 5 % of speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hemiola_runtime.backends import Array, BackendOptions, Workspace
from hemiola_runtime.errors import BundleError
from hemiola_runtime.manifest import GraphSpec, TensorSpec
from hemiola_runtime.program import ALIGNMENT, Placed

PROVIDERS: Final = ["CPUExecutionProvider"]


def open_backend(built_with: str, options: BackendOptions) -> OnnxRuntime:
    """Make the backend; an ONNX Runtime runs the graphs of any release that is not newer than itself."""
    if _release(ort.__version__) < _release(built_with):
        raise BundleError(
            f"the bundle was built with onnxruntime {built_with}, but {ort.__version__} is installed, which is older. "
            f"Install onnxruntime>={built_with}, or build the bundle again with `hemiola build`"
        )
    return OnnxRuntime(options)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


class OnnxRuntime:
    """Loads sessions over one shared mapping of the weights."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options

    def load(self, graph: GraphSpec, data: bytes) -> OnnxRuntimeEngine:
        """Open a session on the bytes of a graph.

        Raises:
            BundleError: ONNX Runtime refuses it, or its inputs and outputs are not those of the manifest.
        """
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # what goes wrong is raised, and told by whoever catches it
        # In the order of the graph. The default order runs all gates of `reuse` before all its sums, so that every
        # product is evicted from the cache of the processor before it is read again: 20 % slower.
        settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._options.folder)
        )
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if self._options.num_threads is not None:
            settings.intra_op_num_threads = self._options.num_threads
        weights = []
        for weight in graph.weights:
            raw = self._options.weights[weight.offset : weight.offset + weight.num_bytes]
            value = ort.OrtValue.ortvalue_from_numpy(raw.view(weight.dtype).reshape(weight.shape))
            settings.add_initializer(weight.name, value)
            weights.append(value)
        try:
            session = ort.InferenceSession(data, settings, providers=PROVIDERS)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise BundleError(f"onnxruntime {ort.__version__} refuses the engine `{graph.name}`: {error}") from error
        _check_io(graph, session)
        return OnnxRuntimeEngine(graph, session, weights)

    def workspace(self, num_bytes: int) -> HostWorkspace:
        """Allocate a workspace in host memory."""
        return HostWorkspace(num_bytes)


def _check_io(graph: GraphSpec, session: ort.InferenceSession) -> None:
    for declared, found in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
        mine = [
            (spec.name, f"tensor({'float' if spec.dtype == 'float32' else spec.dtype})", len(spec.shape))
            for spec in declared
        ]
        theirs = [(value.name, value.type, len(value.shape)) for value in found]
        if mine != theirs:
            difference = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), (mine, theirs))
            raise BundleError(
                f"the engine `{graph.name}` is not what the manifest says: {difference[0]} there, {difference[1]} in "
                "the engine. Build the bundle again with `hemiola build`"
            )


class OnnxRuntimeEngine:
    """One session, shared by all requests; sessions may run from many threads at once."""

    def __init__(self, graph: GraphSpec, session: ort.InferenceSession, weights: list[ort.OrtValue]) -> None:
        self.graph = graph
        self.session: ort.InferenceSession | None = session
        self._weights = weights  # the session reads their memory without owning it

    def bind(self, tensors: Mapping[str, Placed], workspace: Workspace) -> BoundSession:
        """Fix every input and output to the workspace's memory."""
        assert isinstance(workspace, HostWorkspace)
        assert self.session is not None, "the engine is closed"
        binding = self.session.io_binding()
        for specs, bind in ((self.graph.inputs, binding.bind_input), (self.graph.outputs, binding.bind_output)):
            for spec in specs:
                _bind(bind, spec, tensors[spec.name], workspace)
        return BoundSession(self.graph.name, self.session, binding)

    def close(self) -> None:
        """Drop the session."""
        self.session = None


def _bind(bind: object, spec: TensorSpec, place: Placed, workspace: HostWorkspace) -> None:
    assert callable(bind)
    bind(
        name=spec.name,
        device_type="cpu",
        device_id=0,
        element_type=np.dtype(spec.dtype),
        shape=place.shape,
        buffer_ptr=workspace.address + place.offset,
    )


class BoundSession:
    """A session with all its tensors at fixed addresses."""

    def __init__(self, engine: str, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        self._engine = engine
        self._session = session
        self._binding = binding

    @property
    def engine(self) -> str:
        """Name of the engine that runs."""
        return self._engine

    def enqueue(self) -> None:
        """Run the session; returns when it has finished."""
        self._session.run_with_iobinding(self._binding)


class HostWorkspace:
    """A workspace in host memory. Pages that are never touched cost nothing."""

    def __init__(self, num_bytes: int) -> None:
        self._memory: NDArray[np.uint8] = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
        start = self._memory.ctypes.data
        self._skip = -start % ALIGNMENT
        self.address = start + self._skip

    def _view(self, place: Placed) -> Array:
        raw = self._memory[self._skip + place.offset : self._skip + place.end]
        return raw.view(place.dtype).reshape(place.shape)

    def write(self, place: Placed, values: Array) -> None:
        """Copy an array of the place's shape and dtype to it."""
        self._view(place)[...] = values

    def read(self, place: Placed) -> Array:
        """Return a copy of a tensor."""
        return self._view(place).copy()

    def close(self) -> None:
        """Free the memory; nothing bound to it may run any more."""
        self._memory = np.zeros(0, dtype=np.uint8)
