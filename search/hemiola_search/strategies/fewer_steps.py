"""Fewer steps: the same solver with as many steps as cost no more, all of them full. What caching has to beat."""

from __future__ import annotations

from collections.abc import Iterator

from hemiola_export.errors import UnsupportedSolverError
from hemiola_runtime.schedule import FULL
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored


def fewer_steps(problem: Problem) -> Candidate:
    """Return the solver with the largest number of steps that keeps to the limit.

    Raises:
        SearchError: the solver costs more with any number of steps.
    """
    return problem.first_fitting(_candidates(problem))


def _candidates(problem: Problem) -> Iterator[Candidate]:
    for num_steps in range(problem.num_inference_steps, 0, -1):
        try:
            evaluations = len(problem.table(num_steps).scheduler.timesteps)
        except UnsupportedSolverError:
            continue
        yield Candidate("fewer_steps", f"{num_steps} steps", num_steps, (FULL,) * evaluations)


def search(lab: Lab) -> list[Scored]:
    """Score the one schedule.

    Raises:
        SearchError: the solver costs more with any number of steps.
    """
    return lab.score([fewer_steps(lab.problem)])
