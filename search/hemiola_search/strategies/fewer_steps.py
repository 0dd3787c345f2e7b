"""Fewer steps: the same solver with as many steps as the budget, all of them full. What caching has to beat."""

from __future__ import annotations

from hemiola_export.errors import UnsupportedSolverError
from hemiola_runtime.schedule import FULL
from hemiola_search.errors import SearchError
from hemiola_search.problem import Candidate, Problem, Score, Scored


def search(problem: Problem, score: Score) -> list[Scored]:
    """Score the solver with the largest number of steps that takes no more model evaluations than the budget.

    Raises:
        SearchError: the solver takes more for any number of steps.
    """
    budget = problem.options.budget
    for num_steps in range(budget, 0, -1):
        try:
            evaluations = len(problem.table(num_steps).scheduler.timesteps)
        except UnsupportedSolverError:
            continue
        if evaluations <= budget:
            return [score(Candidate("fewer_steps", f"{num_steps} steps", num_steps, (FULL,) * evaluations))]
    raise SearchError(f"{problem.scheduler.class_name} cannot do with {budget} model evaluations")
