from __future__ import annotations

import itertools
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.schedule import FULL, Forward
from hemiola_search.budget import Budget
from hemiola_search.calibration import Calibration
from hemiola_search.costs import MeasuredCosts
from hemiola_search.errors import SearchError
from hemiola_search.forecasts import Fitted
from hemiola_search.problem import Problem
from hemiola_search.strategies import shortest_path as module
from hemiola_search.strategies.shortest_path import Objective, forecast_step, forecasts_of, search, shortest_path
from labs import DIT_XL_2, FakeWorkers, calibration_of, cost_row, cost_table, lab_of, paper_problem, plain, schedule_of
from strategies import examples

OBJECTIVES: Final[tuple[Objective, ...]] = ("sum", "largest")


def _value(fitted: Fitted, path: tuple[int, ...], num_steps: int, order: int, objective: Objective) -> float:
    """Return what a path costs, from its definition."""
    errors = [0.0]
    for i, (place, following) in enumerate(itertools.pairwise([*path, num_steps])):
        history = tuple(reversed(path[max(0, i - order) : i + 1]))
        errors += fitted.errors(history)[: following - place - 1].tolist()
    return sum(errors) if objective == "sum" else max(errors)


@given(
    seed=st.integers(0, 10**6),
    num_steps=st.integers(1, 9),
    order=st.integers(0, 2),
    objective=st.sampled_from(OBJECTIVES),
    forward=st.sampled_from([Forward.REUSE, Forward.RESIDUAL]),
    data=st.data(),
)
@examples(150)
def test_the_path_is_the_best_of_all(
    seed: int, num_steps: int, order: int, objective: Objective, forward: Forward, data: st.DataObject
) -> None:
    num_full = data.draw(st.integers(1, num_steps))
    fitted = Fitted(_calibration(num_steps, seed), forward)
    all_paths = [(0, *others) for others in itertools.combinations(range(1, num_steps), num_full - 1)]
    values = {path: _value(fitted, path, num_steps, order, objective) for path in all_paths}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REACH", num_steps)
        found = shortest_path(fitted, num_steps, num_full, order, objective)
    assert found in values
    assert values[found] == pytest.approx(min(values.values()))


def _calibration(num_steps: int, seed: int) -> Calibration:
    return calibration_of(paper_problem(num_steps), seed)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_pauses_are_no_longer_than_the_reach(order: int, objective: Objective) -> None:
    fitted = Fitted(_calibration(30, 0))
    for num_full in (1, 4, 10, 30):
        path = shortest_path(fitted, 30, num_full, order, objective)
        assert path[0] == 0
        assert len(path) == len(set(path)) == num_full
        longest = max(np.diff([*path, 30]))
        assert longest <= 3 * -(-30 // num_full)


def test_where_nothing_changes_any_path_is_as_good() -> None:
    still = Calibration(**{**_fields(_calibration(6, 0)), "outputs": np.ones((6, 6, 6))})
    path = shortest_path(Fitted(still), 6, 3, 1, "sum")
    assert (path[0], len(path)) == (0, 3)


def _fields(calibration: Calibration) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    return {name: getattr(calibration, name) for name in Calibration.__slots__}


# the strategy


@pytest.mark.parametrize(
    ("num_steps", "max_order", "orders"), [(50, 0, [0]), (50, 1, [0, 1]), (50, 3, [0, 1, 2]), (101, 3, [0, 1])]
)
def test_orders_are_those_that_are_allowed_and_fewer_in_long_trajectories(
    num_steps: int, max_order: int, orders: list[int]
) -> None:
    found = forecasts_of(paper_problem(num_steps, max_order=max_order))
    assert [order for forward, order in found if forward is Forward.REUSE] == orders
    assert [order for forward, order in found if forward is Forward.RESIDUAL] == orders[1:]


@pytest.mark.parametrize("budget", ["5", "3x", "1", "20"])
def test_every_kind_of_forecast_is_tried_for_both_objectives_within_the_limit(budget: str) -> None:
    problem = paper_problem(20, budget)
    workers = FakeWorkers(calibration=calibration_of(problem))
    found = search(lab_of(problem, workers))
    names = {scored.candidate.name for scored in found}
    kinds = ("reuse", "reuse_1", "reuse_2", "residual_1", "residual_2")
    assert names == {f"{objective} of errors, {kind}" for objective in OBJECTIVES for kind in kinds}
    assert [scored.error for scored in found] == sorted(scored.error for scored in found)
    for scored in found:
        schedule = schedule_of(scored.candidate)
        assert schedule.steps[0] == FULL
        assert schedule.num_full == problem.max_full()
        assert problem.fits(scored.candidate)


def test_the_figures_of_the_path_decide_what_is_full() -> None:
    problem = paper_problem(20, "6", max_order=1)
    calibration = calibration_of(problem)
    found = {s.candidate.name: s.candidate for s in search(lab_of(problem, FakeWorkers(calibration=calibration)))}
    for objective in OBJECTIVES:
        for forward, order in forecasts_of(problem):
            path = shortest_path(Fitted(calibration, forward), 20, 6, order, objective)
            kind = f"{forward.value}_{order}" if order else forward.value
            letters = plain(found[f"{objective} of errors, {kind}"])
            assert [i for i, letter in enumerate(letters) if letter == "F"] == list(path)


def test_where_not_one_full_step_fits_there_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "fits", lambda *_: False)
    with pytest.raises(SearchError, match="not one full step keeps to 1 full"):
        search(lab_of(paper_problem(20, "1")))


def test_what_cheap_first_steps_leave_goes_into_full_ones() -> None:
    """Before there are two full steps caches are repeated: what that costs less than a forecast makes a full step."""
    rows = [cost_row("full", 10), cost_row("reuse", 1), cost_row("reuse_1", 6), cost_row("residual_1", 6)]
    costs = MeasuredCosts([cost_table(rows)], DIT_XL_2, 1)
    # 4.4 ms around 12 steps; three full ones, and 9 forecasts of 6 ms are as sure as it gets
    problem = paper_problem(12, Budget(4.48 + 3 * 10 + 9 * 6 + 1, "ms"), costs=costs, max_order=1)
    forecast = forecast_step(Forward.REUSE, 1)
    assert problem.max_full(forecast) == 3
    found = {scored.candidate.name: scored.candidate for scored in search(lab_of(problem))}
    for candidate in found.values():
        assert problem.fits(candidate)
        assert candidate.rhythm.startswith("FC")
        assert candidate.num_full > 3
        assert problem.limit - problem.cost(candidate) < 10 - 1  # less than one full step more takes
