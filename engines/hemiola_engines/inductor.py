"""The builder for PyTorch's own compiler, where no TensorRT can be installed: exported programs become packages.

An engine is one AOTInductor package with a model for every profile. A model takes the inputs, the weights and the
places of the outputs, in this order, and writes to those places: Inductor fuses that into the kernels which compute the
outputs, so that nothing is copied. PyTorch is imported only when something is built.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from hemiola_engines.builder import EngineJob, Progress, check_source
from hemiola_engines.errors import BuildError
from hemiola_engines.options import BuildOptions
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.codec import encode
from hemiola_runtime.graphs import STEP_TABLE, GraphFormat, GraphSpec, Precision, TensorSpec
from hemiola_runtime.manifest import Profile

SIGNATURE: Final = "HEMIOLA_SIGNATURE"  # key in the metadata of a model


@dataclass(frozen=True, slots=True)
class Inductor:
    """Builds for the GPU of this machine, or for its CPU if PyTorch finds no GPU."""

    extension: ClassVar[str] = "pt2"
    format: ClassVar[GraphFormat] = "torch"
    keeps_weight_file: ClassVar[bool] = True
    has_profiles: ClassVar[bool] = True

    def version(self) -> str:
        """Version of the installed PyTorch.

        Raises:
            BuildError: none is installed.
        """
        try:
            return importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError as error:
            raise BuildError("torch is not installed. Install it with: pip install 'hemiola[inductor]'") from error

    def check(self, options: BuildOptions, precision: Precision) -> None:
        """Refuse what only TensorRT can do; an optimization level it has too."""
        has_cache = options.timing_cache is not None or options.is_timing_cache_pinned
        if has_cache or options.is_version_compatible or options.compute_capabilities:
            raise BuildError(
                "timing cache, version compatibility and GPU targets are TensorRT's; inductor has none of them, and "
                "builds for the GPU of this machine and this version of PyTorch"
            )

    def target(self, options: BuildOptions) -> tuple[str | None, tuple[str, ...]]:
        """Return the compute capability of this machine's GPU; none if it builds for the CPU."""
        from hemiola_engines.inductor_compile import compute_capability

        self.version()
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise BuildError(f"inductor needs a C++ compiler, and {compiler} is not found. Install g++, or set CXX")
        capability = compute_capability()
        return None, () if capability is None else (capability,)

    def build_engines(
        self, jobs: Sequence[EngineJob], options: BuildOptions, progress: Progress, *, rows_per_image: int
    ) -> None:
        """Compile programs for all their profiles, several at once where there are cores for it.

        By default matrix products are cuBLAS's. Optimization level 4 measures Triton's kernels beside them, which can
        hold what follows the product; level 5 also searches the tiles of all other kernels. Level 0 builds in less
        time what launches the kernels: a captured trajectory does not notice.

        Raises:
            BuildError: a file is not the one that was exported, or PyTorch cannot compile it.
        """
        from hemiola_engines.inductor_compile import compile_engines

        for job in jobs:
            check_source(job.graph, job.source)
        if jobs:
            compile_engines(jobs, options.optimization_level, progress, rows_per_image)


INDUCTOR: Final = Inductor()


def limit_threads(count: int) -> None:
    """Begin a compiling process, before PyTorch is imported: so many threads of Inductor's for itself."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(count)


def model_name(profile: int) -> str:
    """Name the model of a profile within its package."""
    return f"profile_{profile}"


def unfolded(spec: TensorSpec) -> tuple[int | str, ...]:
    """Return the sides of a tensor with those of a table apart: T steps, R rows."""
    return tuple(part for side in spec.shape for part in (("T", "R") if side == STEP_TABLE else (side,)))


def signature(graph: GraphSpec, profile: Profile) -> str:
    """Digest what a model takes and gives, so that one which is not what the manifest says is refused unrun."""
    weights = [[weight.name, weight.dtype, weight.shape] for weight in graph.weights]
    parts = [encode(graph.inputs), weights, encode(graph.outputs), encode(profile)]
    return sha256_of(json.dumps(parts).encode())
