"""The builder for ONNX Runtime: its engines are the exported graphs themselves.

ONNX Runtime optimises a graph when a session opens, in a tenth of a second for a dozen blocks. Optimising ahead would
write a private copy of every weight that a fusion touches, so weights could no longer be mapped once for all sessions.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from hemiola_engines.builder import EngineJob, Progress, check_source
from hemiola_engines.errors import BuildError
from hemiola_engines.options import BuildOptions
from hemiola_runtime.graphs import VAE_DECODER, GraphFormat, Precision


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """Builds for one of ONNX Runtime's execution providers.

    Attributes:
        distribution: that holds the provider.
        extra: of Hemiola, that installs it.
        precisions: that the provider runs.
    """

    distribution: str
    extra: str
    precisions: frozenset[str]

    extension: ClassVar[str] = "onnx"
    format: ClassVar[GraphFormat] = "onnx"
    keeps_weight_file: ClassVar[bool] = True
    has_profiles: ClassVar[bool] = False

    def version(self) -> str:
        """Version of the installed ONNX Runtime.

        Raises:
            BuildError: none is installed.
        """
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise BuildError(
                f"{self.distribution} is not installed. Install it with: pip install 'hemiola[{self.extra}]'"
            ) from error

    def check(self, options: BuildOptions, precision: Precision) -> None:
        """Refuse what only TensorRT can do, and precisions that the provider does not run."""
        if precision not in self.precisions:
            raise BuildError(
                f"{options.backend} runs {' and '.join(sorted(self.precisions))}, not {precision}. "
                "Export in one of them, or build for a GPU backend"
            )
        has_cache = options.timing_cache is not None or options.is_timing_cache_pinned
        is_tuned = options.optimization_level is not None or has_cache
        if is_tuned or options.is_version_compatible or options.compute_capabilities:
            raise BuildError(
                f"optimization level, timing cache and GPU targets are TensorRT's; {options.backend} has none"
            )

    def target(self, options: BuildOptions) -> tuple[str | None, tuple[str, ...]]:
        """Graphs are tied to no GPU."""
        return None, ()

    def build_engines(
        self, jobs: Sequence[EngineJob], options: BuildOptions, progress: Progress, *, rows_per_image: int
    ) -> None:
        """Write the engines of some graphs: the graphs.

        Raises:
            BuildError: a file is not the one that was exported, or it needs kernels that ONNX Runtime lacks.
        """
        for job in jobs:
            if job.graph.name == VAE_DECODER and any(weight.dtype == "bfloat16" for weight in job.graph.weights):
                raise BuildError(
                    f"{options.backend} has no bfloat16 kernels for the norms of a VAE. Export with --precision fp16"
                )
            progress(f"engine {job.graph.name}")
            check_source(job.graph, job.source)
            shutil.copyfile(job.source, job.target)


# bfloat16 lacks kernels on the CPU, and float16 is computed there as float32 between casts: slower than float32.
ONNXRUNTIME: Final = OnnxRuntime("onnxruntime", "cpu", frozenset({"fp32"}))
ONNXRUNTIME_CUDA: Final = OnnxRuntime("onnxruntime-gpu", "gpu", frozenset({"fp32", "fp16", "bf16"}))
