"""Measure the bundle of an example model on this machine's CPU and write the figures with machine and versions.

    python scripts/bench.py --out benchmarks/digits_cpu.json
    python scripts/bench.py --workload shapes --out benchmarks/shapes_cpu.json

The schedules are ProCache's released rhythms in the deepest quarter of the blocks (17 full, 23 reuse, 10 tokens of 50
for digits; 7 full, 7 reuse, 6 tokens of 20 for shapes): `procache` with as many tokens as `hemiola search` takes by
default, `quarter` with K = N/4. Every request for shapes has prompts that the sampler has not seen before.
All ratios are taken within one run, request by request in turn. Start-up, opening and memory are those of fresh
processes in which PyTorch, ONNX, diffusers and transformers cannot be imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from hemiola_runtime.schedule import Forward, FoundBy, Schedule, TokenSelector, tokens
from hemiola_search.rhythms import steps_from_segments, with_selective_steps

DEEP_RATIO: Final = 0.25
TOKEN_RATIOS: Final = {"procache": 0.15, "quarter": 0.25}
COMMON_TARGETS: Final[dict[str, tuple[str, float]]] = {
    "overhead": ("<=", 0.03),
    "import_seconds": ("<=", 0.15),
    "open_seconds": ("<=", 1.0),
    "resident_bytes_over_limit": ("<=", 1.0),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured.

    Attributes:
        model: folder.
        scheduler: a short name of `hemiola search`, or None for the model's own.
        segments: lengths of the segments of the rhythm.
        batch_size: images in one request.
        generate: arguments of the requests of a fresh process.
        targets: what is aimed at, by figure.
    """

    model: str
    scheduler: str | None
    segments: tuple[int, ...]
    batch_size: int
    generate: dict[str, Any]
    targets: dict[str, tuple[str, float]]


WORKLOADS: Final = {
    "digits": Workload(
        "examples/digits",
        "ddim",
        (4,) * 6 + (3,) * 4 + (2,) * 7,  # the released rhythm for DiT-XL/2
        4,
        {"labels": [1, 2, 3, 4], "guidance_scale": 2.0},
        {"speedup": (">=", 2.5), "reuse_of_full": ("<=", 0.08), "tokens_of_full": ("<=", 0.25), **COMMON_TARGETS},
    ),
    "shapes": Workload(
        "examples/shapes",
        None,
        (3,) * 6 + (2,),  # the released rhythm for PixArt-α
        2,
        {"prompts": ["a red circle", "a blue square above a red circle"], "guidance_scale": 3.0},
        {"speedup": (">=", 2.0), "denoiser_speedup": (">=", 2.2), **COMMON_TARGETS},
    ),
}

FRESH: Final = """
import json, sys, time
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "diffusers", "transformers"):
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
    sampler.generate(**json.loads(sys.argv[2]), seeds=seed)
status = open("/proc/self/status").read().split()
print(imported - start, complete - start, opened - before, int(status[status.index("VmRSS:") + 1]) * 1024)
"""


def main() -> None:
    """Export, build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]

    with tempfile.TemporaryDirectory() as folder, tqdm(desc="bench", disable=None) as bar:
        bundle = Path(folder) / "bundle"
        schedules = _build(workload, Path(folder) / "graphs", bundle)
        with Sampler.open(bundle) as sampler:
            measured = measure(
                sampler,
                list(sampler.schedules),
                against=UNCACHED,
                batch_size=workload.batch_size,
                repeats=options.repeats,
                subjects=_new_prompts(workload),
                on_request=lambda: bar.update() and None,
            )
            backend = sampler.manifest.backend
        weights_bytes = (bundle / "engines" / WEIGHTS_FILE).stat().st_size
        fresh = [_fresh(bundle, workload) for _ in tqdm(range(5), desc="start-up", disable=None)]
    figures = _figures(measured, fresh, weights_bytes)
    scheduler = schedules["procache"].scheduler.label
    record = {
        "what": f"{workload.model}, {scheduler}, guidance, batch {workload.batch_size}",
        "tokens": {name: max(step.max_tokens for step in schedule.steps) for name, schedule in schedules.items()},
        "rhythm": measured["procache"].rhythm,
        "machine": asdict(Machine.here()),
        "backend": asdict(backend),
        "made_by": asdict(MadeBy.here("numpy", "onnxruntime", "torch", "onnx")),
        "figures": figures,
        "measured": {name: asdict(row) for name, row in measured.items()},
    }
    write_text(json.dumps(record, indent=1) + "\n", options.out)
    for name, (relation, bound) in workload.targets.items():
        is_met = figures[name] >= bound if relation == ">=" else figures[name] <= bound
        print(f"{name:28}{figures[name]:10.4f}   target {relation} {bound:g}   {'met' if is_met else 'MISSED'}")


def _build(workload: Workload, graphs: Path, bundle: Path) -> dict[str, Schedule]:
    model = load_model(workload.model)
    steps, num_blocks = steps_from_segments(workload.segments), len(model.family.blocks)
    identity = scheduler_identity(make_scheduler(model, workload.scheduler, {}), len(steps))
    schedules = {
        name: Schedule(
            schema=2,
            model=model.identity,
            scheduler=identity,
            guidance="classifier_free",
            deep_start=num_blocks - round(DEEP_RATIO * num_blocks),
            selector=TokenSelector("value_norm", staleness_weight=0.0625, spatial_bonus=0.6, spatial_size=2, seed=0),
            mask=None,
            steps=with_selective_steps(steps, tokens(round(ratio * model.family.num_tokens))),
            found_by=FoundBy("procache", {"name": "released"}, 0, MadeBy.here()),
            measured={},
        )
        for name, ratio in TOKEN_RATIOS.items()
    }
    export_pipeline(model, schedules, graphs)
    build_bundle(graphs, bundle, BuildOptions("onnxruntime", workload.batch_size))
    return schedules


def _new_prompts(workload: Workload) -> Callable[[], dict[str, Any]] | None:
    """Return what gives every request prompts of its own; None for a model of labels."""
    path = Path(workload.model) / "judge" / "prompts.json"
    if not path.is_file():
        return None
    prompts = iter(json.loads(path.read_text(encoding="utf-8")))
    return lambda: {"prompts": [next(prompts) for _ in range(workload.batch_size)]}


def _fresh(bundle: Path, workload: Workload) -> tuple[float, ...]:
    """Import, open and serve in a fresh process; returns seconds of each import and of opening, and resident bytes."""
    command = [sys.executable, "-c", FRESH, str(bundle), json.dumps(workload.generate)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def _figures(measured: dict[str, Measurement], fresh: list[tuple[float, ...]], weights_bytes: int) -> dict[str, Any]:
    cached = measured["procache"]
    full_ms = measured[UNCACHED].engines["full"].median_ms
    middle: Callable[[int], float] = lambda i: statistics.median(row[i] for row in fresh)  # noqa: E731
    return {
        "speedup": cached.speedup,
        "denoiser_speedup": _denoiser_ms(measured[UNCACHED]) / _denoiser_ms(cached),
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


def _denoiser_ms(measured: Measurement) -> float:
    """Add up the steps alone: without text encoder, conditioning and what the host does."""
    return sum(
        measured.engines[forward.value].median_ms * measured.rhythm.count(forward.symbol)
        for forward in Forward
        if forward.symbol in measured.rhythm
    )


if __name__ == "__main__":
    main()
