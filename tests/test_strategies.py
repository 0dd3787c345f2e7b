from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_export.errors import UnsupportedSolverError
from hemiola_export.solver import measure_solver
from hemiola_runtime.schedule import FULL, REUSE, Forward, SchedulerIdentity, TokenSelector
from hemiola_runtime.solver_table import SolverTable
from hemiola_search.costs import FlopsModel
from hemiola_search.errors import SearchError
from hemiola_search.problem import Candidate, Problem, Scored, SearchOptions, first_deep_block
from hemiola_search.rhythms import Constraints, monotone_rhythms
from hemiola_search.strategies import BASELINES, STRATEGIES, fewer_steps, procache, uniform
from strategies import examples

Table = Callable[[int], SolverTable]


def _table_of(evaluations: Callable[[int], int]) -> Table:
    """Make tables of a sampler that takes so many evaluations for so many steps; 0 is a number that it refuses."""

    def table(num_steps: int) -> SolverTable:
        count = evaluations(num_steps)
        if not count:
            raise UnsupportedSolverError(f"no {num_steps} steps")
        identity = SchedulerIdentity("FakeScheduler", {}, num_steps, tuple(float(t) for t in reversed(range(count))))
        return SolverTable(1, identity, 1.0, (1.0,) * count, (((1.0, 0.0),),) * count, 0.0)

    return table


SINGLE_STEP = _table_of(lambda num_steps: num_steps)


def _problem(num_steps: int, budget: int, table: Table = SINGLE_STEP, **options: Any) -> Problem:
    chosen: dict[str, Any] = {
        "v_min": 1,
        "v_max": None,
        "selective": "tokens",
        "token_ratio": 0.15,
        "deep_ratio": 0.25,
        "selector": TokenSelector("value_norm", 0.0, 0.0, 1, 0),
        "guidance_scale": 4.0,
        "num_images": 2,
        "num_held_out": 2,
        "seed": 0,
    }
    return Problem(
        table=table,
        num_inference_steps=num_steps,
        guidance="classifier_free",
        options=SearchOptions(budget=budget, **(chosen | options)),
        latent_shape=(4, 8, 8),
        num_blocks=28,
        num_tokens=256,
        flops=FlopsModel(1152, 256, 28, 21, 2),
    )


def _rhythm(candidate: Candidate) -> str:
    return "".join(step.forward.symbol for step in candidate.steps)


class FakeScore:
    """Gives every rhythm the error of a table, 1 if it has none; records what was scored."""

    def __init__(self, errors: dict[str, float] | None = None) -> None:
        self.errors = errors or {}
        self.scored: list[str] = []

    def __call__(self, candidate: Candidate) -> Scored:
        self.scored.append(_rhythm(candidate))
        return Scored(candidate, {"relative_l2": self.errors.get(self.scored[-1], 1.0)})


# The rhythms of 8 steps with 3 full ones and 1 to 3 cached after each: 4-2-2 and 3-3-2.
EIGHT = {"procache_a": "FCCCFCFC", "procache_b": "FCCFCCFC"}


@pytest.mark.parametrize(("best", "injected"), [(EIGHT["procache_a"], "FCSCFCFC"), (EIGHT["procache_b"], "FCSFCSFC")])
def test_procache_injects_selective_steps_into_the_rhythm_of_lowest_error(best: str, injected: str) -> None:
    score = FakeScore({best: 0.1})
    first, *others = procache.search(_problem(8, 3, v_max=3), score)
    assert _rhythm(first.candidate) == injected
    assert first.candidate.name.endswith(" selective")
    assert _rhythm(others[0].candidate) == best
    assert score.scored == ["FCCCFCFC", "FCCFCCFC", injected]  # every plain one, and only the best injected


