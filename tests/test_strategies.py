"""What all strategies have in common, and those that schedules are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_export.solver import measure_solver
from hemiola_runtime.schedule import FULL, REUSE
from hemiola_search.budget import Budget
from hemiola_search.costs import FlopsModel, MeasuredCosts
from hemiola_search.errors import SearchError
from hemiola_search.lab import Lab
from hemiola_search.problem import Problem
from hemiola_search.published import published_candidate
from hemiola_search.strategies import EXPECTED, STRATEGIES, fewer_steps, uniform
from labs import (
    DIT_XL_2,
    PIXART_XL_2,
    FakeWorkers,
    calibration_of,
    cost_row,
    cost_table,
    lab_of,
    paper_problem,
    plain,
    schedule_of,
    table_of,
)
from strategies import examples

SMALL: Final = FlopsModel(width=64, num_tokens=64, num_blocks=4, rows_per_image=2)
HEUN: Final = table_of(lambda num_steps: 2 * num_steps - 1)
MEASURED: Final = MeasuredCosts(  # with forecasts that are cheaper than plain reuse, as noise may have it
    [
        cost_table([cost_row("full", 10), cost_row("reuse", 2), cost_row("reuse_1", 1.5), cost_row("reuse_2", 1)]),
        cost_table([cost_row("full", 11), cost_row("deep", 6), cost_row("tokens", 3, tokens=9)], deep_start=3),
        cost_table([cost_row("full", 13), cost_row("tokens", 4, tokens=9)], deep_start=0),
    ],
    SMALL,
    batch_size=1,
)
PROBLEMS: Final = {
    "dit": lambda **options: paper_problem(20, "7", flops=SMALL, **options),
    "dit, speed-up": lambda **options: paper_problem(20, "2.2x", flops=SMALL, **options),
    "pixart": lambda **options: paper_problem(20, "7", flops=PIXART_XL_2, **options),
    "long": lambda **options: paper_problem(110, "40", flops=SMALL, **options),
    "measured": lambda **options: paper_problem(20, "130ms", flops=SMALL, costs=MEASURED, **options),
    "more evaluations": lambda **options: paper_problem(8, "5", flops=SMALL, table=HEUN, **options),
}
SLOW: Final = ("shortest_path", "optimised")  # in long trajectories


def lab_with(problem: Problem, workers: FakeWorkers | None = None) -> Lab:
    """Make a lab in which a uniform schedule was tried: what `optimised` begins at."""
    lab = lab_of(problem, workers)
    lab.score([uniform.uniform(problem)])
    return lab


# all of them


@pytest.mark.parametrize(
    ("problem", "name"),
    [(problem, name) for problem in PROBLEMS for name in STRATEGIES if problem != "long" or name not in SLOW],
)
def test_every_schedule_is_valid_begins_with_a_full_step_and_keeps_to_the_limit(problem: str, name: str) -> None:
    asked: Problem = PROBLEMS[problem]()
    lab = lab_with(asked)
    found = STRATEGIES[name](lab)
    assert found
    for scored in found:
        schedule = schedule_of(scored.candidate)  # which raises where it is none
        assert schedule.steps[0] == FULL
        assert asked.fits(scored.candidate)
        assert scored.candidate.strategy == name
        if name != "fewer_steps":
            assert (len(schedule.steps), scored.candidate.num_steps) == (
                asked.num_evaluations,
                asked.num_inference_steps,
            )


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_scores_what_it_returns_and_returns_the_best_first(name: str) -> None:
    lab = lab_with(PROBLEMS["dit"]())
    found = STRATEGIES[name](lab)
    assert {(s.candidate, s.error) for s in found} == {(s.candidate, s.error) for s in lab.tried[1:]}
    assert [scored.error for scored in found] == sorted(scored.error for scored in found)
    names = [scored.candidate.name for scored in found]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_proposes_the_same_to_workers_that_answer_in_another_order(name: str) -> None:
    problem = PROBLEMS["dit"]()
    calibration = calibration_of(problem)
    one, other = (
        STRATEGIES[name](lab_with(problem, FakeWorkers(calibration=calibration, backwards=backwards)))
        for backwards in (False, True)
    )
    assert one == other


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_forecasts_and_selective_steps_only_caches_are_repeated(name: str) -> None:
    problem = PROBLEMS["dit"](max_order=0, selective="none")
    lab = lab_with(problem)
    if name == "taylorseer":
        with pytest.raises(SearchError, match="nothing for TaylorSeer to do"):
            STRATEGIES[name](lab)
        return
    own = {"toca": "S", "duca": "S", "learning_to_cache": "M"}.get(name, "C")
    assert {letter for scored in STRATEGIES[name](lab) for letter in scored.candidate.rhythm} <= {"F", "C", own}


@pytest.mark.parametrize("name", STRATEGIES)
def test_about_as_many_schedules_are_scored_as_was_expected(name: str) -> None:
    lab = lab_with(paper_problem(50, "17"))
    STRATEGIES[name](lab)
    # of which some are the same; `optimised` scores as many, and runs fewer
    assert len(lab.tried) - 1 <= EXPECTED[name]["quick"] <= 2 * (len(lab.tried) - 1)


@pytest.mark.parametrize("name", ["uniform", "procache", "shortest_path"])
def test_one_full_step_is_the_first(name: str) -> None:
    found = STRATEGIES[name](lab_of(paper_problem(20, "1", flops=SMALL)))
    assert {plain(scored.candidate) for scored in found} == {"F" + "C" * 19}


@pytest.mark.parametrize("name", ["toca", "duca", "smoothcache", "magcache", "learning_to_cache", "taylorseer"])
def test_what_takes_more_than_one_full_step_is_refused_with_the_budget(name: str) -> None:
    with pytest.raises(SearchError, match="keeps to 1 full"):
        STRATEGIES[name](lab_of(paper_problem(20, "1", flops=SMALL)))


# FORA


@pytest.mark.parametrize(
    ("num_steps", "budget", "rhythm"),
    [
        (50, 17, "FCC" * 16 + "FC"),  # ⌈50 / 3⌉ = 17
        (50, 18, "FCC" * 16 + "FC"),  # every second step would be 25
        (50, 25, "FC" * 25),
        (50, 13, "FCCC" * 12 + "FC"),  # ⌈50 / 4⌉ = 13
        (6, 6, "FFFFFF"),
        (6, 1, "FCCCCC"),
        (1, 1, "F"),
    ],
)
def test_fora_computes_every_nth_step(num_steps: int, budget: int, rhythm: str) -> None:
    (only,) = uniform.search(lab_of(paper_problem(num_steps, Budget(budget, "full"))))
    assert plain(only.candidate) == rhythm
    assert only.candidate.num_steps == num_steps


@given(budget=st.integers(1, 40), more=st.integers(0, 40))
@examples(60)
def test_fora_takes_the_smallest_period_that_keeps_to_the_limit(budget: int, more: int) -> None:
    num_steps = budget + more
    steps = uniform.uniform(paper_problem(num_steps, Budget(budget, "full"))).steps
    full = [i for i, step in enumerate(steps) if step == FULL]
    period = full[1] if len(full) > 1 else num_steps
    assert full == list(range(0, num_steps, period))
    assert all(step == REUSE for i, step in enumerate(steps) if i not in full)
    assert len(full) <= budget
    assert period == 1 or len(range(0, num_steps, period - 1)) > budget


# fewer steps


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
    flops = FlopsModel(1152, 256, 28, 2, 120)  # PixArt's: cached steps cost nothing, and 17 full ones are 17 steps
    problem = paper_problem(50, Budget(budget, "full"), table=table_of(evaluations), flops=flops)
    (only,) = fewer_steps.search(lab_of(problem))
    assert only.candidate.num_steps == num_steps
    assert only.candidate.steps == (FULL,) * evaluations(num_steps)
    assert only.candidate.name == f"{num_steps} steps"


def test_what_cached_steps_cost_leaves_room_for_a_step_more() -> None:
    # of 16 tokens, adaLN is 12·1152² of 24·16·1152² + 4·16²·1152 + 12·1152² FLOPs in each block: 1 / 33.1 of a step
    flops = FlopsModel(width=1152, num_tokens=16, num_blocks=28, rows_per_image=2)
    assert fewer_steps.fewer_steps(paper_problem(50, "17", flops=flops)).num_steps == 17  # 33 are cached
    assert fewer_steps.fewer_steps(paper_problem(60, "17", flops=flops)).num_steps == 18  # 43


@pytest.mark.parametrize(
    ("scheduler", "budget", "num_steps", "evaluations"),
    [
        (diffusers.DDIMScheduler(clip_sample=False), "5", 5, 5),
        (diffusers.HeunDiscreteScheduler(), "5", 3, 5),
        (diffusers.HeunDiscreteScheduler(), "4", 2, 3),
        (diffusers.PNDMScheduler(skip_prk_steps=True), "6", 5, 6),
    ],
    ids=["ddim", "heun", "heun between", "pndm"],
)
def test_fewer_steps_fits_diffusers_samplers_into_a_budget(
    scheduler: Any, budget: str, num_steps: int, evaluations: int
) -> None:
    problem = paper_problem(8, budget, table=lambda count: measure_solver(scheduler, count))
    (only,) = fewer_steps.search(lab_of(problem))
    assert (only.candidate.num_steps, len(only.candidate.steps)) == (num_steps, evaluations)


def test_a_sampler_that_always_takes_more_than_the_budget_is_refused() -> None:
    problem = paper_problem(50, "5", table=table_of(lambda num_steps: num_steps + 10))
    with pytest.raises(SearchError, match="no such schedule keeps to 5 full"):
        fewer_steps.search(lab_of(problem))


# what is published


@pytest.mark.parametrize(
    ("num_steps", "budget", "flops", "rhythm"),
    [  # METHODS.md §14.2, §2.8
        (50, "17", DIT_XL_2, "FCSCFCSCFCSCFCSCFCSCFCSCFCSFCSFCSFCSFCFCFCFCFCFCFC"),
        (20, "7", PIXART_XL_2, "FCSFCSFCSFCSFCSFCSFC"),
    ],
    ids=["dit", "pixart"],
)
def test_the_released_rhythms_are_those_of_procaches_code(
    num_steps: int, budget: str, flops: FlopsModel, rhythm: str
) -> None:
    problem = paper_problem(num_steps, budget, flops=flops)
    assert plain(published_candidate(problem)) == rhythm
    cached = paper_problem(num_steps, budget, selective="none", flops=flops)
    assert plain(published_candidate(cached)) == rhythm.replace("S", "C")


@pytest.mark.parametrize(("num_steps", "budget"), [(50, "16"), (49, "17"), (20, "6")])
def test_where_nothing_was_published_what_was_is_named(num_steps: int, budget: str) -> None:
    message = rf"with {budget} full of {num_steps} steps; there are 17 full of 50, 7 full of 20"
    with pytest.raises(SearchError, match=message):
        published_candidate(paper_problem(num_steps, budget))


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ratio": 0.0}, "token_ratio lies above 0"),
        ({"token_ratio": 1.1}, "token_ratio lies above 0"),
        ({"deep_ratio": -0.1}, "deep_ratio from 0"),
        ({"deep_ratio": 1.1}, "deep_ratio from 0"),
        ({"num_images": 0}, "scores on 1 image or more"),
        ({"num_held_out": 1}, "reports on 2 or more"),
        ({"seed": -1}, "the seed is 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale a finite number"),
        ({"max_order": 4}, "max_order is 0, 1, 2 or 3, not 4"),
        ({"max_order": -1}, "max_order is 0, 1, 2 or 3, not -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        paper_problem(50, "17", **options)
