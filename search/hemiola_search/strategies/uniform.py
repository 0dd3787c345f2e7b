"""FORA: a full step every N-th step, everything between reused (arXiv:2407.01425). The baseline of even spacing.

N is the smallest period that keeps to the limit.
"""

from __future__ import annotations

from hemiola_runtime.schedule import FULL, REUSE, Step
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored


def uniform_steps(num_steps: int, period: int) -> tuple[Step, ...]:
    """Return the steps of FORA for a period."""
    return tuple(FULL if i % period == 0 else REUSE for i in range(num_steps))


def uniform(problem: Problem) -> Candidate:
    """Return the schedule of the smallest period that keeps to the limit.

    Raises:
        SearchError: none does.
    """
    count = problem.num_evaluations
    return problem.first_fitting(
        problem.candidate("uniform", f"period {period}", uniform_steps(count, period)) for period in range(1, count + 1)
    )


def search(lab: Lab) -> list[Scored]:
    """Score the one schedule.

    Raises:
        SearchError: no period keeps to the limit.
    """
    return lab.score([uniform(lab.problem)])
