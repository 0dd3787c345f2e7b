"""Measure a bundle here: every schedule, every forward, in one interleaved run."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from hemiola.arguments import check_output_file, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    parser.add_argument("--batch-size", type=positive, default=1, help="images in one request")
    parser.add_argument("--against", default="full", help="schedule that speed-ups refer to")
    parser.add_argument("--repeats", type=positive, default=10, help="requests of each schedule that count")
    parser.add_argument("--threads", type=positive, help="CPU threads of one engine")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything that was measured")


def run(options: argparse.Namespace) -> int:
    """Measure."""
    from hemiola.progress import Bar
    from hemiola_runtime.artifacts import write_text
    from hemiola_runtime.bench import Machine, measure
    from hemiola_runtime.errors import RequestError
    from hemiola_runtime.sampler import Sampler

    check_output_file(options.out)
    with Sampler.open(options.bundle, num_threads=options.threads) as sampler:
        if options.against not in sampler.schedules:
            raise RequestError(f"the bundle has no schedule {options.against!r}; it has {', '.join(sampler.schedules)}")
        names = list(sampler.schedules)
        with Bar("bench", total=len(names) * (options.repeats + 1), unit="request") as bar:
            measured = measure(
                sampler,
                names,
                against=options.against,
                batch_size=options.batch_size,
                repeats=options.repeats,
                on_request=bar.advance,
            )
        backend = sampler.manifest.backend
    write = sys.stdout.write
    write(f"{backend.name} {backend.version}, batch {options.batch_size}, {options.repeats} requests each\n")
    write(f"{'schedule':14}{'median ms':>11}{'p10':>9}{'p90':>9}{'speed-up':>10}{'overhead':>10}\n")
    for name, row in measured.items():
        wall = row.wall
        write(f"{name:14}{wall.median_ms:11.1f}{wall.p10_ms:9.1f}{wall.p90_ms:9.1f}{row.speedup:9.2f}×")
        write(f"{row.overhead:10.1%}\n")
    write(f"\n{'engine':14}{'median ms':>11}{'of full':>9}\n")
    full_ms = measured[options.against].engines["full"].median_ms
    slowest_first = {name: spread for row in measured.values() for name, spread in row.engines.items()}
    for name, spread in sorted(slowest_first.items(), key=lambda item: -item[1].median_ms):
        write(f"{name:14}{spread.median_ms:11.3f}{spread.median_ms / full_ms:9.1%}\n")
    if options.out is not None:
        record = {
            "bundle": str(options.bundle),
            "backend": asdict(backend),
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "machine": asdict(Machine.here()),
            "measured": {name: asdict(row) for name, row in measured.items()},
        }
        write_text(json.dumps(record, indent=1) + "\n", options.out)
    return 0
