"""Measure the digits bundle on this machine's CPU and write the figures with machine and versions.

    python scripts/bench.py --out benchmarks/digits_cpu.json

The schedule is ProCache's released rhythm (17 full, 23 reuse, 10 tokens of 50) in the deepest quarter of the blocks:
`procache` with as many tokens as `hemiola search` takes by default, `quarter` with K = N/4.
All ratios are taken within one run, request by request in turn. Start-up, opening and memory are those of fresh
processes in which PyTorch, ONNX and diffusers cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from hemiola_engines.build import build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_export.export import export_pipeline
from hemiola_export.model import load_model, make_scheduler
from hemiola_export.solver import scheduler_identity
from hemiola_runtime.artifacts import MadeBy, write_text
from hemiola_runtime.bench import Machine, Measurement, measure
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import WEIGHTS_FILE
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.schedule import FoundBy, Schedule, TokenSelector, tokens
from hemiola_search.problem import first_deep_block
from hemiola_search.rhythms import steps_from_segments, with_selective_steps

SEGMENTS: Final = (4,) * 6 + (3,) * 4 + (2,) * 7  # the released rhythm for DiT-XL/2, DDIM-50
NUM_STEPS: Final = 50
TOKEN_RATIOS: Final = {"procache": 0.15, "quarter": 0.25}

TARGETS: Final[dict[str, tuple[str, float]]] = {
    "speedup": (">=", 2.5),
    "reuse_of_full": ("<=", 0.08),
    "tokens_of_full": ("<=", 0.25),
    "overhead": ("<=", 0.03),
    "import_seconds": ("<=", 0.15),
    "open_seconds": ("<=", 1.0),
    "resident_bytes_over_limit": ("<=", 1.0),
}

FRESH: Final = """
import sys, time
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "diffusers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
start = time.perf_counter()
import hemiola_runtime
imported = time.perf_counter()
import hemiola_runtime.sampler
complete = time.perf_counter()
import onnxruntime
before = time.perf_counter()
sampler = hemiola_runtime.sampler.Sampler.open(sys.argv[1])
opened = time.perf_counter()
for seed in range(5):
    sampler.generate(labels=[1, 2, 3, 4], seeds=seed, guidance_scale=2.0)
status = open("/proc/self/status").read().split()
print(imported - start, complete - start, opened - before, int(status[status.index("VmRSS:") + 1]) * 1024)
"""


def main() -> None:
    """Export, build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, tqdm(desc="bench", disable=None) as bar:
        bundle = Path(folder) / "bundle"
        counts = _build(options.model, Path(folder) / "graphs", bundle, options.batch_size)
        with Sampler.open(bundle) as sampler:
            measured = measure(
                sampler,
                list(sampler.schedules),
                against=UNCACHED,
                batch_size=options.batch_size,
                repeats=options.repeats,
                on_request=lambda: bar.update() and None,
            )
            backend = sampler.manifest.backend
        weights_bytes = (bundle / "engines" / WEIGHTS_FILE).stat().st_size
        fresh = [_fresh(bundle) for _ in tqdm(range(5), desc="start-up", disable=None)]
    figures = _figures(measured, fresh, weights_bytes)
    record = {
        "what": f"{options.model}, DDIM-{NUM_STEPS}, guidance, batch {options.batch_size}",
        "tokens": counts,
        "rhythm": measured["procache"].rhythm,
        "machine": asdict(Machine.here()),
        "backend": asdict(backend),
        "made_by": asdict(MadeBy.here("numpy", "onnxruntime", "torch", "onnx")),
        "figures": figures,
        "measured": {name: asdict(row) for name, row in measured.items()},
    }
    write_text(json.dumps(record, indent=1) + "\n", options.out)
    for name, (relation, bound) in TARGETS.items():
        is_met = figures[name] >= bound if relation == ">=" else figures[name] <= bound
        print(f"{name:28}{figures[name]:10.4f}   target {relation} {bound:g}   {'met' if is_met else 'MISSED'}")


def _build(source: str, graphs: Path, bundle: Path, batch_size: int) -> dict[str, int]:
    model = load_model(source)
    identity = scheduler_identity(make_scheduler(model, "ddim", {}), NUM_STEPS)
    counts = {name: round(ratio * model.family.num_tokens) for name, ratio in TOKEN_RATIOS.items()}
    rhythm = steps_from_segments(SEGMENTS)
    schedules = {
        name: Schedule(
            schema=1,
            model=model.identity,
            scheduler=identity,
            guidance="classifier_free",
            deep_start=first_deep_block(len(model.family.blocks), 0.25),
            selector=TokenSelector("value_norm", staleness_weight=0.0625, spatial_bonus=0.6, spatial_size=2, seed=0),
            steps=with_selective_steps(rhythm, tokens(count)),
            found_by=FoundBy("procache", {"name": "released"}, 0, MadeBy.here()),
            measured={},
        )
        for name, count in counts.items()
    }
    export_pipeline(model, schedules, graphs)
    build_bundle(graphs, bundle, BuildOptions("onnxruntime", batch_size))
    return counts


def _fresh(bundle: Path) -> tuple[float, ...]:
    """Import, open and serve in a fresh process; returns seconds of each import and of opening, and resident bytes."""
    done = subprocess.run([sys.executable, "-c", FRESH, str(bundle)], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def _figures(measured: dict[str, Measurement], fresh: list[tuple[float, ...]], weights_bytes: int) -> dict[str, Any]:
    cached = measured["procache"]
    full_ms = measured[UNCACHED].engines["full"].median_ms
    middle: Callable[[int], float] = lambda i: statistics.median(row[i] for row in fresh)  # noqa: E731
    return {
        "speedup": cached.speedup,
        "reuse_of_full": cached.engines["reuse"].median_ms / full_ms,
        "tokens_of_full": measured["quarter"].engines["tokens"].median_ms / full_ms,
        "overhead": cached.overhead,
        "import_seconds": middle(0),
        "import_with_numpy_seconds": middle(1),
        "open_seconds": middle(2),
        "resident_bytes": middle(3),
        "weights_bytes": weights_bytes,
        "resident_bytes_over_limit": middle(3) / (1.5 * weights_bytes + 250e6),
    }


if __name__ == "__main__":
    main()
