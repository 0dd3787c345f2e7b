"""What a request reports: the forwards that really ran, counted where they ran, and the time each took."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from hemiola_runtime.errors import EngagementError
from hemiola_runtime.schedule import KINDS, Schedule
from hemiola_runtime.slot import Ran


@dataclass(frozen=True, slots=True)
class TextReport:
    """What became of the prompts of one request, negative ones included.

    Attributes:
        num_kept: prompts whose embeddings were at hand.
        num_encoded: prompts that the text encoder ran for.
        truncated: prompts that were longer than it takes, and how many tokens they had.
        unknown: prompts with words or signs that its tokenizer does not know, and these.
    """

    num_kept: int
    num_encoded: int
    truncated: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunReport:
    """What one request did.

    Attributes:
        schedule: name of the schedule.
        rhythm: one letter per step, of the forwards that ran.
        batch_size: images.
        counts: how often each engine ran, text encoder and decoder of tiles aside.
        engine_ms: milliseconds spent in each engine, all its runs together; empty where the trajectory ran as one
            captured CUDA graph.
        trajectory_ms: milliseconds from the begin of the first launch to the end of the last.
        wall_ms: milliseconds from the begin of the request, the encoding of its prompts included, to the last image.
        graph_bytes: device memory of the captured trajectory; None if it ran launch by launch.
        text: what became of the prompts; None where images are drawn of labels.
        step_ms: milliseconds of each model evaluation, all its engines together; empty as `engine_ms` is.
    """

    schedule: str
    rhythm: str
    batch_size: int
    counts: dict[str, int]
    engine_ms: dict[str, float]
    trajectory_ms: float
    wall_ms: float
    graph_bytes: int | None
    text: TextReport | None = None
    step_ms: tuple[float, ...] = ()

    @property
    def overhead(self) -> float:
        """Share of the wall time that was spent outside the trajectory's engines, or outside the captured graph."""
        inside = self.trajectory_ms if self.graph_bytes is not None else sum(self.engine_ms.values())
        return 1 - inside / self.wall_ms if self.wall_ms else 0.0


def report_of(
    name: str,
    schedule: Schedule,
    forwards: Mapping[str, tuple[str, ...]],
    batch_size: int,
    ran: Ran,
    wall_ms: float,
    text: TextReport | None = None,
) -> RunReport:
    """Count what ran.

    Args:
        name: of the schedule.
        schedule: what should have run.
        forwards: the engines that make up each forward.
        batch_size: images.
        ran: what did run.
        wall_ms: of the whole request.
        text: what became of its prompts.

    Raises:
        EngagementError: other forwards ran than the schedule names.
    """
    steps = _steps(ran.engines, tuple(forwards.items()))
    rhythm = "".join(symbol for symbol, _ in steps)
    if rhythm != schedule.rhythm:
        raise EngagementError(
            f"the schedule {name} is {schedule.rhythm}, but {rhythm} ran. The cache did not engage as promised; "
            "this is a fault of Hemiola, please report it"
        )
    engine_ms: dict[str, float] = defaultdict(float)
    for engine, milliseconds in zip(ran.engines, ran.engine_ms, strict=False):  # none of a captured trajectory
        engine_ms[engine] += milliseconds
    return RunReport(
        schedule=name,
        rhythm=rhythm,
        batch_size=batch_size,
        counts=dict(Counter(ran.engines)),
        engine_ms=dict(engine_ms),
        trajectory_ms=ran.trajectory_ms,
        wall_ms=wall_ms,
        graph_bytes=ran.graph_bytes,
        text=text,
        step_ms=tuple(sum(ran.engine_ms[i] for i in launches) for _, launches in steps) if ran.engine_ms else (),
    )


@lru_cache  # every request of a schedule runs the same engines, and half of the host's time went into reading them
def _steps(
    engines: tuple[str, ...], forwards: tuple[tuple[str, tuple[str, ...]], ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Read steps off the engines that ran, longer chains first: `deep` behind `front` is part of `full`.

    Returns:
        The letter of each step, and which of the launches it was.
    """
    chains = sorted(((chain, KINDS[name]) for name, chain in forwards), key=lambda c: -len(c[0]))
    of_steps = [(i, engine) for i, engine in enumerate(engines) if any(engine in chain for chain, _ in chains)]
    launches, names = [i for i, _ in of_steps], tuple(engine for _, engine in of_steps)
    steps: list[tuple[str, tuple[int, ...]]] = []
    i = 0
    while i < len(names):
        fitting = ((symbol, len(chain)) for chain, symbol in chains if names[i : i + len(chain)] == chain)
        symbol, length = next(fitting, ("?", 1))
        steps.append((symbol, tuple(launches[i : i + length])))
        i += length
    return tuple(steps)
