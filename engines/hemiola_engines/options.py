"""How to build: one object from the command line to the builders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hemiola_runtime.graphs import Precision

Layout = Literal["separate", "segmented"]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build a bundle.

    Attributes:
        backend: a key of `hemiola_engines.build.BUILDERS`.
        max_batch_size: largest number of images in one request.
        precision: which of the exported precisions; None for the only one there is.
        layout: `separate` gives every forward an engine of its own; `segmented` runs `full` as the engine of the
            shallow blocks followed by that of the deep ones, so that no block's weights are in both.
        optimization_level: 0 (fast to build) to 5 (fast to run), for TensorRT and inductor; None for the default.
        timing_cache: TensorRT's measurements of kernels, a folder with one file per GPU and version; None for none.
        is_timing_cache_pinned: read it, never write it, and refuse to measure what it does not hold.
        is_version_compatible: build TensorRT engines that its lean runtime, and newer releases, can run.
        compute_capabilities: that TensorRT-RTX builds for, as in "8.9"; none for all that it knows.
    """

    backend: str
    max_batch_size: int
    precision: Precision | None = None
    layout: Layout = "separate"
    optimization_level: int | None = None
    timing_cache: Path | None = None
    is_timing_cache_pinned: bool = False
    is_version_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
