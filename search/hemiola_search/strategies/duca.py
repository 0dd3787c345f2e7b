"""DuCa: ToCa's full steps, and between them an aggressive and a conservative step in turn (arXiv:2412.18911).

In each period the first cached step, and every second one behind it, recomputes a twentieth of the tokens; those
between reuse everything. Deviations: the paper's aggressive step repeats the hidden state behind the last block, where
`reuse` sums all cached layers anew with the gates of its own step; and as in ToCa here, intervals need not be whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hemiola_export.families.seams import CROSS
from hemiola_runtime.schedule import FULL, REUSE, Step
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.strategies import toca

FRESH_RATIO: Final = 0.05  # of DiT, released
PIXART_FRESH_RATIO: Final = 0.75


def candidate(problem: Problem, interval: float) -> Candidate:
    """Return DuCa's schedule for an interval N."""
    released, num_steps = toca.recipe_of(problem), problem.num_evaluations
    recipe = replace(released, fresh_ratio=PIXART_FRESH_RATIO if CROSS in problem.branches else FRESH_RATIO)
    steps: list[Step] = []
    offset = 0
    for i, kind in enumerate(toca.activation(num_steps, interval, recipe, has_quirk=False)):
        offset = 0 if kind == "full" else offset + 1
        if offset % 2:
            counts = toca.token_counts(i, num_steps, problem.num_blocks, problem.num_tokens, recipe)
            steps.append(toca.selective_step(counts))
        else:
            steps.append(REUSE if offset else FULL)
    return toca.selective(problem, "duca", f"N = {interval:g}", tuple(steps), interval)


def search(lab: Lab) -> list[Scored]:
    """Score the schedule with the smallest interval that keeps to the limit.

    Raises:
        SearchError: no interval does.
    """
    return lab.score([toca.tightest(lab.problem, lambda interval: candidate(lab.problem, interval))])
