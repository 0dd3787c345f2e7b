"""Check a bundle: every digest, parity with PyTorch, and that every schedule engages.

With --reference, every forward is compared with PyTorch as well, on the inputs of a real trajectory, and what was
measured is written into the bundle's manifest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola.arguments import load_or_draw

if TYPE_CHECKING:
    from hemiola_runtime.bundle import Bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    parser.add_argument("--reference", metavar="MODEL", help="the model it was made of: compare every forward with it")
    parser.add_argument("--random-weights", action="store_true", help="MODEL is a known architecture, as for export")


def run(options: argparse.Namespace) -> int:
    """Verify."""
    from hemiola_engines.parity import BOUNDS, check_parity, write_parity
    from hemiola_runtime.bundle import open_bundle
    from hemiola_runtime.graph_set import REFERENCE_FILE

    bundle = open_bundle(options.bundle)
    manifest = bundle.manifest
    sys.stdout.write(f"{len(manifest.files)} files have the bytes that were built\n")
    parity = manifest.parity
    if REFERENCE_FILE in manifest.files:
        parity = check_parity(options.bundle)
        for name, difference in parity.items():
            sys.stdout.write(
                f"{name}: ran {bundle.schedule(name).rhythm}\n{'':{len(name)}}  relative L2 against PyTorch "
                f"{difference:.1e} (bound {BOUNDS[manifest.precision]:.0e})\n"
            )
    else:
        sys.stdout.write("there are no reference images: the export was made with --no-reference\n")
        for name, rhythm in _ran(options.bundle).items():
            sys.stdout.write(f"{name}: ran {rhythm}\n")
    if options.reference is not None:
        write_parity(options.bundle, parity, _compare_forwards(options, bundle))
    return 0


def _ran(bundle: Path) -> dict[str, str]:
    """Draw a picture with every schedule; returns what ran."""
    from hemiola_runtime.bench import sample
    from hemiola_runtime.sampler import Sampler

    with Sampler.open(bundle) as sampler:
        return {name: sample(sampler, name, 1).rhythm for name in sampler.schedules}


def _compare_forwards(options: argparse.Namespace, bundle: Bundle) -> dict[str, float]:
    from hemiola.progress import Bar
    from hemiola_export.errors import ExportError
    from hemiola_export.reference import FORWARD_BOUNDS, beyond_bounds, compare_forwards

    precision = bundle.manifest.precision
    with Bar("verify", unit="step") as bar:

        def on_step(step: str) -> None:
            bar.stage(step)
            bar.advance()

        found = compare_forwards(load_or_draw(options.reference, options.random_weights), bundle, on_step=on_step)
    bound = FORWARD_BOUNDS[precision]
    for name, difference in found.items():
        sys.stdout.write(f"one `{name}`: relative L2 against PyTorch {difference:.1e} (bound {bound:.0e})\n")
    if wrong := beyond_bounds(found, precision):
        named = ", ".join(f"`{name}` differs by {difference:.1e}" for name, difference in wrong.items())
        raise ExportError(
            f"{named}, and {precision} explains {bound:.0e}. The backend computes something else: please report it, "
            "with what `hemiola doctor` says"
        )
    return found
