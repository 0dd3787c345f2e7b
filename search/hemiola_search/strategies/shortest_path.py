"""Shortest path: the full steps with the least total error of the steps between, exactly (Hemiola's own).

A schedule is a path through the steps of the trajectory: from full step to full step, over cached ones. What a cached
step costs in quality is known beforehand: how far the model's output is from the true one if it comes from the caches
of the o + 1 last full steps, fitted by least squares, times how much an error at that step changes the final image;
both from a calibration. So the best path with B full steps is found by dynamic programming over the last o + 1 full
steps, without a single trajectory, for the sum of all errors as well as for the largest one. With o = 0 it is the exact
optimum for repeated caches, as in the edge weights of other shortest-path schedulers; with o > 0 it chooses places and
forecasts together.

The estimate takes errors of different steps to add up, and the calibrated trajectory for the one that is drawn.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final, Literal

import numpy as np

from hemiola_runtime.schedule import FULL, REUSE, Forward, Step
from hemiola_search.calibration import Floats
from hemiola_search.errors import SearchError
from hemiola_search.forecasts import Fitted, with_forecasts
from hemiola_search.lab import Lab
from hemiola_search.problem import Problem, Scored

Objective = Literal["sum", "largest"]
History = tuple[int, ...]  # the last full steps, the newest first

REACH: Final = 3  # longest pause that is considered, in mean pauses
LONG_TRAJECTORY: Final = 100  # steps from which on forecasts look back at two full steps, not three


def shortest_path(fitted: Fitted, num_steps: int, num_full: int, order: int, objective: Objective) -> tuple[int, ...]:
    """Return the full steps of the best path.

    Args:
        fitted: forecasts, with the errors that they are estimated to make.
        num_steps: T.
        num_full: B; the first step is one of them.
        order: o, of the forecasts.
        objective: whether the sum of all errors is to be small or the largest of them.
    """
    reach = min(num_steps, REACH * -(-num_steps // num_full))
    # By history: the best value of paths to it with 1 … B full steps, and the history that each came from.
    values: dict[History, Floats] = {(0,): _only_first(num_full)}
    origins: dict[History, list[History | None]] = {(0,): [None] * num_full}
    ends: list[tuple[float, History]] = []
    waiting: dict[int, list[History]] = defaultdict(list, {0: [(0,)]})
    for last in range(num_steps):
        for history in waiting[last]:
            errors = fitted.errors(history)
            so_far = np.concatenate([[0.0], np.cumsum(errors) if objective == "sum" else np.maximum.accumulate(errors)])
            for pause in range(min(reach, num_steps - last)):
                here = _joined(values[history], float(so_far[pause]), objective)
                following = last + pause + 1
                if following == num_steps:
                    ends.append((float(here[-1]), history))
                    continue
                there = (following, *history)[: order + 1]
                if there not in values:
                    values[there], origins[there] = np.full(num_full, np.inf), [None] * num_full
                    waiting[following].append(there)
                better = here[:-1] < values[there][1:]
                values[there][1:][better] = here[:-1][better]
                for count in np.flatnonzero(better).tolist():
                    origins[there][count + 1] = history
    value, history = min(ends)
    if not np.isfinite(value):
        raise SearchError(f"no path of {num_steps} steps has {num_full} full ones")
    path: list[int] = []
    at: History | None = history
    for count in range(num_full - 1, -1, -1):
        assert at is not None, "a path has an origin for each of its full steps"
        path.append(at[0])
        at = origins[at][count]
    return tuple(reversed(path))


def _only_first(num_full: int) -> Floats:
    values = np.full(num_full, np.inf)
    values[0] = 0
    return values


def _joined(values: Floats, error: float, objective: Objective) -> Floats:
    return values + error if objective == "sum" else np.maximum(values, error)


def forecast_step(forward: Forward, order: int) -> Step:
    """Return a step that forecasts, for what it costs."""
    return Step(forward, None, (1.0, *(0.0,) * order)) if order else Step(forward)


def forecasts_of(problem: Problem) -> list[tuple[Forward, int]]:
    """Return what cached steps are tried: layers repeated or forecast, and the residual forecast, by order."""
    most = min(problem.options.max_order, 1 if problem.num_evaluations > LONG_TRAJECTORY else 2)
    orders = range(1, most + 1)
    return [(Forward.REUSE, 0), *((f, order) for f in (Forward.REUSE, Forward.RESIDUAL) for order in orders)]


def search(lab: Lab) -> list[Scored]:
    """Score the best paths of every order, by both objectives.

    Raises:
        SearchError: not one full step keeps to the limit.
    """
    problem, num_steps = lab.problem, lab.problem.num_evaluations
    objectives: tuple[Objective, ...] = ("sum", "largest")
    candidates = []
    for forward, order in forecasts_of(problem):
        fitted, cached = Fitted(lab.calibration, forward), forecast_step(forward, order)
        for objective in objectives:
            best = None
            for num_full in range(max(1, problem.max_full(cached)), num_steps + 1):
                path = shortest_path(fitted, num_steps, num_full, order, objective)
                plain = tuple(FULL if i in path else REUSE for i in range(num_steps))
                steps = with_forecasts(plain, order, fitted.weigh, forward) if order else plain
                longer = problem.candidate("shortest_path", f"{objective} of errors, {cached.kind}", steps)
                if not problem.fits(longer):
                    break
                best = longer
            candidates += [] if best is None else [best]
    if not candidates:
        raise SearchError(f"not one full step keeps to {problem.budget}")
    return lab.best(candidates)
