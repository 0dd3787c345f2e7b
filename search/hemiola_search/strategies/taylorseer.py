"""TaylorSeer: cached steps forecast their features by Taylor series (arXiv:2503.06923, eq. 5).

The first two steps are full, then every N-th. N is the smallest that keeps to the limit; every order up to the one that
is allowed is tried. Deviations: forecasts are made of stored features in place of stored differences, which is the same
sum in another order; N need not be whole, so that any limit can be filled; and forecasts of the residual of the whole
model are tried beside those of single layers.
"""

from __future__ import annotations

from typing import Final

from hemiola_runtime.schedule import FULL, REUSE, Forward, Step
from hemiola_search.errors import SearchError
from hemiola_search.forecasts import taylor, with_forecasts
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored

GRAIN: Final = 20  # periods that are tried between two whole numbers
OF: Final = {Forward.REUSE: "", Forward.RESIDUAL: " of the residual"}  # what is forecast, in the name
FIRST_ENHANCE: Final = 2  # steps at the beginning that are full, as the code calls it


def candidate(problem: Problem, period: float, order: int, forward: Forward) -> Candidate:
    """Return TaylorSeer's schedule for a period N, an order, and forecasts of layers (`reuse`) or of the `residual`."""
    first, num_steps = FIRST_ENHANCE - 1, problem.num_evaluations
    every = {first + round(period * i) for i in range(num_steps)}
    steps: tuple[Step, ...] = tuple(FULL if i <= first or i in every else REUSE for i in range(num_steps))
    forecast = with_forecasts(steps, order, taylor, forward)
    return problem.candidate("taylorseer", f"N = {period:g}, order {order}{OF[forward]}", forecast)


def search(lab: Lab) -> list[Scored]:
    """Score one schedule for every order.

    Raises:
        SearchError: no period keeps to the limit, or forecasts are not allowed.
    """
    problem = lab.problem
    if problem.options.max_order == 0:
        raise SearchError("forecasts of order 0 repeat caches, and there is nothing for TaylorSeer to do")
    periods = [i / GRAIN for i in range(GRAIN, GRAIN * problem.num_evaluations + 1)]
    return lab.best(
        [
            problem.first_fitting(candidate(problem, period, order, forward) for period in periods)
            for forward in OF
            for order in range(1, problem.options.max_order + 1)
        ]
    )
