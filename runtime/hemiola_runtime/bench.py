"""Measure a bundle where it runs: each forward and each schedule, from the reports of real requests."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from hemiola_runtime.report import RunReport
from hemiola_runtime.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extent of repeated measurements, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    max_ms: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summarise samples."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], ordered[-1])


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a schedule takes.

    Attributes:
        schedule: its name.
        rhythm: the forwards that ran.
        wall: of whole requests.
        overhead: share of the wall time outside engines, median.
        engines: time of one run of each engine, by name; a request's mean, spread over requests.
        speedup: against the schedule it was measured against, the median of ratios of neighbouring requests.
    """

    schedule: str
    rhythm: str
    wall: Spread
    overhead: float
    engines: dict[str, Spread]
    speedup: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where something was measured."""

    processor: str
    num_cores: int
    system: str
    python: str

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        return cls(
            _processor(), os.cpu_count() or 1, f"{platform.system()} {platform.machine()}", platform.python_version()
        )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(
    sampler: Sampler,
    schedules: Sequence[str],
    *,
    against: str,
    batch_size: int,
    repeats: int,
    on_request: Callable[[], None] = lambda: None,
) -> dict[str, Measurement]:
    """Measure schedules in turn, A B C A B C …, so that a machine that drifts drifts for all of them.

    Args:
        sampler: an open bundle.
        schedules: names.
        against: the schedule that speed-ups refer to; measured with the others.
        batch_size: images in one request.
        repeats: requests of each schedule that count; one before them does not.
        on_request: told after every request.
    """
    names = list(dict.fromkeys([against, *schedules]))
    classes = len(sampler.manifest.pipeline.labels)
    labels = [i % classes for i in range(batch_size)]
    reports: dict[str, list[RunReport]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        for name in names:
            report = sampler.generate(labels=labels, seeds=repeat, schedule=name).report
            if repeat:
                reports[name].append(report)
            on_request()
    return {name: _summary(reports[name], reports[against]) for name in names}


def _summary(reports: Sequence[RunReport], base: Sequence[RunReport]) -> Measurement:
    first = reports[0]
    return Measurement(
        schedule=first.schedule,
        rhythm=first.rhythm,
        wall=Spread.of([report.wall_ms for report in reports]),
        overhead=median(report.overhead for report in reports),
        engines={
            name: Spread.of([report.engine_ms[name] / report.counts[name] for report in reports])
            for name in first.counts
        },
        speedup=median(theirs.wall_ms / mine.wall_ms for mine, theirs in zip(reports, base, strict=True)),
    )
