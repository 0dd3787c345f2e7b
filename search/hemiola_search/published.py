"""Published: the rhythm that ProCache's authors released for a sampler and a budget (arXiv:2512.17298, their code).

It was found on another model than this one, or on its real weights: the one choice where nothing can be measured.
"""

from __future__ import annotations

from typing import Final

from hemiola_export.model import Model
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import Schedule
from hemiola_search.errors import SearchError
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.rhythms import steps_from_segments, with_selective_steps
from hemiola_search.schedules import schedule_of

UNMEASURED: Final = "published"  # name of the strategy that runs nothing
RHYTHMS: Final[dict[tuple[int, int], tuple[int, ...]]] = {  # (steps, full steps) → segment lengths
    (50, 17): (4,) * 6 + (3,) * 4 + (2,) * 7,  # DiT-XL/2, DDIM
    (20, 7): (3,) * 6 + (2,),  # PixArt-α, DPM-Solver++, as it was meant to be
}


def published_candidate(problem: Problem) -> Candidate:
    """Return the published rhythm with the selective steps that the options ask for.

    Raises:
        SearchError: none was published for these numbers.
    """
    key = (problem.num_evaluations, problem.max_full())
    if key not in RHYTHMS:
        known = ", ".join(f"{budget} full of {steps}" for steps, budget in RHYTHMS)
        raise SearchError(f"no rhythm was published with {key[1]} full of {key[0]} steps; there are {known}")
    steps = steps_from_segments(RHYTHMS[key])
    if problem.selective_step is not None:
        steps = with_selective_steps(steps, problem.selective_step)
    return problem.candidate("published", "ProCache", steps)


def unmeasured_schedule(model: Model, problem: Problem) -> Schedule:
    """Return the published schedule without drawing a single image: on random weights there is nothing to judge.

    Raises:
        SearchError: none was published for these numbers.
        UnsupportedSolverError: the sampler cannot be compiled.
    """
    return schedule_of(model, problem, Scored(published_candidate(problem), {}, {}), MadeBy.here("torch", "diffusers"))
