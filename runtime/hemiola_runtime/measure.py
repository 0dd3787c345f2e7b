"""Measure what every forward of a bundle costs where it runs, by drawing with schedules made for that alone.

Requests go launch by launch, since a captured CUDA graph tells nothing of its parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Final

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.backends import entry_of
from hemiola_runtime.bench import Spread, gpu_of, in_turn, subjects_of
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.cost_table import CostRow, CostTable, mean_tokens
from hemiola_runtime.errors import RequestError
from hemiola_runtime.graphs import CONDITIONING, VAE_DECODER
from hemiola_runtime.machine import Machine
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.report import RunReport
from hemiola_runtime.sampler import Sampler, SamplerOptions
from hemiola_runtime.schedule import FULL, Forward, FoundBy, Schedule, Step

GRID: Final = (8, 4, 2, 1)  # parts of all tokens that are measured, beside the token counts of the schedules
GUIDANCE_SCALE: Final = 1.0  # costs what any other does, and takes latents least far from where they belong

RowKey = tuple[str, int, int]  # kind, K, B


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How to measure.

    Attributes:
        batch_sizes: those that are measured; empty for 1 and the largest that the bundle takes.
        repeats: requests of each kind that count; one before them does not.
    """

    batch_sizes: tuple[int, ...] = ()
    repeats: int = 10


