"""MagCache: full steps where the magnitude of the residual has drifted too far (arXiv:2506.09045, §3.3).

Calibration gives γ_t, the ratio of the residual's norms at neighbouring steps. Since the last full step, γ multiply to
a ratio, and |1 - ratio| add up to an error; a step is cached as long as the error is at most δ. The first tenth of all
steps is full. δ is the smallest that keeps to the limit. Deviation: no other bound on the number of cached steps in a
row, and layers are reused in place of the residual of the whole model.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from hemiola_runtime.schedule import FULL, REUSE, Step
from hemiola_search.calibration import Floats
from hemiola_search.lab import Lab
from hemiola_search.problem import Scored

RETENTION: Final = 0.1  # share of steps at the beginning that are full
NUM_THRESHOLDS: Final = 400


def steps_for(ratios: Floats, threshold: float) -> tuple[Step, ...]:
    """Return the schedule of one threshold δ, from ratios (T,)."""
    steps: list[Step] = []
    ratio, error, retained = 1.0, 0.0, _num_retained(ratios)
    for i, factor in enumerate(ratios.tolist()):
        ratio *= factor
        error += abs(1 - ratio)
        if i < retained or error > threshold:
            steps.append(FULL)
            ratio, error = 1.0, 0.0
        else:
            steps.append(REUSE)
    return tuple(steps)


def _num_retained(ratios: Floats) -> int:
    return max(1, math.ceil(RETENTION * len(ratios)))


def search(lab: Lab) -> list[Scored]:
    """Score the schedule of the smallest threshold that keeps to the limit.

    Raises:
        SearchError: none does.
    """
    problem, ratios = lab.problem, lab.calibration.residual_ratios
    largest = float(np.abs(1 - np.cumprod(ratios[_num_retained(ratios) :])).sum()) + 1  # at which all others are cached
    thresholds = np.geomspace(1e-5, largest, NUM_THRESHOLDS).tolist()
    found = problem.first_fitting(
        problem.candidate("magcache", f"δ = {threshold:.3g}", steps_for(ratios, threshold)) for threshold in thresholds
    )
    return lab.score([found])
