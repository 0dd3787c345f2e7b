"""ProCache: constraint-aware search of monotone schedules, then selective steps (arXiv:2512.17298 §3.2, §3.3).

Deviations: the paper samples K = 5 patterns and scores them by FID or CLIP score; the space is small enough to score
whole, and the relative L2 error of the final latents against the uncached run needs no thousand images.
"""

from __future__ import annotations

from itertools import groupby

from hemiola_search.problem import Candidate, Problem, Score, Scored
from hemiola_search.rhythms import (
    Constraints,
    default_v_max,
    monotone_rhythms,
    steps_from_segments,
    with_selective_steps,
)


def constraints_of(problem: Problem) -> Constraints:
    """Return the space that is searched."""
    options, num_steps = problem.options, problem.num_evaluations
    v_max = default_v_max(num_steps, options.budget) if options.v_max is None else options.v_max
    return Constraints(num_steps, options.budget, options.v_min, v_max)


def search(problem: Problem, score: Score) -> list[Scored]:
    """Score every monotone schedule with plain reuse, then inject selective steps into the best.

    Raises:
        SearchError: no schedule meets the constraints.
    """
    plain = [
        score(
            Candidate(
                "procache",
                _name(segments),
                problem.scheduler.num_inference_steps,
                steps_from_segments(segments),
            )
        )
        for segments in monotone_rhythms(constraints_of(problem))
    ]
    plain.sort(key=lambda scored: scored.quality["relative_l2"])
    if problem.selective_step is None:
        return plain
    best = plain[0].candidate
    steps = with_selective_steps(best.steps, problem.selective_step)
    return [score(Candidate("procache", f"{best.name} selective", best.num_steps, steps)), *plain]


def _name(segments: tuple[int, ...]) -> str:
    """Name a rhythm by its segment lengths and how many stand in a row, as in `4×6 3×4 2×7`."""
    return " ".join(f"{length}×{len(list(run))}" for length, run in groupby(segments))
