"""Backends: what loads engines and runs them. Imported one by one, when a bundle asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.errors import BundleError
from hemiola_runtime.manifest import GraphSpec
from hemiola_runtime.program import Placed

Array = NDArray[Any]


class Workspace(Protocol):
    """The device memory of one request at a time, and the stream its launches run on."""

    def write(self, place: Placed, values: Array) -> None:
        """Copy an array of the place's shape and dtype to it."""

    def read(self, place: Placed) -> Array:
        """Wait for all launches, then return a copy of a tensor."""

    def close(self) -> None:
        """Free the memory."""


class Bound(Protocol):
    """An engine with all its inputs and outputs at fixed places of one workspace."""

    @property
    def engine(self) -> str:
        """Name of the engine that runs."""

    def enqueue(self) -> None:
        """Run it on the workspace's stream; may return before it has finished."""


class Engine(Protocol):
    """One loaded engine; shared by all requests."""

    def bind(self, tensors: Mapping[str, Placed], workspace: Workspace) -> Bound:
        """Fix the place of every input and output."""

    def close(self) -> None:
        """Free the engine."""


class Backend(Protocol):
    """What loads engines and owns device memory."""

    def load(self, graph: GraphSpec, data: bytes) -> Engine:
        """Load an engine from the bytes of its file, whose digest has been checked."""

    def workspace(self, num_bytes: int) -> Workspace:
        """Allocate a workspace."""


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """How to run engines.

    Attributes:
        weights: the weight file that all engines share, mapped read-only: bytes whose digest has been checked.
        folder: where that file lies.
        num_threads: of one engine on a CPU; None for one per core.
    """

    weights: NDArray[np.uint8]
    folder: Path
    num_threads: int | None


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """Where a backend lives and what installs it."""

    module: str
    distribution: str
    extra: str


BACKENDS: Final[Mapping[str, BackendEntry]] = {
    "onnxruntime": BackendEntry("hemiola_runtime.backends.onnxruntime", "onnxruntime", "cpu"),
}


def open_backend(name: str, built_with: str, options: BackendOptions) -> Backend:
    """Import a backend and make sure that it runs what `built_with`, a version of it, has built.

    Raises:
        BundleError: no such backend, it is not installed, or its version does not fit.
    """
    if name not in BACKENDS:
        raise BundleError(f"the bundle was built for the backend {name!r}; this runtime has {', '.join(BACKENDS)}")
    entry = BACKENDS[name]
    try:
        module = importlib.import_module(entry.module)
    except ImportError as error:
        raise BundleError(
            f"the bundle needs {entry.distribution}, which cannot be imported ({error}). "
            f"Install it with: pip install 'hemiola[{entry.extra}]'"
        ) from error
    make: Callable[[str, BackendOptions], Backend] = module.open_backend
    return make(built_with, options)
