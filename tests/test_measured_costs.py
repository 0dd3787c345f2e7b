"""Schedules that are priced by what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.cost_table import CostTable
from hemiola_runtime.machine import Machine
from hemiola_runtime.manifest import BackendSpec
from hemiola_runtime.schedule import DEEP, FULL, MASKED, RESIDUAL, REUSE, Forward, Step, tokens
from hemiola_search.budget import Budget
from hemiola_search.costs import FlopsModel, MeasuredCosts
from hemiola_search.errors import SearchError
from hemiola_search.problem import Problem
from labs import DIT_XL_2, cost_row, cost_table, paper_problem
from strategies import examples

FORECAST: Final = Step(Forward.REUSE, None, (2.0, -1.0))
HALF: Final = replace(DIT_XL_2, num_blocks=4)  # of which 2 are deep


PLAIN: Final = cost_table([cost_row("full", 10), cost_row("reuse", 1), cost_row("reuse_1", 1.5)])


def costs_of(*tables: CostTable, batch_size: int = 1, flops: FlopsModel = DIT_XL_2) -> MeasuredCosts:
    return MeasuredCosts(tables or [PLAIN], flops, batch_size)


def test_steps_cost_what_was_measured() -> None:
    costs = costs_of()
    assert costs.unit == "ms"
    assert [costs.step(step, None, None) for step in (FULL, REUSE, FORECAST)] == [10, 1, 1.5]
    assert costs.estimated == set()


def test_a_schedule_costs_its_steps_its_share_of_conditioning_and_the_decoder() -> None:
    # conditioning was measured for 50 steps: 2 ms · 10 / 50
    assert costs_of().schedule([FULL] * 4 + [REUSE] * 6) == pytest.approx(4 * 10 + 6 * 1 + 2 * 10 / 50 + 4)


def test_an_image_costs_its_share_of_a_batch() -> None:
    measured = cost_table(
        [cost_row("full", 10), cost_row("reuse", 1), cost_row("full", 40, 8), cost_row("reuse", 8, 8)]
    )
    costs = costs_of(measured, batch_size=8)
    assert costs.step(FULL, None, None) == 5
    assert costs.schedule([FULL, REUSE]) == pytest.approx(5 + 1 + (2 * 2 / 50 + 4) / 8)
    assert "batch 8" in costs.source


def test_deep_and_token_steps_are_priced_by_the_table_of_their_blocks() -> None:
    of_2 = cost_table(
        [cost_row("full", 11), cost_row("deep", 6), cost_row("tokens", 3, tokens=38), cost_row("reuse", 1)],
        deep_start=2,
    )
    of_0 = cost_table(
        [cost_row("full", 14), cost_row("deep", 13), cost_row("tokens", 7, tokens=38), cost_row("reuse", 1.2)],
        deep_start=0,
    )
    costs = costs_of(PLAIN, of_2, of_0, flops=HALF)
    by_blocks = {start: [costs.step(step, start, None) for step in (FULL, DEEP, tokens(38))] for start in (2, 0)}
    assert by_blocks == {2: [11, 6, 3], 0: [14, 13, 7]}
    assert (costs.step(FULL, None, None), costs.step(REUSE, 0, None)) == (10, 1.2)
    assert costs.estimated == set()


def test_tokens_between_two_counts_lie_on_the_line() -> None:
    counts = [cost_row("tokens", 2, tokens=32), cost_row("tokens", 4, tokens=64)]
    costs = costs_of(cost_table([cost_row("full", 10), cost_row("reuse", 1), *counts], deep_start=2), flops=HALF)
    assert costs.step(tokens(40), 2, None) == pytest.approx(2.5)
    assert costs.step(tokens(((32, 48),)), 2, None) == pytest.approx(2.5)  # a mean of 40
    assert costs.estimated == set()


def test_a_mask_is_priced_by_the_bundle_that_has_it() -> None:
    masks = [("x...", ".x.."), ("xxxx", "x...")]
    tables = [
        cost_table([cost_row("full", 10 + i), cost_row("masked", 4 + i), cost_row("reuse", 1)], mask=mask)
        for i, mask in enumerate(masks)
    ]
    costs = costs_of(PLAIN, *tables, flops=HALF)
    assert [costs.step(MASKED, None, mask) for mask in masks] == [4, 5]
    assert [costs.step(FULL, None, mask) for mask in (None, *masks)] == [10, 10, 11]
    assert costs.estimated == set()
    costs.step(MASKED, None, ("xx..", "...."))
    assert costs.estimated == {"masked"}


# what was not measured


def test_what_was_not_measured_is_a_share_of_full_by_flops_and_is_named() -> None:
    costs = costs_of(flops=HALF)
    shares = {
        2: (HALF.step(DEEP, 2, None) - HALF.step(REUSE, 2, None))
        / (HALF.step(FULL, 2, None) - HALF.step(REUSE, 2, None)),
    }
    assert shares[2] == pytest.approx(0.5)  # half of the blocks
    assert costs.step(DEEP, 2, None) == pytest.approx(1 + 0.5 * (10 - 1))
    assert costs.estimated == {"deep"}
    assert costs.step(Step(Forward.DEEP, None, (2.0, -1.0)), 2, None) == pytest.approx(1.5 + 0.5 * (10 - 1.5))
    assert costs.estimated == {"deep", "deep_1"}


def test_a_forecast_that_was_not_measured_costs_what_the_next_lower_order_does() -> None:
    costs = costs_of()
    assert costs.step(Step(Forward.REUSE, None, (3.0, -3.0, 1.0)), None, None) == pytest.approx(1.5)
    assert costs.step(RESIDUAL, None, None) == pytest.approx(1)
    assert costs.estimated == {"reuse_2", "residual"}


def test_tokens_of_other_blocks_than_those_that_were_measured_are_an_estimate() -> None:
    measured = cost_table([cost_row("full", 11), cost_row("tokens", 3, tokens=38), cost_row("reuse", 1)], deep_start=3)
    costs = costs_of(measured, flops=HALF)
    assert costs.step(tokens(38), 2, None) != 3
    assert costs.estimated == {"tokens"}
    assert costs.step(tokens(38), 3, None) == 3


def test_reuse_of_one_bundle_stands_in_for_that_of_another() -> None:
    costs = costs_of(cost_table([cost_row("full", 11), cost_row("deep", 6)], deep_start=2), PLAIN, flops=HALF)
    assert costs.step(REUSE, 2, None) == 1
    assert costs.estimated == set()


def test_without_any_cached_step_an_estimate_is_a_share_alone() -> None:
    costs = costs_of(cost_table([cost_row("full", 10)]), flops=HALF)
    assert costs.step(REUSE, None, None) == 0
    assert costs.step(DEEP, 2, None) == pytest.approx(5)
    assert costs.estimated == {"reuse", "deep"}


# budgets


def measured_problem(budget: str | Budget, *tables: CostTable, num_steps: int = 50) -> Problem:
    return paper_problem(num_steps, budget, costs=costs_of(*tables))


@given(count=st.integers(1, 50))
@examples(50)
def test_milliseconds_a_speedup_and_full_steps_agree(count: int) -> None:
    by_steps = measured_problem(Budget(count, "full"))
    assert by_steps.limit == pytest.approx(count * 10 + (50 - count) * 1 + 2 + 4)
    uncached = 50 * 10 + 2 + 4
    by_time = measured_problem(Budget(by_steps.limit, "ms"))
    by_speedup = measured_problem(Budget(uncached / by_steps.limit, "speedup"))
    assert by_time.limit == pytest.approx(by_speedup.limit)
    assert by_steps.max_full() == by_time.max_full() == by_speedup.max_full() == count


def test_forecasts_that_cost_more_leave_less_for_full_steps() -> None:
    problem = measured_problem("17")
    # 17 · 10 + 33 · 1 = 203 = n · 10 + (50 - n) · 1.5, so n is (203 - 75) / 8.5 = 15.06
    assert (problem.max_full(REUSE), problem.max_full(FORECAST)) == (17, 15)


def test_the_steps_before_the_first_forecast_count_too() -> None:
    """A forecast of order 2 may be measured as cheaper than plain reuse, which the first cached steps are."""
    odd = cost_table([cost_row("full", 10), cost_row("reuse", 2), cost_row("reuse_1", 1.5), cost_row("reuse_2", 1)])
    problem = measured_problem(Budget(100, "ms"), odd, num_steps=20)
    # 100 - 4 - 0.8 = 95.2 = n · 10 + (20 - n) · 2, so n is 6.9
    assert problem.max_full(Step(Forward.REUSE, None, (1.0, 0.0, 0.0))) == problem.max_full(REUSE) == 6
    steps = (FULL, REUSE, *[FULL] * 5, *[Step(Forward.REUSE, None, (3.0, -3.0, 1.0))] * 13)
    assert problem.fits(problem.candidate("by_hand", "", steps))


def test_too_few_milliseconds_are_refused_with_the_least_that_can_be() -> None:
    # one full step, 49 of reuse, and 6 ms around them
    with pytest.raises(SearchError, match=r"a budget of 60 ms is beyond caching: one full step of 50 costs 65 ms"):
        assert measured_problem("60ms").limit
    assert measured_problem("65ms").max_full() == 1


# refusals


def test_a_batch_size_that_was_not_measured_is_refused_with_the_command_that_measures_it() -> None:
    measured = cost_table([cost_row("full", 10), cost_row("full", 40, 8)])
    with pytest.raises(SearchError, match=r"at batch 1, 8, not at 4\. .*`hemiola measure BUNDLE --batch-size 4`"):
        costs_of(measured, batch_size=4)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"machine": Machine("Another Processor", 8, "Linux x86_64", "3.11.7")}, "Another Processor, 8 cores"),
        ({"gpu": "NVIDIA L4"}, "NVIDIA L4, A Processor"),
        ({"precision": "fp16"}, "fp16"),
        ({"backend": BackendSpec("tensorrt", "10.14", None, ())}, "tensorrt 10.14"),
    ],
)
def test_what_was_measured_elsewhere_is_not_compared(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(
        SearchError, match=r"costs were measured by onnxruntime 1.23, fp32, A Processor, 16 cores and by "
    ) as raised:
        costs_of(PLAIN, replace(PLAIN, **changes))
    assert part in str(raised.value)
    assert "--costs" in str(raised.value)
