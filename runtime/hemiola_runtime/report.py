"""What a request reports: the forwards that really ran, counted where they ran, and the time each took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hemiola_runtime.errors import EngagementError
from hemiola_runtime.schedule import Forward, Schedule


@dataclass(frozen=True, slots=True)
class RunReport:
    """What one request did.

    Attributes:
        schedule: name of the schedule.
        rhythm: one letter per step, of the forwards that ran.
        batch_size: images.
        counts: how often each engine ran.
        engine_ms: milliseconds spent in each engine, all its runs together.
        wall_ms: milliseconds from writing the request into the workspace to the last image.
    """

    schedule: str
    rhythm: str
    batch_size: int
    counts: dict[str, int]
    engine_ms: dict[str, float]
    wall_ms: float

    @property
    def overhead(self) -> float:
        """Share of the wall time that was spent outside engines."""
        return 1 - sum(self.engine_ms.values()) / self.wall_ms if self.wall_ms else 0.0


@dataclass(slots=True)
class Tally:
    """Counts launches as they happen."""

    steps: list[str]
    counts: Counter[str]
    engine_ms: dict[str, float]

    @classmethod
    def empty(cls) -> Tally:
        """Begin a count."""
        return cls([], Counter(), {})

    def add(self, engine: str, milliseconds: float) -> None:
        """Count one run."""
        if engine in _SYMBOLS:
            self.steps.append(engine)
        self.counts[engine] += 1
        self.engine_ms[engine] = self.engine_ms.get(engine, 0.0) + milliseconds

    def report(self, name: str, schedule: Schedule, batch_size: int, wall_ms: float) -> RunReport:
        """Close the count.

        Raises:
            EngagementError: other forwards ran than the schedule names.
        """
        rhythm = "".join(_SYMBOLS[engine] for engine in self.steps)
        if rhythm != schedule.rhythm:
            raise EngagementError(
                f"the schedule {name} is {schedule.rhythm}, but {rhythm} ran. The cache did not engage as promised; "
                "this is a fault of Hemiola, please report it"
            )
        return RunReport(name, rhythm, batch_size, dict(self.counts), self.engine_ms, wall_ms)


_SYMBOLS = {forward.value: forward.symbol for forward in Forward}
