"""Measure a bundle here: every schedule, every forward, in one interleaved run.

Where trajectories run as captured CUDA graphs, which tell nothing of their parts, all is measured once more launch by
launch, for the times of the engines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola.arguments import check_output_file, positive

if TYPE_CHECKING:
    from hemiola.progress import Bar
    from hemiola_runtime.bench import Measurement
    from hemiola_runtime.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `hemiola build`")
    parser.add_argument("--batch-size", type=positive, default=1, help="images in one request")
    parser.add_argument("--against", default="full", help="schedule that speed-ups refer to")
    parser.add_argument("--repeats", type=positive, default=10, help="requests of each schedule that count")
    parser.add_argument("--threads", type=positive, help="CPU threads of one engine")
    parser.add_argument(
        "--no-cuda-graph", action="store_true", help="launch engine by engine, also where a trajectory can be captured"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything that was measured")


def run(options: argparse.Namespace) -> int:
    """Measure."""
    from hemiola.progress import Bar
    from hemiola_runtime.artifacts import write_text
    from hemiola_runtime.bench import Machine, gpu_of, gpu_state
    from hemiola_runtime.manifest import read_manifest

    check_output_file(options.out)
    with Bar("bench", unit="request") as bar:
        measured = _measure(options, bar, cuda_graphs=not options.no_cuda_graph)
        is_captured = any(row.graph_bytes is not None for row in measured.values())
        launched = _measure(options, bar, cuda_graphs=False) if is_captured else measured
    manifest = read_manifest(options.bundle)
    backend, gpu = manifest.backend, gpu_of(manifest.backend)
    where = "" if gpu is None else f" on {gpu.name}"
    sys.stdout.write(
        f"{backend.name} {backend.version}{where}, batch {options.batch_size}, {options.repeats} requests each\n"
    )
    _write_schedules(measured)
    _write_engines(launched, manifest, options.against)
    if options.out is not None:
        record = {
            "bundle": str(options.bundle),
            "backend": asdict(backend),
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "machine": asdict(Machine.here()),
            "gpu": None if gpu is None else asdict(gpu) | {"state": gpu_state()},
            "measured": {name: asdict(row) for name, row in measured.items()},
            "launch_by_launch": {name: asdict(row) for name, row in launched.items()} if is_captured else None,
        }
        write_text(json.dumps(record, indent=1) + "\n", options.out)
    return 0


def _measure(options: argparse.Namespace, bar: Bar, *, cuda_graphs: bool) -> dict[str, Measurement]:
    from hemiola_runtime.bench import measure
    from hemiola_runtime.errors import RequestError
    from hemiola_runtime.sampler import Sampler

    with Sampler.open(options.bundle, num_threads=options.threads, cuda_graphs=cuda_graphs) as sampler:
        if options.against not in sampler.schedules:
            raise RequestError(f"the bundle has no schedule {options.against!r}; it has {', '.join(sampler.schedules)}")
        return measure(
            sampler,
            list(sampler.schedules),
            against=options.against,
            batch_size=options.batch_size,
            repeats=options.repeats,
            on_request=bar.advance,
        )


def _write_schedules(measured: Mapping[str, Measurement]) -> None:
    from hemiola_runtime.artifacts import in_words

    write = sys.stdout.write
    write(f"{'schedule':14}{'median ms':>11}{'p10':>9}{'p90':>9}{'speed-up':>10}{'overhead':>10}{'busy':>8}\n")
    for name, row in measured.items():
        wall, graph_bytes = row.wall, row.graph_bytes
        graph = "" if graph_bytes is None else f"  one CUDA graph of {in_words(graph_bytes)}"
        write(f"{name:14}{wall.median_ms:11.1f}{wall.p10_ms:9.1f}{wall.p90_ms:9.1f}{row.speedup:9.2f}×")
        write(f"{row.overhead:10.1%}{row.busy:8.1%}{graph}\n")


def _write_engines(launched: Mapping[str, Measurement], manifest: Manifest, against: str) -> None:
    # Of each engine what the first schedule that runs it took, the one that all are measured against before the others.
    rows = [launched[against], *(row for name, row in launched.items() if name != against)]
    engines = {name: spread for row in reversed(rows) for name, spread in row.engines.items()}
    full_ms = sum(engines[engine].median_ms for engine in manifest.forwards["full"] if engine in engines)
    sys.stdout.write(f"\n{'engine':14}{'median ms':>11}{'of full':>9}\n")
    for name, spread in sorted(engines.items(), key=lambda item: -item[1].median_ms):
        share = f"{spread.median_ms / full_ms:9.1%}" if full_ms else f"{'–':>9}"
        sys.stdout.write(f"{name:14}{spread.median_ms:11.3f}{share}\n")
