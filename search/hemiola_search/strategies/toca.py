"""ToCa: full steps at drifting intervals, and between them the tokens that matter most (arXiv:2410.05317).

The numbers are those of the released code, by model family and sampler. Its intervals are rounded to the nearest even
number where they lie between two, and decided at full steps. In the code every block decides anew, with the interval
that the first block has just set: a full step whose number the new interval does not divide is full in block 0 alone.
That quirk is an option here, `has_quirk`; such a step recomputes all tokens of block 0's MLP, but not its attention,
which `tokens` never computes.

Deviations: the interval N need not be whole, so that any limit can be filled; both rows of a guided image choose the
same tokens; where a block would recompute no token while others do, it recomputes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from hemiola_export.families.seams import CROSS
from hemiola_runtime.schedule import FULL, REUSE, Step, TokenSelector, tokens
from hemiola_search.errors import SearchError
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored

StepType = Literal["full", "first_block", "tokens"]
Activation = tuple[StepType, ...]

LONGEST: Final = 20.0  # interval that is tried
GRAIN: Final = 0.25  # between intervals that are tried


@dataclass(frozen=True, slots=True)
class Recipe:
    """The released numbers for a family and a sampler.

    Attributes:
        drift: w, by which intervals shrink from the first steps to the last.
        counts_down: whether the code counts steps from T - 1 to 0.
        has_sensitive_steps: whether the interval is 2 for a fifth of all steps, late in the middle.
        fresh_ratio: share of tokens that is recomputed, before the factors.
        layer: factor for the first and for the last block; linear between.
        step: factor for step number 0 and for number T, as the code counts; linear between.
        branch: factor for each branch.
        selector: how tokens are ranked; the weight of staleness is for N = 1.
    """

    drift: float
    counts_down: bool
    has_sensitive_steps: bool
    fresh_ratio: float
    layer: tuple[float, float]
    step: tuple[float, float]
    branch: dict[str, float]
    selector: TokenSelector


DIT_SELECTOR: Final = TokenSelector("attention", 0.25, 0.6, 2, 0)
PIXART_SELECTOR: Final = TokenSelector("cross_attention_entropy", 0.25, 0.4, 4, 0)
DDIM_50: Final = Recipe(0.4, True, True, 0.07, (0.8, 1.2), (3.0, -1.0), {"mlp": 2.5}, DIT_SELECTOR)
DDPM_250: Final = Recipe(0.4, True, True, 0.07, (1.8, 0.2), (1.4, 0.6), {"mlp": 2.5}, DIT_SELECTOR)
PIXART: Final = Recipe(0.2, False, False, 0.3, (1.6, 0.4), (1.9, 0.1), {"cross": 0.6, "mlp": 1.6}, PIXART_SELECTOR)


def recipe_of(problem: Problem) -> Recipe:
    """Return the released numbers that suit a model and a sampler; the square of the spatial bonus divides the grid."""
    of_dit = DDIM_50 if problem.num_evaluations <= 100 else DDPM_250
    recipe = PIXART if CROSS in problem.branches else of_dit
    size = math.gcd(recipe.selector.spatial_size, *problem.grid)
    return replace(recipe, selector=replace(recipe.selector, spatial_size=size))


def activation(num_steps: int, interval: float, recipe: Recipe, *, has_quirk: bool) -> Activation:
    """Decide which steps are full (ToCa's force activation).

    Args:
        num_steps: T.
        interval: N.
        recipe: the drift of the interval.
        has_quirk: degrade full steps that the interval they set does not divide.
    """
    found: list[StepType] = []
    period = 1
    for i in range(num_steps):
        number = num_steps - 1 - i if recipe.counts_down else i
        if i and number % period:
            found.append("tokens")
            continue
        slope = 2 * recipe.drift * number / num_steps
        divisor = 1 + recipe.drift - slope if recipe.counts_down else 1 - recipe.drift + slope
        period = max(1, round(interval / divisor))
        if recipe.has_sensitive_steps and int(0.2 * num_steps) <= number < int(0.4 * num_steps):
            period = 2
        is_degraded = has_quirk and i > 0 and number % period
        found.append("first_block" if is_degraded else "full")
    return tuple(found)


def token_counts(
    step: int, num_steps: int, num_blocks: int, num_tokens: int, recipe: Recipe
) -> tuple[tuple[int, ...], ...]:
    """Return K of every branch and block at one step: the share of tokens, rounded down."""
    number = num_steps - 1 - step if recipe.counts_down else step
    step_factor = _between(recipe.step, number / num_steps)
    shares = [
        [
            recipe.fresh_ratio * _between(recipe.layer, block / max(1, num_blocks - 1)) * step_factor * factor
            for block in range(num_blocks)
        ]
        for factor in recipe.branch.values()
    ]
    return tuple(tuple(int(min(1.0, max(0.0, share)) * num_tokens + 1e-9) for share in branch) for branch in shares)


def _between(ends: tuple[float, float], place: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * place


def selective_step(counts: tuple[tuple[int, ...], ...]) -> Step:
    """Return the step of some token counts: `reuse` where they are all 0."""
    if not any(count for branch in counts for count in branch):
        return REUSE
    return tokens(tuple(tuple(max(1, count) for count in branch) for branch in counts))


def candidate(problem: Problem, interval: float, *, has_quirk: bool) -> Candidate:
    """Return ToCa's schedule for an interval N."""
    recipe, num_steps = recipe_of(problem), problem.num_evaluations
    steps: list[Step] = []
    for i, kind in enumerate(activation(num_steps, interval, recipe, has_quirk=has_quirk)):
        counts = token_counts(i, num_steps, problem.num_blocks, problem.num_tokens, recipe)
        if kind == "first_block":
            counts = tuple((problem.num_tokens, *branch[1:]) for branch in counts)
        steps.append(FULL if kind == "full" else selective_step(counts))
    name = f"N = {interval:g}" + (" with the quirk" if has_quirk else "")
    return selective(problem, "toca", name, tuple(steps), interval)


def selective(problem: Problem, strategy: str, name: str, steps: tuple[Step, ...], interval: float) -> Candidate:
    """Make a candidate whose token steps reach all blocks, with ToCa's ranking for an interval N."""
    if not any(step.counts for step in steps):
        return Candidate(strategy, name, problem.num_inference_steps, steps)
    chosen = recipe_of(problem).selector
    selector = replace(chosen, staleness_weight=chosen.staleness_weight / interval)
    return Candidate(strategy, name, problem.num_inference_steps, steps, 0, selector)


def tightest(problem: Problem, make: Callable[[float], Candidate]) -> Candidate:
    """Return the candidate with the smallest interval that keeps to the limit.

    Raises:
        SearchError: none does.
    """
    return problem.first_fitting(make(1 + GRAIN * i) for i in range(int((LONGEST - 1) / GRAIN) + 1))


def search(lab: Lab) -> list[Scored]:
    """Score the schedules with the smallest intervals that keep to the limit, with the quirk and without.

    Raises:
        SearchError: no interval keeps to the limit.
    """
    problem, found = lab.problem, []
    for has_quirk in (False, True):
        try:
            found.append(tightest(problem, lambda n, q=has_quirk: candidate(problem, n, has_quirk=q)))  # type: ignore[misc]
        except SearchError:
            if has_quirk and not found:
                raise
    return lab.best(found)