def test_procache_returns_what_it_tried_from_lowest_error_to_highest() -> None:
    space = monotone_rhythms(Constraints(20, 6, 1, 5))
    rhythms = ["".join("F" + "C" * (length - 1) for length in segments) for segments in space]
    score = FakeScore({rhythm: 1 / (i + 1) for i, rhythm in enumerate(rhythms)})  # the last enumerated is the best
    tried = procache.search(_problem(20, 6, v_max=5, selective="none"), score)
    assert [_rhythm(scored.candidate) for scored in tried] == rhythms[::-1]
    assert len(rhythms) > 3
    assert len({scored.candidate.name for scored in tried}) == len(rhythms)


@pytest.mark.parametrize(
    ("selective", "forward", "count"),
    [
        ("tokens", Forward.TOKENS, 38),  # 0.15 · 256 = 38.4
        ("deep", Forward.DEEP, None),
    ],
)
def test_a_selective_step_is_what_the_options_say(selective: str, forward: Forward, count: int | None) -> None:
    best = procache.search(_problem(8, 3, v_max=3, selective=selective), FakeScore())[0].candidate
    injected = [step for step in best.steps if step.forward not in (Forward.FULL, Forward.REUSE)]
    assert {(step.forward, step.tokens) for step in injected} == {(forward, count)}
    assert best.is_deep
    assert best.is_selective == (forward is Forward.TOKENS)


def test_without_selective_steps_procache_only_caches() -> None:
    score = FakeScore({"FCCFCCFC": 0.1})
    best = procache.search(_problem(8, 3, v_max=3, selective="none"), score)[0].candidate
    assert _rhythm(best) == "FCCFCCFC"
    assert not best.is_deep
    assert set("".join(score.scored)) == {"F", "C"}


def test_a_tiny_share_of_tokens_still_is_one_token() -> None:
    best = procache.search(_problem(8, 3, v_max=3, token_ratio=0.0001), FakeScore())[0].candidate
    assert {step.tokens for step in best.steps if step.forward is Forward.TOKENS} == {1}


@pytest.mark.parametrize(("v_max", "expected"), [(None, 3), (5, 5)])
def test_the_longest_reuse_is_the_users_or_the_mean_segment(v_max: int | None, expected: int) -> None:
    assert procache.constraints_of(_problem(50, 17, v_max=v_max)) == Constraints(50, 17, 1, expected)


def test_procache_counts_model_evaluations_and_not_steps() -> None:
    heun = _table_of(lambda num_steps: 2 * num_steps - 1)
    best = procache.search(_problem(6, 4, heun, v_max=3), FakeScore())[0].candidate
    assert len(best.steps) == 11
    assert best.num_steps == 6
    assert best.steps.count(FULL) == 4


def test_constraints_that_no_schedule_meets_are_refused_before_anything_is_scored() -> None:
    score = FakeScore()
    with pytest.raises(SearchError, match="Nearest that work: a budget from 13 to 25"):
        procache.search(_problem(50, 30, v_max=3), score)
    assert score.scored == []


@pytest.mark.parametrize(
    ("num_steps", "budget", "rhythm"),
    [
        (50, 17, "FCC" * 16 + "FC"),  # ⌈50 / 3⌉ = 17
        (50, 18, "FC" * 25),  # every third step would be 17 full ones, one too few
        (50, 13, "FCCC" * 12 + "FC"),  # ⌈50 / 4⌉ = 13
        (6, 6, "FFFFFF"),
        (6, 1, "FCCCCC"),
        (1, 1, "F"),
    ],
)
def test_fora_computes_every_nth_step(num_steps: int, budget: int, rhythm: str) -> None:
    (only,) = uniform.search(_problem(num_steps, budget), FakeScore())
    assert _rhythm(only.candidate) == rhythm
    assert only.candidate.num_steps == num_steps


@given(budget=st.integers(1, 40), more=st.integers(0, 40))
@examples(60)
def test_fora_has_at_least_the_budgets_full_steps_and_no_more_than_a_period_must(budget: int, more: int) -> None:
    num_steps = budget + more
    steps = uniform.uniform_steps(num_steps, budget)
    full = [i for i, step in enumerate(steps) if step == FULL]
    period = full[1] if len(full) > 1 else num_steps
    assert full == list(range(0, num_steps, period))
    assert all(step == REUSE for i, step in enumerate(steps) if i not in full)
    possible = {len(range(0, num_steps, n)) for n in range(1, num_steps + 1)}
    assert len(full) == min(count for count in possible if count >= budget)


