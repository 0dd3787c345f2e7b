"""Build engines from exported graphs and pack a bundle.

Engines that the bundle already holds are built again only if their graph, weights or backend changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hemiola.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("graphs", type=Path, metavar="GRAPHS", help="folder from `hemiola export`")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the bundle, replaced as a whole")
    parser.add_argument("--backend", choices=("onnxruntime",), default="onnxruntime", help="what runs the engines")
    parser.add_argument("--max-batch-size", type=positive, default=8, help="largest number of images in one request")


def run(options: argparse.Namespace) -> int:
    """Build."""
    from hemiola.progress import Bar
    from hemiola_engines.build import build_bundle

    with Bar("build", unit="part") as bar:

        def progress(part: str) -> None:
            bar.stage(part)
            bar.advance()

        manifest = build_bundle(
            options.graphs,
            options.out,
            backend=options.backend,
            max_batch_size=options.max_batch_size,
            progress=progress,
        )
    parity = ", ".join(f"{name} {difference:.1e}" for name, difference in manifest.parity.items())
    sys.stdout.write(f"wrote {options.out}\nrelative L2 against PyTorch: {parity}\n")
    return 0
