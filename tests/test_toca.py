"""ToCa and DuCa against what their papers and released code do; numbers of METHODS.md §14."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.schedule import FULL, REUSE, Forward, Step
from hemiola_search.errors import SearchError
from hemiola_search.problem import Problem
from hemiola_search.strategies import duca, toca
from hemiola_search.strategies.toca import DDIM_50, DDPM_250, PIXART, Recipe, activation, token_counts
from labs import DIT_XL_2, PIXART_XL_2, lab_of, paper_problem, plain, schedule_of
from strategies import examples

DIT = paper_problem(50)
OF_PIXART = paper_problem(20, flops=PIXART_XL_2)

# the steps


@pytest.mark.parametrize("has_quirk", [True, False])
def test_full_steps_of_dit_with_ddim_50_are_the_released_codes(has_quirk: bool) -> None:
    found = activation(50, 3, DDIM_50, has_quirk=has_quirk)
    by_number = {49 - i: kind for i, kind in enumerate(found) if kind != "tokens"}
    # as the code counts, down; 45 and 32 degrade to their first block
    assert list(by_number) == [49, 45, 44, 40, 36, 32, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    degraded = [number for number, kind in by_number.items() if kind == "first_block"]
    assert degraded == ([45, 32] if has_quirk else [])


@pytest.mark.parametrize("has_quirk", [True, False])
def test_full_steps_of_pixart_are_the_released_codes(has_quirk: bool) -> None:
    found = activation(20, 3, PIXART, has_quirk=has_quirk)
    assert [i for i, kind in enumerate(found) if kind != "tokens"] == [0, 4, 6, 9, 12, 15, 18]
    assert [i for i, kind in enumerate(found) if kind == "first_block"] == ([4] if has_quirk else [])
    num_full = sum(kind == "full" for kind in found) + found.count("first_block") / 28
    assert num_full == pytest.approx(6 + has_quirk / 28 + (not has_quirk))  # 6.04 with the quirk


def test_without_drift_every_nth_step_is_full() -> None:
    steady = replace(PIXART, drift=0.0)
    found = activation(20, 4, steady, has_quirk=True)
    assert [i for i, kind in enumerate(found) if kind == "full"] == [0, 4, 8, 12, 16]
    assert "first_block" not in found


@given(
    num_steps=st.integers(1, 60),
    interval=st.floats(1, 20),
    recipe=st.sampled_from([DDIM_50, DDPM_250, PIXART]),
    has_quirk=st.booleans(),
)
@examples(60)
def test_the_first_step_is_full_and_the_quirk_only_degrades(
    num_steps: int, interval: float, recipe: Recipe, has_quirk: bool
) -> None:
    found = activation(num_steps, interval, recipe, has_quirk=has_quirk)
    sane = activation(num_steps, interval, recipe, has_quirk=False)
    assert found[0] == "full"
    assert [kind == "tokens" for kind in found] == [kind == "tokens" for kind in sane]
    assert has_quirk or "first_block" not in found


# the tokens


@pytest.mark.parametrize(
    ("step", "of_21", "of_27"),
    [  # K of layers 21 and 27 at the selective steps of ProCache's released pattern
        (2, 0, 0),
        (6, 0, 0),
        (10, 0, 0),
        (14, 9, 10),
        (18, 25, 27),
        (22, 41, 45),
        (26, 57, 62),
        (29, 69, 75),
        (32, 81, 88),
        (35, 93, 101),
    ],
)
def test_token_counts_of_dit_with_ddim_50_are_the_released_codes(step: int, of_21: int, of_27: int) -> None:
    (mlp,) = token_counts(step, 50, 28, 256, DDIM_50)
    assert (mlp[21], mlp[27]) == (of_21, of_27)


@pytest.mark.parametrize(
    ("step", "block", "cross", "mlp"),
    [
        (1, 0, 0.52, 1.0),  # 0.3 · 1.6 · 1.81 · 1.6 is 1.39
        (1, 13, 0.33, 0.89),
        (1, 21, 0.22, 0.58),
        (1, 27, 0.13, 0.35),
        (10, 0, 0.29, 0.77),
        (10, 13, 0.18, 0.49),
        (10, 21, 0.12, 0.32),
        (10, 27, 0.07, 0.19),
        (19, 0, 0.055, 0.15),
        (19, 13, 0.035, 0.09),
        (19, 21, 0.023, 0.06),
        (19, 27, 0.014, 0.04),
    ],
)
def test_shares_of_tokens_of_pixart_are_the_released_codes(step: int, block: int, cross: float, mlp: float) -> None:
    counts = token_counts(step, 20, 28, 10**6, PIXART)
    assert counts[0][block] / 1e6 == pytest.approx(cross, abs=0.0051 if cross > 0.06 else 0.0006)
    assert counts[1][block] / 1e6 == pytest.approx(mlp, abs=0.006)


def test_early_steps_of_ddim_50_recompute_nothing_and_so_reuse() -> None:
    # 1 + 2 - 4 · 38 / 50 is -0.04: up to step 11, which the code calls 38, every K is 0
    steps = toca.candidate(DIT, 3, has_quirk=False).steps
    assert {step.forward for step in steps[:12]} == {Forward.FULL, Forward.REUSE}
    assert [step for step in steps[12:] if step.forward is Forward.REUSE] == []


def test_a_block_whose_share_is_less_than_a_token_recomputes_one() -> None:
    # 0.07 · 0.8 · 0.04 · 2.5 · 256 = 1.4 tokens at step 12 in the first block of 256 tokens, 0.09 of 16
    step = toca.selective_step(token_counts(12, 50, 28, 16, DDIM_50))
    assert step == REUSE
    step = toca.selective_step(((0, 0, 5), (0, 0, 0)))
    assert step.tokens == ((1, 1, 5), (1, 1, 1))


def test_a_degraded_step_recomputes_all_tokens_of_the_first_block() -> None:
    step = toca.candidate(DIT, 3, has_quirk=True).steps[17]  # the code's 32
    assert isinstance(step.tokens, tuple)
    (mlp,) = step.tokens
    assert mlp[0] == 256
    assert mlp[1:] == token_counts(17, 50, 28, 256, DDIM_50)[0][1:]


# what it costs


def _published_tera_flops(num_steps: int, interval: float, recipe: Recipe, *, has_quirk: bool) -> float:
    """Count as the papers do: a degraded step computes all of the first block, its attention included."""
    cached = DIT_XL_2.step(REUSE, None, None)
    total = 0.0
    for i, kind in enumerate(activation(num_steps, interval, recipe, has_quirk=has_quirk)):
        (counts,) = token_counts(i, num_steps, 28, 256, recipe)
        mlp = 16 * 1152**2  # of a token, METHODS.md §14.1
        if kind == "full":
            total += DIT_XL_2.step(FULL, None, None)
        elif kind == "tokens":
            total += cached + 2 * mlp * sum(counts) / 1e9
        else:
            attention = 8 * 256 * 1152**2 + 4 * 256**2 * 1152
            total += cached + 2 * (attention + mlp * (256 + sum(counts[1:]))) / 1e9
    return total / 1e3


@pytest.mark.parametrize(
    ("num_steps", "interval", "recipe", "has_quirk", "published"),
    [
        (50, 3, DDIM_50, True, 10.239),  # the paper says 10.23
        (50, 3, DDIM_50, False, 11.130),
        (50, 4, DDIM_50, True, 8.739),
        (50, 4, DDIM_50, False, 9.957),
        (250, 4, DDPM_250, True, 43.461),  # measured by a user: 43.42
    ],
)
def test_schedules_cost_what_the_papers_say(
    num_steps: int, interval: float, recipe: Recipe, has_quirk: bool, published: float
) -> None:
    found = _published_tera_flops(num_steps, interval, recipe, has_quirk=has_quirk)
    assert found == pytest.approx(published, abs=0.0005)


@pytest.mark.parametrize(
    ("num_steps", "interval", "has_quirk", "tera_flops"),
    [  # those of above, less the attention of the first block at each degraded step, 2 · 3.02 GFLOP
        (50, 3, True, 10.228),  # twice: but at step 4 the other blocks recompute nothing there, and one token here
        (50, 3, False, 11.130),
        (50, 4, True, 8.722),
        (50, 4, False, 9.957),
        (250, 4, True, 43.449),
    ],
)
def test_schedules_that_can_be_run_cost_less_attention(
    num_steps: int, interval: float, has_quirk: bool, tera_flops: float
) -> None:
    candidate = toca.candidate(paper_problem(num_steps), interval, has_quirk=has_quirk)
    assert paper_problem(num_steps).cost(candidate) / 1e3 == pytest.approx(tera_flops, abs=0.0005)


# the candidates


@pytest.mark.parametrize("problem", [DIT, OF_PIXART], ids=["dit", "pixart"])
def test_tokens_are_ranked_as_the_papers_do(problem: Problem) -> None:
    selector = toca.candidate(problem, 3, has_quirk=True).selector
    assert selector is not None
    if problem is DIT:
        assert (selector.score, selector.spatial_bonus, selector.spatial_size) == ("attention", 0.6, 2)
    else:
        assert (selector.score, selector.spatial_bonus, selector.spatial_size) == ("cross_attention_entropy", 0.4, 4)
    assert selector.staleness_weight == pytest.approx(0.25 / 3)  # λ3 · n / N


def test_squares_of_the_spatial_bonus_divide_the_grid() -> None:
    odd = replace(OF_PIXART, grid=(6, 10))
    assert toca.recipe_of(odd).selector.spatial_size == 2  # of 4, 6 and 10
    assert toca.recipe_of(replace(OF_PIXART, grid=(5, 16))).selector.spatial_size == 1


def test_long_trajectories_follow_the_recipe_of_ddpm() -> None:
    assert replace(toca.recipe_of(paper_problem(250)), selector=DDPM_250.selector) == DDPM_250
    assert replace(toca.recipe_of(DIT), selector=DDIM_50.selector) == DDIM_50


@pytest.mark.parametrize(
    "asked",
    [
        *(paper_problem(50, budget) for budget in ("18", "2.3x", "4x", "1.2x")),
        *(paper_problem(20, budget, flops=PIXART_XL_2) for budget in ("10", "7", "2.3x", "1.2x")),
    ],
    ids=lambda asked: f"{len(asked.branches)} branches, {asked.budget}",
)
def test_the_smallest_interval_that_keeps_to_the_limit_is_taken(asked: Problem) -> None:
    found = {scored.candidate.name: scored.candidate for scored in toca.search(lab_of(asked))}
    assert sorted("quirk" in name for name in found) == [False, True]
    for name, candidate in found.items():
        assert schedule_of(candidate).steps[0] == FULL
        assert asked.fits(candidate)
        interval, has_quirk = float(name.split()[2]), "quirk" in name
        assert toca.candidate(asked, interval, has_quirk=has_quirk) == candidate
        smaller = [1 + 0.25 * i for i in range(round((interval - 1) / 0.25))]
        assert not any(asked.fits(toca.candidate(asked, n, has_quirk=has_quirk)) for n in smaller)


def test_a_limit_below_every_interval_is_refused() -> None:
    # the longest interval is 20: of 50 steps, more than one is full
    for strategy in (toca, duca):
        with pytest.raises(SearchError, match="no such schedule keeps to 1 full"):
            strategy.search(lab_of(paper_problem(50, "1")))


# DuCa


def test_duca_recomputes_tokens_at_every_second_cached_step_and_nothing_between() -> None:
    candidate = duca.candidate(DIT, 5)
    full = [i for i, step in enumerate(candidate.steps) if step == FULL]
    sane = activation(50, 5, DDIM_50, has_quirk=False)
    assert full == [i for i, kind in enumerate(sane) if kind == "full"]
    late = [segment for i, segment in enumerate(plain(candidate).split("F")) if i > 4]
    assert set(late) <= {"SCSC"[:n] for n in range(5)}
    assert any(len(segment) > 2 for segment in late)


@pytest.mark.parametrize(
    ("problem", "step", "fresh_ratio"), [(DIT, 40, 0.05), (OF_PIXART, 1, 0.75)], ids=["dit", "pixart"]
)
def test_duca_recomputes_its_own_share_of_tokens(problem: Problem, step: int, fresh_ratio: float) -> None:
    num_steps = problem.num_evaluations
    recipe = replace(toca.recipe_of(problem), fresh_ratio=fresh_ratio)
    found: Step = next(step for step in duca.candidate(problem, 4).steps[step:] if step.forward is Forward.TOKENS)
    place = duca.candidate(problem, 4).steps.index(found, step)
    assert found == toca.selective_step(token_counts(place, num_steps, 28, 256, recipe))


@pytest.mark.parametrize("budget", ["12", "2.5x", "4x"])
def test_duca_takes_the_smallest_interval_that_keeps_to_the_limit(budget: str) -> None:
    asked = paper_problem(50, budget)
    (scored,) = duca.search(lab_of(asked))
    candidate, interval = scored.candidate, float(scored.candidate.name.split()[-1])
    assert schedule_of(candidate).steps[0] == FULL
    assert asked.fits(candidate)
    smaller = [1 + 0.25 * i for i in range(round((interval - 1) / 0.25))]
    assert not any(asked.fits(duca.candidate(asked, n)) for n in smaller)
