"""Build every engine of an export on this machine and write what each took and weighs.

    python scripts/bench_build.py out/dit-xl-2/graphs --backend tensorrt_rtx --out benchmarks/dit_xl_2_build.json

Both layouts are built, where the export has the graphs for both. Seconds are wall time of one build, the engine's
process included.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hemiola_engines.build import build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_runtime.artifacts import MadeBy, in_words, write_text
from hemiola_runtime.backends import entry_of
from hemiola_runtime.bench import Machine
from hemiola_runtime.graph_set import read_graph_set
from hemiola_runtime.graphs import FRONT
from hemiola_runtime.manifest import Manifest


def main() -> None:
    """Build, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    graph_set = read_graph_set(options.graphs)
    graphs = next(iter(graph_set.precisions.values())).graphs
    layouts: dict[str, Any] = {}
    for layout in ("separate", "segmented") if FRONT in graphs else ("separate",):
        layouts[layout] = _build(options, layout)
    used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak_bytes = 1024 * max(used)
    record = {
        "what": f"{graph_set.pipeline.model.name}, up to {options.max_batch_size} images at once",
        "precision": next(iter(graph_set.precisions)),
        "machine": asdict(Machine.here()),
        "made_by": asdict(MadeBy.here(entry_of(options.backend).distribution, "onnx", "torch")),
        "peak_bytes": peak_bytes,
        "layouts": layouts,
    }
    write_text(json.dumps(record, indent=1) + "\n", options.out)
    for layout, figures in layouts.items():
        print(f"{layout:14}{'seconds':>9}{'engine':>11}{'weights':>11}")
        for name, row in figures["engines"].items():
            print(f"{name:14}{row['seconds']:9.1f}{in_words(row['bytes']):>11}{in_words(row['weights_bytes']):>11}")
        print(f"{'in all':14}{figures['seconds']:9.1f}{in_words(figures['bytes']):>11}\n")
    print(f"largest process: {in_words(peak_bytes)}")


def _build(options: argparse.Namespace, layout: Any) -> dict[str, Any]:
    began: dict[str, float] = {}

    def progress(text: str) -> None:
        kind, _, name = text.partition(" ")
        if kind == "engine" and ":" not in name:
            began[name] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        built = build_bundle(
            options.graphs,
            Path(folder) / "bundle",
            BuildOptions(options.backend, options.max_batch_size, layout=layout),
            progress=progress,
        )
        end = time.perf_counter()
    ends = [*list(began.values())[1:], end]
    seconds = {name: stop - begin for (name, begin), stop in zip(began.items(), ends, strict=True)}
    return {
        "seconds": end - start,
        "bytes": _engine_bytes(built.manifest),
        "engines": _rows(built.manifest, seconds, options),
    }


def _engine_bytes(manifest: Manifest) -> int:
    return sum(file.num_bytes for path, file in manifest.files.items() if path.startswith("engines/"))


def _rows(manifest: Manifest, seconds: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    graphs = read_graph_set(options.graphs).precisions[manifest.precision].graphs
    return {
        name: {
            "seconds": seconds[name],
            "bytes": manifest.files[graph.file].num_bytes,
            "weights_bytes": sum(weight.num_bytes for weight in graphs[name].weights),
            "profiles": len(manifest.engines[name].profiles),
        }
        for name, graph in manifest.graphs.items()
    }


if __name__ == "__main__":
    main()
