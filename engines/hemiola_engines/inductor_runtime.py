"""AOTInductor packages through PyTorch: on a GPU with its allocator, streams and CUDA graphs, else on the CPU.

The weight file is on the device once, and all engines take views of it. Packages hold code for the host, a shared
library, which is loaded into this process: run only bundles whose origin you trust.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from hemiola_engines.inductor import SIGNATURE, model_name, signature, unfolded
from hemiola_runtime.backends import BackendOptions, Bound, Workspace, cuda
from hemiola_runtime.backends.host import Addressed, HostWorkspace
from hemiola_runtime.errors import BundleError, DeviceError
from hemiola_runtime.manifest import BackendSpec, EngineSpec
from hemiola_runtime.memory import available_host_bytes
from hemiola_runtime.program import Launch

RUNS_ALSO: Final[Mapping[str, tuple[str, ...]]] = {"AVX2": ("AVX512",)}  # what runs code compiled for another processor


def obstacle(built: BackendSpec) -> str | None:
    """Packages run on the version of PyTorch that compiled them, and on the GPU they were compiled for."""
    if _release(torch.__version__) != _release(built.version):
        return (
            f"the bundle was built with torch {built.version}, but {torch.__version__} is installed, and its engines "
            f"run on no other version. Install torch=={_release(built.version)}, or build the bundle again"
        )
    if not built.compute_capabilities:
        return None
    if (reason := cuda.obstacle()) is not None:
        return reason
    if not torch.cuda.is_available():
        return f"the engines were built for a GPU, and torch {torch.__version__} finds none. Install one with CUDA"
    gpu = cuda.Cuda().gpu
    if gpu.compute_capability not in built.compute_capabilities:
        return (
            f"the engines were built for compute capability {', '.join(built.compute_capabilities)}, but this is "
            f"{gpu.name} (compute capability {gpu.compute_capability})"
        )
    return None


def _release(version: str) -> str:
    """Drop what tells builds of one release apart, as in 2.11.0+cu130."""
    return version.partition("+")[0]


def make_backend(built: BackendSpec, options: BackendOptions) -> Inductor:
    """Make the backend; `obstacle` has found none."""
    if built.compute_capabilities:
        return Inductor(options, torch.device("cuda", 0), cuda.Cuda())
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)  # of the process: PyTorch has no other
    return Inductor(options, torch.device("cpu"), None)


class Inductor:
    """Loads packages over one copy of the weights.

    Attributes:
        weights: the weight file on the device, as bytes; on a CPU the mapping itself.
    """

    def __init__(self, options: BackendOptions, device: torch.device, runtime: cuda.Cuda | None) -> None:
        self._mapping = options.weights  # on a CPU its memory is read, and not owned
        self._device = device
        self._cuda = runtime
        self.weights = _bytes_at(options.weights.ctypes.data, len(options.weights), torch.device("cpu")).to(device)

    @property
    def available_bytes(self) -> int | None:
        """Free memory of the device."""
        return available_host_bytes() if self._cuda is None else self._cuda.free_bytes

    @property
    def activation_bytes(self) -> int | None:
        """None: engines allocate intermediate tensors with PyTorch."""
        return None

    def load(self, spec: EngineSpec, data: bytes) -> InductorEngine:
        """Load the models of a package.

        Raises:
            BundleError: PyTorch refuses it, it is not what the manifest says, or it is for another processor.
        """
        device_index = -1 if self._cuda is None else 0
        models = []
        with tempfile.TemporaryDirectory(prefix="hemiola-") as folder:
            package = Path(folder) / "engine.pt2"
            package.write_bytes(data)  # the very bytes that were checked; the models unpack them once more
            for i, profile in enumerate(spec.profiles):
                try:
                    # Without PyTorch's own synchronisation between threads, which no CUDA graph can hold.
                    model = AOTIModelPackageLoader(str(package), model_name(i), True, 1, device_index)
                except RuntimeError as error:
                    raise BundleError(
                        f"torch {torch.__version__} refuses the engine `{spec.graph.name}`: {error}"
                    ) from error
                metadata = model.get_metadata()
                if metadata.get(SIGNATURE) != signature(spec.graph, profile):
                    raise BundleError(
                        f"the engine `{spec.graph.name}` is not what the manifest says: its inputs, outputs, weights "
                        "or profiles are others. Build the bundle again with `hemiola build`"
                    )
                _check_processor(spec.graph.name, metadata)
                models.append(model)
        views = [
            _viewed(self.weights[weight.offset : weight.offset + weight.num_bytes], weight.dtype, weight.shape)
            for weight in spec.graph.weights
        ]
        return InductorEngine(spec, models, views, self._device)

    def workspace(self, num_bytes: int, staged_bytes: int) -> Workspace:
        """Allocate a workspace on the device."""
        if self._cuda is not None:
            return InductorWorkspace(self._cuda, num_bytes, staged_bytes)
        return HostWorkspace(num_bytes)

    def close(self) -> None:
        """Free the weights."""
        self.weights = torch.empty(0, dtype=torch.uint8)
        if self._cuda is not None:
            torch.cuda.empty_cache()  # gives freed memory back to the GPU


def _check_processor(engine: str, metadata: Mapping[str, str]) -> None:
    """Refuse code for vectors that this processor does not have, which would end the process."""
    built, _, _ = metadata.get("AOTI_CPU_ISA", "").partition(" ")
    here = torch.backends.cpu.get_cpu_capability()
    if built.startswith("AVX") and here not in (built, *RUNS_ALSO.get(built, ())):
        raise BundleError(
            f"the engine `{engine}` was compiled for a processor with {built}, but this one has {here}. Build the "
            "bundle on this machine"
        )


def _bytes_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """View memory that belongs to someone else as a tensor of bytes."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(_DeviceMemory(address, num_bytes), device=device)