def measure_costs(folder: Path, options: MeasureOptions, *, on_request: Callable[[], None] = lambda: None) -> CostTable:
    """Measure every kind of step that a bundle has engines for, its conditioning and its decoder.

    Args:
        folder: of the bundle.
        options: what to measure, and how often.
        on_request: told after every request.

    Raises:
        RequestError: the bundle does not take one of the batch sizes.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    batch_sizes = tuple(sorted(set(options.batch_sizes or (1, manifest.max_batch_size))))
    if not 1 <= batch_sizes[0] <= batch_sizes[-1] <= manifest.max_batch_size:
        raise RequestError(
            f"the bundle takes 1 to {manifest.max_batch_size} images in one request; {list(batch_sizes)} cannot all be "
            f"measured. Build it with --max-batch-size {batch_sizes[-1]}, or measure others"
        )
    schedules = measuring_schedules(manifest, [bundle.schedule(name) for name in manifest.schedules])
    names = {f"measure {i}": schedule for i, schedule in enumerate(schedules)}
    with Sampler(bundle, names, next(iter(names)), SamplerOptions(1, None, cuda_graphs=False)) as sampler:
        requests = {
            (name, batch_size): partial(_draw, sampler, name, batch_size)
            for batch_size in batch_sizes
            for name in names
        }
        reports = in_turn(requests, options.repeats, on_request=on_request)
    samples: dict[RowKey, list[float]] = defaultdict(list)
    for (name, _), of_name in reports.items():
        for key, milliseconds in chain.from_iterable(_times(names[name], report) for report in of_name):
            samples[key].append(milliseconds)
    pipeline, gpu = manifest.pipeline, gpu_of(manifest.backend)
    return CostTable(
        schema=1,
        model=pipeline.model,
        guidance=pipeline.guidance,
        deep_start=pipeline.deep_start,
        selector=pipeline.selector,
        mask=pipeline.mask,
        has_block_counts=pipeline.has_block_counts,
        backend=manifest.backend,
        precision=manifest.precision,
        gpu=None if gpu is None else gpu.name,
        machine=Machine.here(),
        num_steps=len(schedules[0].steps),
        rows=_rows(samples, manifest),
        made_by=MadeBy.here("numpy", entry_of(manifest.backend.name).distribution),
    )


def _draw(sampler: Sampler, schedule: str, batch_size: int) -> RunReport:
    subjects = subjects_of(sampler.manifest.pipeline, batch_size)
    return sampler.generate(**subjects, guidance_scale=GUIDANCE_SCALE, schedule=schedule).report


def _times(schedule: Schedule, report: RunReport) -> Iterator[tuple[RowKey, float]]:
    """Yield the time of everything that ran, by what it was."""
    for step, milliseconds in zip(schedule.steps, report.step_ms, strict=True):
        yield (step.kind, round(mean_tokens(step)), report.batch_size), milliseconds
    for engine in (CONDITIONING, VAE_DECODER):
        if engine in report.engine_ms:
            yield (engine, 0, report.batch_size), report.engine_ms[engine]


def _rows(samples: Mapping[RowKey, Sequence[float]], manifest: Manifest) -> tuple[CostRow, ...]:
    """Sum up samples: by batch size, in the order of a request, then by token count."""
    order = [CONDITIONING, *manifest.forwards, VAE_DECODER]
    rows = []
    for key in sorted(samples, key=lambda key: (key[2], order.index(key[0]), key[1])):
        spread = Spread.of(samples[key])
        rows.append(CostRow(*key, spread.median_ms, spread.p10_ms, spread.p90_ms, len(samples[key])))
    return tuple(rows)


def measuring_schedules(manifest: Manifest, schedules: Sequence[Schedule]) -> list[Schedule]:
    """Make schedules that between them run every kind of step a bundle has engines for.

    They are made for the scheduler of the bundle's longest schedule. Each begins with as many full steps as forecasts
    look back on; then all that is to be measured comes in turn, until its model evaluations are used up.

    Args:
        manifest: of the bundle.
        schedules: the bundle's.
    """
    pipeline = manifest.pipeline
    scheduler = max(schedules, key=lambda schedule: len(schedule.steps)).scheduler
    num_steps = len(scheduler.timesteps)
    steps = [step for step in measured_steps(manifest, schedules) if step.order + 2 <= num_steps]
    begin = 1 + max((step.order for step in steps), default=0)
    room = num_steps - begin
    in_order = cycle(steps)
    num_schedules = -(-len(steps) // room) if room else 1
    made_by = MadeBy.here()
    made = []
    for _ in range(num_schedules):
        chosen = (*(FULL,) * begin, *islice(in_order, room))
        forwards = {step.forward for step in chosen}
        made.append(
            Schedule(
                schema=2,
                model=pipeline.model,
                scheduler=scheduler,
                guidance=pipeline.guidance,
                deep_start=pipeline.deep_start if forwards & {Forward.DEEP, Forward.TOKENS} else None,
                selector=pipeline.selector if Forward.TOKENS in forwards else None,
                mask=pipeline.mask if Forward.MASKED in forwards else None,
                steps=chosen,
                found_by=FoundBy("measure", {}, 0, made_by),
                measured={},
            )
        )
    return made


def measured_steps(manifest: Manifest, schedules: Sequence[Schedule]) -> list[Step]:
    """Return the steps that are measured: all kinds in turn, with another token count each time.

    So an engine seldom follows itself, which would take less than it does in a schedule. Token counts are those of the
    schedules, and parts of all tokens as far as the engines were built for them.
    """
    pipeline = manifest.pipeline
    grid = [Step(Forward.TOKENS, max(1, pipeline.num_tokens // part)) for part in GRID]
    counts: dict[int, int | tuple[tuple[int, ...], ...] | None] = {}  # by their mean, as rows name them
    for step in [*(step for schedule in schedules for step in schedule.steps if step.counts), *grid]:
        counts.setdefault(round(mean_tokens(step)), step.tokens)
    by_kind = []
    for kind in manifest.forwards:
        forward, _, order = kind.partition("_")
        forecast = (1.0, *(0.0,) * int(order)) if order else ()  # the newest as it is: no number goes astray
        of_kind = counts.values() if forward == Forward.TOKENS.value else [None]
        steps = [Step(Forward(forward), count, forecast) for count in of_kind]
        by_kind.append([step for step in steps if _is_built_for(manifest, step)])
    num_turns = max(map(len, by_kind))
    return [steps[turn % len(steps)] for turn in range(num_turns) for steps in by_kind if steps]


def _is_built_for(manifest: Manifest, step: Step) -> bool:
    """Tell whether engines take a step, at all sizes that a sampler makes room for."""
    pipeline = manifest.pipeline
    sizes = [
        pipeline.symbols(batch_size, 1, size) | pipeline.selected_tokens(step, size)
        for batch_size in (1, manifest.max_batch_size)
        for size in (pipeline.size, *pipeline.demanding_sizes)
    ]
    engines = [manifest.engines[name] for name in manifest.forwards[step.kind]]
    return all(
        not engine.profiles or any(profile.covers(of_size) for profile in engine.profiles)
        for engine in engines
        for of_size in sizes
    )
