"""Learning-to-Cache: full steps at even distances, and between them only the layers that change (arXiv:2406.01733).

Deviations: the paper trains a router for every second step; here one mask serves all steps between full ones, since
every mask is a graph of its own, and it is found by calibration: layers are computed in the order of how much they
change behind their gates since the last full step, for what they cost, as far as the limit goes. The paper's full steps
are every second one, which bounds it to 2×; here longer periods are tried too.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from hemiola_runtime.schedule import CACHED, COMPUTED, FULL, MASKED, Step
from hemiola_search.calibration import MAX_LAG, Floats
from hemiola_search.errors import SearchError
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.strategies.uniform import uniform

MORE_PERIODS: Final = (0, 1, 2, 4)  # beyond the smallest that keeps to the limit without a mask


def layer_changes(changes: Floats, period: int) -> Floats:
    """Return how much each layer changes since the last full step, (M, L), of changes (MAX_LAG, T, M, L)."""
    cached = [(min(i % period, MAX_LAG) - 1, i) for i in range(changes.shape[1]) if i % period]
    return np.asarray(np.mean([changes[place] for place in cached], axis=0))


def with_mask(problem: Problem, period: int, changes: Floats) -> Candidate | None:
    """Return the schedule of one period with the largest mask that keeps to the limit; None if no layer does."""
    steps: tuple[Step, ...] = tuple(FULL if i % period == 0 else MASKED for i in range(problem.num_evaluations))
    importance = layer_changes(changes, period)
    chosen = np.zeros(importance.shape, dtype=bool)
    prices = np.array([[_price(problem, importance.shape, m) for _ in row] for m, row in enumerate(importance)])
    best = None
    for place in np.argsort(-importance / prices, axis=None):
        chosen.flat[place] = True
        mask = _letters(chosen)
        candidate = Candidate(
            "learning_to_cache",
            f"period {period}, {chosen.sum()} of {chosen.size} layers",
            problem.num_inference_steps,
            steps,
            mask=mask,
        )
        if not problem.fits(candidate):
            break
        best = candidate
    return best


def _price(problem: Problem, shape: tuple[int, ...], branch: int) -> float:
    """Return what computing one layer costs, and not nothing."""
    one = np.zeros(shape, dtype=bool)
    one[branch, 0] = True
    return max(1e-12, problem.costs.step(MASKED, None, _letters(one)))


def _letters(chosen: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[str, ...]:
    return tuple("".join(COMPUTED if layer else CACHED for layer in row) for row in chosen)


def search(lab: Lab) -> list[Scored]:
    """Score one schedule for each of a few periods.

    Raises:
        SearchError: no layer can be computed within the limit.
    """
    problem = lab.problem
    first = uniform(problem).rhythm.find("F", 1)
    if first < 1:
        raise SearchError(f"no step between full ones keeps to {problem.budget}")
    changes = lab.calibration.layer_changes
    periods = [first + more for more in MORE_PERIODS if 2 <= first + more < problem.num_evaluations]
    found = [with_mask(problem, period, changes) for period in periods]
    if not (candidates := [candidate for candidate in found if candidate is not None]):
        raise SearchError(f"no layer can be computed between full steps within {problem.budget}")
    return lab.best(candidates)