class _DeviceMemory:
    """Device memory as PyTorch, among others, takes it without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # not read-only
            "strides": None,
            "version": 3,
        }


def _viewed(raw: Tensor, dtype: str, shape: Sequence[int]) -> Tensor:
    return raw.view(getattr(torch, dtype)).view(tuple(shape))


class InductorEngine:
    """The models of one engine, one for each profile; shared by all requests.

    Attributes:
        weights: views of the backend's weights.
    """

    def __init__(
        self, spec: EngineSpec, models: list[AOTIModelPackageLoader], weights: list[Tensor], device: torch.device
    ) -> None:
        self.spec = spec
        self.weights = weights
        self._models = models
        self._device = device
        self._turn = threading.Lock()  # a model loads its kernels when it first runs, and may not be entered twice

    def bind(self, launch: Launch, workspace: Workspace) -> BoundModel:
        """Fix every input and output to the workspace's memory."""
        assert isinstance(workspace, Addressed)
        assert self._models, "the engine is closed"
        graph = self.spec.graph
        index = next(i for i, profile in enumerate(self.spec.profiles) if profile.covers(launch.sizes))
        tensors = {}
        for spec in (*graph.inputs, *graph.outputs):
            place = launch.tensors[spec.name]
            address = workspace.address + place.offset
            shape = place.shape
            if len(unfolded(spec)) > len(shape):  # a table, which the model takes as steps and rows
                shape = (launch.sizes["T"], shape[0] // launch.sizes["T"], *shape[1:])
            tensors[spec.name] = _viewed(_bytes_at(address, place.num_bytes, self._device), place.dtype, shape)
        arguments = [
            *(tensors[spec.name] for spec in graph.inputs),
            *self.weights,
            *(tensors[spec.name] for spec in graph.outputs),
        ]
        stream = workspace.torch_stream if isinstance(workspace, InductorWorkspace) else None
        return BoundModel(graph.name, self._models[index], arguments, self._turn, stream)

    def close(self) -> None:
        """Unload the models, and drop the views of the weights."""
        self._models = []
        self.weights = []


class BoundModel:
    """A model with all its tensors at fixed addresses."""

    def __init__(
        self,
        engine: str,
        model: AOTIModelPackageLoader,
        arguments: list[Tensor],
        turn: threading.Lock,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._arguments = arguments
        self._turn = turn
        self._stream = stream

    @property
    def engine(self) -> str:
        """Name of the engine that runs."""
        return self._engine

    def enqueue(self) -> None:
        """Run the model: on a GPU on the workspace's stream, without waiting; on a CPU it is done when this returns.

        Raises:
            DeviceError: it failed, for want of memory or otherwise.
        """
        on_stream: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        try:
            with self._turn, on_stream:
                self._model.run(self._arguments)
        except RuntimeError as error:
            raise DeviceError(f"the engine `{self._engine}` does not run: {error}") from error


class InductorWorkspace(cuda.CudaWorkspace):
    """A workspace on the GPU whose launches PyTorch captures.

    Attributes:
        torch_stream: the workspace's stream, as PyTorch knows it.
    """

    def __init__(self, runtime: cuda.Cuda, num_bytes: int, staged_bytes: int) -> None:
        super().__init__(runtime, num_bytes, staged_bytes, 0)
        self.torch_stream = torch.cuda.ExternalStream(int(self.stream), device=0)
        self._runtime = runtime
        self._pool = torch.cuda.graph_pool_handle()  # one for all programs: of a workspace, only one runs at a time

    def capture(self, launches: Sequence[Bound]) -> TorchGraph | None:
        """Run some launches, which loads their kernels, then capture them as one CUDA graph.

        Raises:
            DeviceError: a model does what no graph can hold.
        """
        for launch in launches:
            launch.enqueue()
        self.wait()
        made = TorchGraph(self._runtime, self.torch_stream, self._pool, launches)
        self._bound.callback(made.close)
        return made


class TorchGraph(cuda.CudaGraph):
    """Launches that PyTorch captured, with the intermediate tensors that they allocate.

    Attributes:
        engines: names of those that were captured, in order.
        num_bytes: device memory that the graph and its intermediate tensors take beyond those captured before.
    """

    def __init__(self, runtime: cuda.Cuda, stream: torch.cuda.Stream, pool: Any, launches: Sequence[Bound]) -> None:
        self._torch_stream = stream
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what the launches have used so far; a captured graph has its own
        before = runtime.free_bytes
        engines = []
        try:
            # Other threads may allocate and wait meanwhile: they work on other streams.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                for launch in launches:
                    launch.enqueue()
                    engines.append(launch.engine)
        except RuntimeError as error:
            raise DeviceError(
                f"PyTorch cannot capture the trajectory as a CUDA graph: {error}. Open the bundle with "
                "cuda_graphs=False to run launch by launch"
            ) from error
        self.engines = tuple(engines)
        self.num_bytes = max(0, before - runtime.free_bytes)

    def enqueue(self) -> None:
        """Launch the graph."""
        with torch.cuda.stream(self._torch_stream):
            self._graph.replay()

    def close(self) -> None:
        """Drop the graph."""
        self._graph.reset()
