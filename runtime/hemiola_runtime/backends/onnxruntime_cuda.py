"""ONNX Runtime on a GPU: what runs where no TensorRT can be installed.

All tensors stay on the device: sessions read and write one workspace through bindings. All sessions share one stream,
which ONNX Runtime takes when a session is made; several workspaces take turns on it. Trajectories are not captured.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Final

import numpy as np
import onnxruntime as ort

from hemiola_runtime.backends import BackendOptions, Bound, Workspace, cuda
from hemiola_runtime.backends.onnxruntime import (
    ONNX_TYPES,
    BoundSession,
    OnnxRuntimeEngine,
    open_session,
    session_options,
)
from hemiola_runtime.backends.onnxruntime import obstacle as release_obstacle
from hemiola_runtime.errors import BundleError
from hemiola_runtime.manifest import BackendSpec, EngineSpec
from hemiola_runtime.program import Launch

logger = logging.getLogger(__name__)

PROVIDER: Final = "CUDAExecutionProvider"
RAW_TYPES: Final = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64}


def obstacle(built: BackendSpec) -> str | None:
    """Say why graphs do not run on this machine's GPU; None if they do."""
    _load_libraries()
    if PROVIDER not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} has no {PROVIDER}. Install the one that has, in its place: "
            "pip uninstall --yes onnxruntime onnxruntime-gpu && pip install 'hemiola[gpu]'"
        )
    return cuda.obstacle() or release_obstacle(built)


def _load_libraries() -> None:
    """Load CUDA's libraries from the wheels that hold them, where the system's loader does not look.

    Without them the provider does not start. What cannot be loaded is printed, which is no way to tell a caller.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    logger.debug("onnxruntime.preload_dlls: %s", said.getvalue().strip())


def make_backend(built: BackendSpec, options: BackendOptions) -> OnnxRuntimeCuda:
    """Make the backend; `obstacle` has found none."""
    return OnnxRuntimeCuda(options, cuda.Cuda())


class OnnxRuntimeCuda:
    """Loads sessions that run on one stream of the GPU."""

    def __init__(self, options: BackendOptions, runtime: cuda.Cuda) -> None:
        self._options = options
        self._cuda = runtime
        self._stream = runtime.stream()

    @property
    def available_bytes(self) -> int | None:
        """Free memory of the GPU."""
        return self._cuda.free_bytes

    @property
    def activation_bytes(self) -> int | None:
        """None: sessions allocate intermediate tensors themselves."""
        return None

    def load(self, spec: EngineSpec, data: bytes) -> CudaSession:
        """Open a session on the bytes of a graph; its weights are copied to the GPU.

        Raises:
            BundleError: ONNX Runtime refuses it, or would run it on the CPU.
        """
        settings = session_options(self._options)
        names, values = [], []
        for weight in spec.graph.weights:
            raw = self._options.weights[weight.offset : weight.offset + weight.num_bytes]
            array = raw.view(RAW_TYPES[weight.dtype]).reshape(weight.shape)
            names.append(weight.name)
            values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ONNX_TYPES[weight.dtype]))
        if names:
            settings.add_external_initializers(names, values)
        provider = {"device_id": "0", "user_compute_stream": str(int(self._stream)), "use_tf32": "0"}
        session = open_session(spec.graph, data, settings, [(PROVIDER, provider)])
        if session.get_providers()[0] != PROVIDER:  # a provider that fails to start is left out without an error
            raise BundleError(
                f"onnxruntime {ort.__version__} would run `{spec.graph.name}` on the CPU: its {PROVIDER} does not "
                "start here. The CUDA libraries that it needs may be missing: pip install 'hemiola[gpu]'"
            )
        return CudaSession(spec.graph, session, "cuda", values)

    def workspace(self, num_bytes: int, staged_bytes: int) -> SharedStreamWorkspace:
        """Allocate a workspace on the sessions' stream."""
        return SharedStreamWorkspace(self._cuda, num_bytes, staged_bytes, 0, self._stream)

    def close(self) -> None:
        """Destroy the stream."""
        self._cuda.call("cudaStreamDestroy", self._stream)


class SharedStreamWorkspace(cuda.CudaWorkspace):
    """A workspace whose launches are not captured."""

    def capture(self, launches: Sequence[Bound]) -> None:
        """Run some launches; None, as ONNX Runtime allocates within a run, which no captured graph can hold.

        The run lets it choose its convolutions and grow its arena, which takes seconds, ahead of the first request.
        """
        for launch in launches:
            launch.enqueue()
        self.wait()


class CudaSession(OnnxRuntimeEngine):
    """A session on the GPU, whose runs are enqueued and not waited for."""

    def bind(self, launch: Launch, workspace: Workspace) -> BoundSession:
        """Fix every input and output to the workspace's memory."""
        bound = super().bind(launch, workspace)
        bound.run_options = ort.RunOptions()
        bound.run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return bound
