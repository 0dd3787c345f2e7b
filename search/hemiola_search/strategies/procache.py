"""ProCache: constraint-aware search of monotone schedules, then selective steps (arXiv:2512.17298 §3.2, §3.3).

Deviations: the paper samples K = 5 patterns and scores them by FID or CLIP score; the space is small enough to score
whole, or a regular sample of it, and the relative L2 error of the final latents against the uncached run needs no
thousand images. Selective steps cost something, and so their rhythms may have a full step less.
"""

from __future__ import annotations

from itertools import groupby
from typing import Final

from hemiola_runtime.schedule import REUSE, Step
from hemiola_search.errors import SearchError
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Effort, Problem, Scored
from hemiola_search.rhythms import (
    Constraints,
    default_v_max,
    monotone_rhythms,
    sampled,
    steps_from_segments,
    with_selective_steps,
)

MAX_RHYTHMS: Final[dict[Effort, int]] = {"quick": 10, "thorough": 64}
MAX_SELECTIVE: Final[dict[Effort, int]] = {"quick": 2, "thorough": 16}


def constraints_of(problem: Problem, budget: int) -> Constraints:
    """Return the space that is searched for a budget of full steps."""
    options, num_steps = problem.options, problem.num_evaluations
    v_max = default_v_max(num_steps, budget) if options.v_max is None else options.v_max
    return Constraints(num_steps, budget, options.v_min, v_max)


def plain_candidates(problem: Problem) -> list[Candidate]:
    """Return the monotone rhythms with as many full steps as the limit allows, and cached steps between.

    Raises:
        SearchError: no rhythm meets the constraints.
    """
    budget = problem.max_full(REUSE)
    if budget == 0:
        raise SearchError(f"not one full step keeps to {problem.budget}")
    rhythms = sampled(monotone_rhythms(constraints_of(problem, budget)), MAX_RHYTHMS[problem.options.effort])
    return [problem.candidate("procache", name_of(rhythm), steps_from_segments(rhythm)) for rhythm in rhythms]


def _selective_candidates(problem: Problem, selective: Step) -> list[Candidate]:
    """Return rhythms with selective steps that keep to the limit, with as many full steps as those may have."""
    for budget in range(problem.max_full(REUSE), 0, -1):
        try:
            rhythms = monotone_rhythms(constraints_of(problem, budget))
        except SearchError:
            continue
        found = [
            problem.candidate(
                "procache", f"{name_of(rhythm)} selective", with_selective_steps(steps_from_segments(rhythm), selective)
            )
            for rhythm in rhythms
        ]
        if fitting := [candidate for candidate in found if problem.fits(candidate)]:
            return sampled(fitting, MAX_SELECTIVE[problem.options.effort])
    return []


def search(lab: Lab) -> list[Scored]:
    """Score monotone schedules with plain reuse, and such with selective steps.

    Raises:
        SearchError: no schedule meets the constraints.
    """
    problem = lab.problem
    candidates = plain_candidates(problem)
    if problem.selective_step is not None:
        candidates += _selective_candidates(problem, problem.selective_step)
    return lab.best(candidates)


def name_of(segments: tuple[int, ...]) -> str:
    """Name a rhythm by its segment lengths and how many stand in a row, as in `4×6 3×4 2×7`."""
    return " ".join(f"{length}×{len(list(run))}" for length, run in groupby(segments))
