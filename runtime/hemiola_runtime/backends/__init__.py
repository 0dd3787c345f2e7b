"""Backends: what loads engines and runs them. Imported one by one, when a bundle asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from hemiola_runtime.errors import BundleError
from hemiola_runtime.manifest import BackendSpec, EngineSpec
from hemiola_runtime.program import Launch

if TYPE_CHECKING:  # numpy takes a tenth of a second, and the command line lists backends
    import numpy as np
    from numpy.typing import NDArray


class Timeline(Protocol):
    """Moments on the stream of a workspace, by index; each may be marked again for the next request."""

    def mark(self, index: int) -> None:
        """Note the moment at which all that was enqueued so far is done."""

    def wait(self, index: int) -> None:
        """Return when that moment has come."""

    def elapsed_ms(self, first: int, last: int) -> float:
        """Return the milliseconds between two moments that have come."""


class Bound(Protocol):
    """An engine with all its inputs and outputs at fixed places of one workspace."""

    @property
    def engine(self) -> str:
        """Name of the engine that runs."""

    def enqueue(self) -> None:
        """Run it on the workspace's stream; may return before it has finished. Neither allocates nor waits."""


class Replay(Protocol):
    """Launches that were captured, and run again as one."""

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that run, as they were counted when the launches were captured."""

    @property
    def num_bytes(self) -> int:
        """Device memory that the capture takes."""

    def enqueue(self) -> None:
        """Run them all on the workspace's stream."""


class Workspace(Protocol):
    """The device memory of one request at a time, and the stream on which its work is ordered."""

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to the part that the host writes, behind all that was enqueued before.

        A range is written once between two waits; `data` may change once this returns.
        """

    def write_anywhere(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to a place that no request writes, and wait; for checks."""

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Wait for all that was enqueued before, then return a copy of some bytes."""

    def timeline(self, num_marks: int) -> Timeline:
        """Make a timeline; it belongs to the workspace."""

    def capture(self, launches: Sequence[Bound]) -> Replay | None:
        """Run some launches, then capture them to be run again as one; None where the backend cannot."""

    def wait(self) -> None:
        """Return when all that was enqueued is done."""

    def release(self) -> None:
        """Wait, then free what was made for the launches bound so far; none of them runs again."""

    def close(self) -> None:
        """Free the memory and all that belongs to the workspace."""


class Engine(Protocol):
    """One loaded engine; shared by all requests."""

    def bind(self, launch: Launch, workspace: Workspace) -> Bound:
        """Fix the place of every input and output."""

    def close(self) -> None:
        """Free the engine."""


class Backend(Protocol):
    """What loads engines and owns device memory."""

    @property
    def available_bytes(self) -> int | None:
        """Memory that is free for new work where engines run; None where the system does not say."""

    @property
    def activation_bytes(self) -> int | None:
        """Memory for intermediate tensors that the loaded engines ask each workspace for; None if they allocate it."""

    def load(self, spec: EngineSpec, data: bytes) -> Engine:
        """Load an engine from the bytes of its file, whose digest has been checked."""

    def workspace(self, num_bytes: int, staged_bytes: int) -> Workspace:
        """Allocate a workspace, once all engines are loaded.

        Args:
            num_bytes: all that programs place.
            staged_bytes: of them, from the start, those that are ever written by the host.
        """

    def close(self) -> None:
        """Free what the backend itself holds, when all workspaces and engines are closed."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to run engines.

    Attributes:
        weights: the weight file that all engines share, mapped read-only: bytes whose digest has been checked.
        folder: where that file lies.
        num_threads: of one engine on a CPU; None for one per core.
        built_by: the command that built the bundle, for messages.
    """

    weights: NDArray[np.uint8]
    folder: Path
    num_threads: int | None
    built_by: str


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """Where a backend lives and what installs it.

    Attributes:
        module: has `obstacle(built: BackendSpec) -> str | None` and
            `make_backend(built: BackendSpec, options: BackendOptions) -> Backend`.
        distribution: what it needs.
        extra: of Hemiola, that installs it.
        copies_weights: whether every engine has its own copy of the weights that lie in the weight file.
        alignment: of the address of every tensor, in bytes.
    """

    module: str
    distribution: str
    extra: str
    copies_weights: bool = False
    alignment: int = 1


BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "onnxruntime": BackendEntry("hemiola_runtime.backends.onnxruntime", "onnxruntime", "cpu"),
    "onnxruntime_cuda": BackendEntry(
        "hemiola_runtime.backends.onnxruntime_cuda", "onnxruntime-gpu", "gpu", copies_weights=True
    ),
    "tensorrt": BackendEntry("hemiola_runtime.backends.tensorrt", "tensorrt", "tensorrt", alignment=256),
    "tensorrt_rtx": BackendEntry(
        "hemiola_runtime.backends.tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx", alignment=256
    ),
    # In engines, since it needs torch. Its kernels load vectors, and rely on the alignment they were compiled with.
    "inductor": BackendEntry("hemiola_engines.inductor_runtime", "torch", "inductor", alignment=16),
}


def entry_of(name: str) -> BackendEntry:
    """Return where a backend lives.

    Raises:
        BundleError: there is no such backend.
    """
    if name not in BACKENDS:
        raise BundleError(f"the bundle was built for the backend {name!r}; this runtime has {', '.join(BACKENDS)}")
    return BACKENDS[name]


def obstacle(built: BackendSpec) -> str | None:
    """Say why engines do not run on this machine, and what would mend it; None if they do.

    Raises:
        BundleError: there is no such backend.
    """
    entry = entry_of(built.name)
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        return (
            f"{entry.distribution} cannot be imported ({error}). Install it with: pip install 'hemiola[{entry.extra}]'"
        )
    find: Callable[[BackendSpec], str | None] = module.obstacle
    return find(built)


def open_backend(built: BackendSpec, options: BackendOptions) -> Backend:
    """Import a backend and make sure that it runs here what was built.

    Raises:
        BundleError: no such backend, it is not installed, its version does not fit, or the GPU does not.
    """
    if (reason := obstacle(built)) is not None:
        raise BundleError(f"the bundle cannot run here: {reason}. It was built with: {options.built_by}")
    make: Callable[[BackendSpec, BackendOptions], Backend] = importlib.import_module(
        entry_of(built.name).module
    ).make_backend
    return make(built, options)
