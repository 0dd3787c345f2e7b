"""Check a bundle: every digest, parity with PyTorch, and that every schedule engages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")


def run(options: argparse.Namespace) -> int:
    """Verify."""
    from hemiola_engines.parity import FP32_BOUND, check_parity
    from hemiola_runtime.bundle import open_bundle

    bundle = open_bundle(options.bundle)
    sys.stdout.write(f"{len(bundle.manifest.files)} files have the bytes that were built\n")
    for name, difference in check_parity(options.bundle).items():
        rhythm = bundle.schedule(name).rhythm
        sys.stdout.write(
            f"{name}: ran {rhythm}\n{'':{len(name)}}  relative L2 against PyTorch {difference:.1e}"
            f" (bound {FP32_BOUND:.0e})\n"
        )
    return 0
