"""What tests of the GPU backends need where there is no GPU: fakes in place of the libraries, and bundles for them.

gpu = install_gpu(monkeypatch)                                  # CUDA and its driver; no other library
library = install_library(monkeypatch, gpu)                     # TensorRT, which runs on that CUDA
bundle = tensorrt_bundle(latent.graphs, tmp_path / "bundle")    # from an export; nothing is compared with PyTorch
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Final

import numpy as np
import pytest

from fake_cuda import FakeCudart
from fake_tensorrt import Kind, fake_engine_bytes, fake_tensorrt
from hemiola_engines import build
from hemiola_engines.builder import EngineJob
from hemiola_engines.onnxruntime import ONNXRUNTIME_CUDA
from hemiola_engines.options import BuildOptions
from hemiola_runtime.backends import cuda, tensorrt
from hemiola_runtime.graphs import GraphFormat, Precision
from hemiola_runtime.results import Result

VERSIONS: Final[dict[Kind, str]] = {"tensorrt": "11.4.0", "tensorrt_lean": "11.4.0", "tensorrt_rtx": "1.7.1.116"}

# The fakes run the very graphs in ONNX Runtime, but repack weights, and TensorRT's uses one thread: sums in float32
# may be taken in another order, and six steps multiply the difference.
TOLERANCE: Final = 1e-4  # relative L2


def assert_close(found: Result, expected: Result) -> None:
    """Compare images from the same graphs, drawn by another backend or cut into engines at another place."""
    assert np.linalg.norm(found.latents - expected.latents) < TOLERANCE * np.linalg.norm(expected.latents)
    assert np.abs(found.images.astype(int) - expected.images.astype(int)).max() <= 1


def install_driver(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], Any]) -> None:
    """Let `load` stand in for `ctypes.CDLL` where the driver is probed."""
    monkeypatch.setattr(cuda, "ctypes", SimpleNamespace(CDLL=load, c_uint8=ctypes.c_uint8))


def install_gpu(monkeypatch: pytest.MonkeyPatch, **machine: Any) -> FakeCudart:
    """Put a fake of CUDA's runtime in place, with a driver that starts, and no library that builds on it."""
    gpu = FakeCudart(**machine)
    install_driver(monkeypatch, lambda _: SimpleNamespace(cuInit=lambda _: 0))
    monkeypatch.setitem(sys.modules, cuda.BINDINGS, gpu)
    for kind in VERSIONS:
        monkeypatch.setitem(sys.modules, kind, None)
    return gpu


def install_library(
    monkeypatch: pytest.MonkeyPatch, gpu: FakeCudart, kind: Kind = "tensorrt", version: str | None = None
) -> Any:
    """Put a fake of one of TensorRT's libraries in place."""
    library = ModuleType(kind)
    library.__dict__.update(vars(fake_tensorrt(gpu, version=version or VERSIONS[kind], kind=kind)))
    monkeypatch.setitem(sys.modules, kind, library)
    tensorrt._listeners.cache_clear()
    return library


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, answer: Any, *, after: int = 0) -> None:
    """Let one call of a method give `answer`, behind the next `after` calls."""
    original, calls = getattr(owner, method), list[None]()

    def answered(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return answer if len(calls) == after + 1 else original(*args, **kwargs)

    monkeypatch.setattr(owner, method, answered)


@dataclass(frozen=True, slots=True)
class FakeBuilder:
    """Wraps graphs for the fake of a library."""

    extension: ClassVar[str] = "engine"
    format: ClassVar[GraphFormat] = "onnx"
    keeps_weight_file: ClassVar[bool] = False
    has_profiles: ClassVar[bool] = True

    kind: Kind = "tensorrt"
    gpu: str | None = "NVIDIA L40S"  # that the engines are tied to, as the manifest says
    capabilities: tuple[str, ...] = ("8.9",)  # likewise
    compute_capability: tuple[int, int] | None = None  # that they are really for; None for any

    def version(self) -> str:
        return VERSIONS[self.kind]

    def check(self, options: BuildOptions, precision: Precision) -> None: ...

    def target(self, options: BuildOptions) -> tuple[str | None, tuple[str, ...]]:
        return self.gpu, self.capabilities

    def build_engines(
        self, jobs: Sequence[EngineJob], options: BuildOptions, progress: Any, *, rows_per_image: int
    ) -> None:
        made_for: Any = {"kind": self.kind, "version": self.version(), "compute_capability": self.compute_capability}
        is_compatible = options.is_version_compatible
        for job in jobs:
            engine = fake_engine_bytes(
                job.source, job.profiles, rows_per_image, is_version_compatible=is_compatible, **made_for
            )
            job.target.write_bytes(engine)


TENSORRT: Final = FakeBuilder()
RTX: Final = FakeBuilder("tensorrt_rtx", gpu=None, capabilities=("8.6", "8.9"))


def tensorrt_bundle(graphs: Path, folder: Path, builder: FakeBuilder = TENSORRT, **options: Any) -> Path:
    """Build a bundle of fake engines for up to 3 images; `options` are those of a build."""
    return _built(graphs, folder, builder, BuildOptions(**{"backend": builder.kind, "max_batch_size": 3} | options))


def onnxruntime_cuda_bundle(graphs: Path, folder: Path) -> Path:
    """Build a bundle of graphs for ONNX Runtime's CUDA provider."""
    builder = replace(ONNXRUNTIME_CUDA, distribution="onnxruntime")
    return _built(graphs, folder, builder, BuildOptions("onnxruntime_cuda", 3))


def _built(graphs: Path, folder: Path, builder: Any, options: BuildOptions) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.BUILDERS, options.backend, builder)
        patch.setattr(build, "obstacle", lambda _: "its engines are fakes")
        build.build_bundle(graphs, folder, options)
    return folder