@pytest.mark.parametrize(
    ("evaluations", "budget", "num_steps"),
    [
        (lambda n: n, 17, 17),  # DDIM
        (lambda n: 2 * n - 1, 17, 9),  # Heun: two for every step but the last
        (lambda n: 2 * n - 1, 16, 8),  # 9 steps would be 17
        (lambda n: n + 1, 17, 16),  # PNDM: one step is done twice
        (lambda n: 0 if n in (15, 16, 17) else n, 17, 14),  # refuses some numbers of steps
    ],
)
def test_fewer_steps_takes_as_many_steps_as_fit(evaluations: Callable[[int], int], budget: int, num_steps: int) -> None:
    problem = _problem(50, budget, _table_of(evaluations))
    (only,) = fewer_steps.search(problem, FakeScore())
    assert only.candidate.num_steps == num_steps
    assert only.candidate.steps == (FULL,) * evaluations(num_steps)


@pytest.mark.parametrize(
    ("scheduler", "budget", "num_steps", "evaluations"),
    [
        (diffusers.DDIMScheduler(clip_sample=False), 5, 5, 5),
        (diffusers.HeunDiscreteScheduler(), 5, 3, 5),
        (diffusers.HeunDiscreteScheduler(), 4, 2, 3),
        (diffusers.PNDMScheduler(skip_prk_steps=True), 6, 5, 6),
    ],
    ids=["ddim", "heun", "heun between", "pndm"],
)
def test_fewer_steps_fits_diffusers_samplers_into_a_budget(
    scheduler: Any, budget: int, num_steps: int, evaluations: int
) -> None:
    problem = _problem(8, budget, lambda count: measure_solver(scheduler, count))
    (only,) = fewer_steps.search(problem, FakeScore())
    assert (only.candidate.num_steps, len(only.candidate.steps)) == (num_steps, evaluations)


def test_a_sampler_that_always_takes_more_than_the_budget_is_refused_by_name() -> None:
    problem = _problem(50, 5, _table_of(lambda num_steps: num_steps + 10))
    with pytest.raises(SearchError, match="FakeScheduler cannot do with 5 model evaluations"):
        fewer_steps.search(problem, FakeScore())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_begins_with_a_full_step_and_scores_what_it_returns(name: str) -> None:
    score = FakeScore()
    found = STRATEGIES[name](_problem(20, 7, v_max=3), score)
    assert sorted(_rhythm(scored.candidate) for scored in found) == sorted(score.scored)
    assert {scored.candidate.strategy for scored in found} == {name}
    assert all(scored.candidate.steps[0] == FULL for scored in found)


def test_the_baselines_are_strategies_that_do_not_search() -> None:
    assert BASELINES == ("uniform", "fewer_steps")
    assert set(BASELINES) < set(STRATEGIES)


@pytest.mark.parametrize(
    ("num_blocks", "deep_ratio", "deep_start"), [(28, 0.25, 21), (12, 0.25, 9), (4, 1.0, 0), (4, 0.0, 4)]
)
def test_a_share_of_the_blocks_is_deep(num_blocks: int, deep_ratio: float, deep_start: int) -> None:
    assert first_deep_block(num_blocks, deep_ratio) == deep_start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ratio": 0.0}, "token_ratio lies above 0"),
        ({"token_ratio": 1.1}, "token_ratio lies above 0"),
        ({"deep_ratio": -0.1}, "deep_ratio from 0"),
        ({"deep_ratio": 1.1}, "deep_ratio from 0"),
        ({"num_images": 0}, "scores on 1 image or more"),
        ({"num_held_out": 1}, "reports on 2 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        _problem(50, 17, **options)
