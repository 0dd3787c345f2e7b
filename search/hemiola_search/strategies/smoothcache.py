"""SmoothCache: as long a pause behind every full step as the layers' errors allow (arXiv:2411.10510, §3).

The error of reusing layers for j steps is the relative L1 by which they change, from a calibration. Behind a full step
as many steps are cached as have an error of at most α; α is the smallest that keeps to the limit. Deviations: one
schedule for all types of layers, by the mean of their errors (the released ones are equal for both types of DiT);
pauses of up to MAX_LAG steps in place of three.
"""

from __future__ import annotations

import numpy as np

from hemiola_runtime.schedule import FULL, REUSE, Step
from hemiola_search.calibration import MAX_LAG, Floats
from hemiola_search.lab import Lab
from hemiola_search.problem import Scored


def steps_for(errors: Floats, threshold: float) -> tuple[Step, ...]:
    """Return the schedule of one threshold.

    Args:
        errors: (MAX_LAG, T), errors[k, t] of reusing at step t what was computed k + 1 steps before.
        threshold: α.
    """
    num_steps = errors.shape[1]
    steps: list[Step] = []
    while (start := len(steps)) < num_steps:
        pause = 0
        while pause < MAX_LAG and start + pause + 1 < num_steps and errors[pause, start + pause + 1] <= threshold:
            pause += 1
        steps += [FULL, *[REUSE] * pause]
    return tuple(steps)


def search(lab: Lab) -> list[Scored]:
    """Score the schedule of the smallest threshold that keeps to the limit.

    Raises:
        SearchError: none does.
    """
    problem = lab.problem
    errors = lab.calibration.layer_errors.mean(axis=(2, 3))  # (MAX_LAG, T)
    found = problem.first_fitting(
        problem.candidate("smoothcache", f"α = {threshold:.3g}", steps_for(errors, threshold))
        for threshold in np.unique(errors).tolist()
    )
    return lab.score([found])
