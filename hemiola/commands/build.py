"""Build engines from exported graphs and pack a bundle.

Engines that the bundle already holds are built again only if their graph, weights, backend, GPU or options changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hemiola.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    from hemiola_runtime.backends import BACKENDS

    parser.add_argument("graphs", type=Path, metavar="GRAPHS", help="folder from `hemiola export`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the bundle, replaced as a whole")
    parser.add_argument("--backend", choices=tuple(BACKENDS), default="onnxruntime", help="what runs the engines")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), help="one that was exported; default is the only one"
    )
    parser.add_argument(
        "--layout",
        choices=("separate", "segmented"),
        default="separate",
        help="an engine for every forward, or `full` as shallow blocks followed by `deep`, which spares weights",
    )
    parser.add_argument("--max-batch-size", type=positive, default=8, help="largest number of images in one request")
    tensorrt = parser.add_argument_group("TensorRT")
    tensorrt.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        help="0 builds fastest, 5 runs fastest; default is TensorRT's",
    )
    tensorrt.add_argument("--timing-cache", type=Path, metavar="FOLDER", help="keep what was measured for later builds")
    tensorrt.add_argument(
        "--pin-timing-cache", action="store_true", help="take every measurement from the cache, and leave it unchanged"
    )
    tensorrt.add_argument(
        "--version-compatible", action="store_true", help="engines that run with the lean runtime and newer releases"
    )
    tensorrt.add_argument(
        "--compute-capability",
        action="append",
        metavar="X.Y",
        help="a GPU to build for, for tensorrt_rtx; may be given again; default is all from 8.0 on that it knows",
    )


def run(options: argparse.Namespace) -> int:
    """Build."""
    from hemiola.progress import Bar
    from hemiola_engines.build import build_bundle
    from hemiola_engines.options import BuildOptions

    up_to_date: list[str] = []
    with Bar("build") as bar:

        def progress(text: str) -> None:
            bar.stage(text)
            if text.endswith("up to date"):
                up_to_date.append(text)

        built = build_bundle(
            options.graphs,
            options.out,
            BuildOptions(
                backend=options.backend,
                max_batch_size=options.max_batch_size,
                precision=options.precision,
                layout=options.layout,
                optimization_level=options.optimization_level,
                timing_cache=options.timing_cache,
                is_timing_cache_pinned=options.pin_timing_cache,
                is_version_compatible=options.version_compatible,
                compute_capabilities=tuple(options.compute_capability or ()),
            ),
            progress=progress,
        )
    parity = ", ".join(f"{name} {difference:.1e}" for name, difference in built.manifest.parity.items())
    kept = f"; {len(up_to_date)} of {len(built.manifest.engines)} engines were up to date" if up_to_date else ""
    sys.stdout.write(f"wrote {options.out}{kept}\n")
    if built.not_compared is None:
        sys.stdout.write(f"relative L2 against PyTorch: {parity}\n")
    else:
        sys.stdout.write(f"not compared with PyTorch: {built.not_compared}\n")
    return 0
