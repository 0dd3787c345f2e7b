"""Rhythms: schedules as segment lengths, each segment one full step and the cached steps after it. Pure arithmetic.

Notation of ProCache (arXiv:2512.17298 §3): T steps, B full steps (the budget), v_i cached steps after the i-th full
step, v_min ≤ v_i ≤ v_max, and v_{i+1} ≤ v_i: long reuse while the image is noise, dense computation at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hemiola_runtime.schedule import FULL, REUSE, Forward, Step
from hemiola_search.errors import SearchError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Constraints:
    """The space of monotone schedules.

    Attributes:
        num_steps: T.
        budget: B, full steps.
        v_min: fewest cached steps after a full one.
        v_max: most.
    """

    num_steps: int
    budget: int
    v_min: int
    v_max: int

    def check(self) -> None:
        """Make sure that a schedule meets them.

        Raises:
            SearchError: none does; the message names the nearest budgets that one meets.
        """
        if not (1 <= self.budget <= self.num_steps and 0 <= self.v_min <= self.v_max):
            raise SearchError(
                f"a schedule of {self.num_steps} steps has 1 to {self.num_steps} full steps and 0 ≤ v_min ≤ v_max; "
                f"found budget {self.budget}, v_min {self.v_min}, v_max {self.v_max}"
            )
        shortest, longest = self.budget * (self.v_min + 1), self.budget * (self.v_max + 1)
        if shortest <= self.num_steps <= longest:
            return
        fewest = -(-self.num_steps // (self.v_max + 1))
        most = self.num_steps // (self.v_min + 1)
        needed = self.num_steps / self.budget - 1
        mends = [f"v_min ≤ {int(needed)} and v_max ≥ {-int(-needed // 1)}"]
        if fewest <= most:
            mends.insert(0, f"a budget from {fewest} to {most}")
        raise SearchError(
            f"no schedule of {self.num_steps} steps has {self.budget} full steps with {self.v_min} to {self.v_max} "
            f"cached steps after each: such segments cover {shortest} to {longest} steps. Nearest that work: "
            f"{', or '.join(mends)}"
        )


def monotone_rhythms(constraints: Constraints) -> list[tuple[int, ...]]:
    """Enumerate all of the space: partitions of T into B segment lengths that never grow.

    ProCache samples this space; it is small enough to list, as (T, B, v_min, v_max) = (50, 13, 1, 4) with 25.

    Raises:
        SearchError: the space is empty.
    """
    constraints.check()
    shortest, longest = constraints.v_min + 1, constraints.v_max + 1

    def extend(left: int, count: int, limit: int) -> Iterator[tuple[int, ...]]:
        if count == 0:
            yield ()
            return
        for length in range(min(limit, left - (count - 1) * shortest), shortest - 1, -1):
            if length * count < left:  # what follows is no longer, so it cannot cover what is left
                return
            for rest in extend(left - length, count - 1, length):
                yield (length, *rest)

    return list(extend(constraints.num_steps, constraints.budget, longest))


def steps_from_segments(segments: Iterable[int]) -> tuple[Step, ...]:
    """Write segment lengths out as steps: one full, the others cached."""
    return tuple(step for length in segments for step in (FULL, *(REUSE,) * (length - 1)))


def with_selective_steps(steps: Sequence[Step], selective: Step) -> tuple[Step, ...]:
    """Replace every second cached step of each segment (ProCache §3.3): the first after a full step stays cached."""
    injected = []
    since_full = 0
    for step in steps:
        since_full = 0 if step.forward is Forward.FULL else since_full + 1
        injected.append(selective if since_full and since_full % 2 == 0 else step)
    return tuple(injected)


def sampled(space: Sequence[T], most: int) -> list[T]:
    """Return a space, or a regular sample of it with its first and its last where it is too large."""
    if len(space) <= most:
        return list(space)
    return [space[round(i * (len(space) - 1) / max(1, most - 1))] for i in range(most)]


def default_v_max(num_steps: int, budget: int) -> int:
    """The smallest v_max that leaves a choice: the mean segment, rounded up."""
    return -(-num_steps // budget)
