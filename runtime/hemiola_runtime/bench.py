"""Measure a bundle where it runs: each forward and each schedule, from the reports of real requests."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final, TypeVar

from hemiola_runtime.backends import cuda
from hemiola_runtime.machine import Machine as Machine
from hemiola_runtime.manifest import BackendSpec
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.report import RunReport
from hemiola_runtime.sampler import Sampler

MIN_ROUNDS: Final = 3  # that are measured even when time is short: a median of fewer is none
GPU_FIELDS: Final = (  # of `nvidia-smi --query-gpu`
    *("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu"),
    *("utilization.gpu", "memory.used", "memory.total"),
)

PROMPT: Final = "a red circle left of a blue square"  # that measurements draw

K = TypeVar("K")
T = TypeVar("T")


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
        overhead: share of the wall time outside engines, or outside the captured graph, median.
        engines: time of one run of each engine, by name; a request's mean, spread over requests. Empty where
            trajectories ran as captured graphs: a sampler opened with `cuda_graphs=False` tells them.
        speedup: against the schedule it was measured against, the median of ratios of neighbouring requests.
        busy: share of the trajectory that engines ran; where it was captured, share of the wall time that the graph
            ran. Median. An engine counts as running from its first kernel to its last, gaps between them included.
        graph_bytes: device memory of the captured trajectory; None if it ran launch by launch.
    """

    schedule: str
    rhythm: str
    wall: Spread
    overhead: float
    engines: dict[str, Spread]
    speedup: float
    busy: float = 1.0
    graph_bytes: int | None = None


def gpu_of(backend: BackendSpec) -> cuda.Gpu | None:
    """Return the GPU that a backend's engines run on here, None where they run on the CPU."""
    if backend.name == "onnxruntime" or cuda.obstacle() is not None:
        return None
    return cuda.Cuda().gpu


def gpu_state() -> dict[str, str]:
    """Return what nvidia-smi says of the first visible GPU at this moment; nothing where there is no nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={visible}", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = next(csv.reader(said.splitlines(), skipinitialspace=True), [])
    return dict(zip(GPU_FIELDS, values, strict=False))


def in_turn(
    requests: Mapping[K, Callable[[], T]],
    repeats: int,
    *,
    seconds: float = math.inf,
    on_request: Callable[[], None] = lambda: None,
) -> dict[K, list[T]]:
    """Make requests in turn, A B C A B C …, so that a machine that drifts drifts for all of them.

    Args:
        requests: what makes each, by name.
        repeats: rounds that count; one before them does not.
        seconds: after which no further round begins, once MIN_ROUNDS were measured.
        on_request: told after every request.

    Returns:
        What the requests of the rounds that count gave, by name; the same number of each.
    """
    given: dict[K, list[T]] = {name: [] for name in requests}
    start = time.monotonic()
    for round_ in range(repeats + 1):
        if round_ > MIN_ROUNDS and time.monotonic() - start > seconds:
            break
        for name, request in requests.items():
            result = request()
            if round_:
                given[name].append(result)
            on_request()
    return given


def ratio(base: Sequence[float], mine: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring requests, which were made in turn."""
    return median(theirs / ours for theirs, ours in zip(base, mine, strict=True))


def measure(
    sampler: Sampler,
    schedules: Sequence[str],
    *,
    against: str,
    batch_size: int,
    repeats: int,
    subjects: Callable[[], dict[str, Any]] | None = None,
    on_request: Callable[[], None] = lambda: None,
) -> dict[str, Measurement]:
    """Measure schedules in turn.

    Args:
        sampler: an open bundle.
        schedules: names.
        against: the schedule that speed-ups refer to; measured with the others.
        batch_size: images in one request.
        repeats: requests of each schedule that count; one before them does not.
        subjects: gives what each request draws, as arguments of `generate`; None for the same every time.
        on_request: told after every request.
    """
    names = dict.fromkeys([against, *schedules])
    drawn = subjects or partial(subjects_of, sampler.manifest.pipeline, batch_size)
    requests = {name: partial(_report, sampler, name, drawn) for name in names}
    reports = in_turn(requests, repeats, on_request=on_request)
    return {name: summary(reports[name], reports[against]) for name in names}


def _report(sampler: Sampler, schedule: str, subjects: Callable[[], dict[str, Any]]) -> RunReport:
    return sampler.generate(**subjects(), schedule=schedule).report


def sample(sampler: Sampler, schedule: str, batch_size: int) -> RunReport:
    """Draw a batch of the first classes, or of one prompt, and return what ran."""
    return _report(sampler, schedule, partial(subjects_of, sampler.manifest.pipeline, batch_size))


def subjects_of(pipeline: Pipeline, batch_size: int) -> dict[str, Any]:
    """Return what measurements draw: the first classes in turn, or pictures of one prompt."""
    if pipeline.text is not None:
        return {"prompts": [PROMPT] * batch_size}
    return {"labels": [i % len(pipeline.labels) for i in range(batch_size)]}


def summary(reports: Sequence[RunReport], base: Sequence[RunReport]) -> Measurement:
    """Sum up the reports of one schedule; `base` are those of the schedule that speed-ups refer to, in turn."""
    first = reports[0]
    return Measurement(
        schedule=first.schedule,
        rhythm=first.rhythm,
        wall=Spread.of([report.wall_ms for report in reports]),
        overhead=median(report.overhead for report in reports),
        engines={
            name: Spread.of([report.engine_ms[name] / report.counts[name] for report in reports])
            for name in first.engine_ms
        },
        speedup=ratio([report.wall_ms for report in base], [report.wall_ms for report in reports]),
        busy=median(_busy(report) for report in reports),
        graph_bytes=first.graph_bytes,
    )


def _busy(report: RunReport) -> float:
    if report.graph_bytes is not None:
        return report.trajectory_ms / report.wall_ms
    return sum(report.engine_ms.values()) / report.trajectory_ms
