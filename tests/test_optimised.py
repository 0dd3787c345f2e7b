from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.schedule import FULL, REUSE, Forward
from hemiola_search.calibration import Calibration
from hemiola_search.errors import SearchError
from hemiola_search.forecasts import Fitted
from hemiola_search.lab import Lab
from hemiola_search.problem import Problem, Scored
from hemiola_search.strategies import optimised, uniform
from hemiola_search.strategies.optimised import AT_ONCE, ROUNDS, TRIALS, Moves
from hemiola_search.strategies.shortest_path import forecasts_of
from labs import PIXART_XL_2, FakeWorkers, calibration_of, lab_of, paper_problem, plain, schedule_of
from strategies import examples

FITTED_FORWARDS = (Forward.REUSE, Forward.RESIDUAL)


def _lab(problem: Problem, workers: FakeWorkers | None = None) -> Lab:
    lab = lab_of(problem, workers)
    lab.score([uniform.uniform(problem)])
    return lab


def _moves(problem: Problem, calibration: Calibration | None = None) -> Moves:
    calibration = calibration or calibration_of(problem)
    fitted = {forward: Fitted(calibration, forward) for forward in FITTED_FORWARDS}
    return Moves(problem, fitted, uniform.uniform(problem))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw a problem of few steps with a limit between one full step and all of them."""
    num_steps = draw(st.integers(2, 14))
    flops = draw(st.sampled_from([PIXART_XL_2, replace(PIXART_XL_2, num_text_tokens=None, num_blocks=4)]))
    return paper_problem(
        num_steps,
        draw(st.integers(1, num_steps).map(str) | st.floats(1, num_steps * 0.7 + 0.3).map(lambda x: f"{x:.3f}x")),
        flops=flops,
        selective=draw(st.sampled_from(["tokens", "deep", "none"])),
        token_ratio=draw(st.sampled_from([0.01, 0.3, 1.0])),
        max_order=draw(st.integers(0, 3)),
    )


@given(problem=problems(), data=st.data())
@examples(60)
def test_nothing_beyond_the_limit_is_ever_proposed(problem: Problem, data: st.DataObject) -> None:
    moves = _moves(problem)
    trial = optuna.trial.FixedTrial(_numbers(problem, moves, data))
    schedule = schedule_of(candidate := moves.propose(trial, "a trial"))
    assert problem.fits(candidate)
    assert schedule.steps[0] == FULL
    assert schedule.order <= problem.options.max_order
    most = max(problem.max_full(), 1)
    assert schedule.num_full <= most
    if set(schedule.counts) <= {Forward.FULL, Forward.REUSE, Forward.RESIDUAL}:
        assert schedule.num_full >= most - 2  # where there was no room for a step that refreshes


def _numbers(problem: Problem, moves: Moves, data: st.DataObject) -> dict[str, Any]:
    refreshes = ["none"] if problem.selective_step is None else ["none", problem.selective_step.forward.value]
    kinds = [f"{forward.value}_{order}" if order else forward.value for forward, order in forecasts_of(problem)]
    shifts = [name for name in moves.start() if name.startswith("shift")]
    return {name: data.draw(st.integers(-2, 2)) for name in shifts} | {
        "cached": data.draw(st.sampled_from(kinds)),
        "rule": data.draw(st.sampled_from(["fitted", "polynomial", "taylor"])),
        "refresh": data.draw(st.sampled_from(refreshes)),
        "given up": data.draw(st.integers(1, 2)),
    }


def test_the_first_proposal_is_where_the_search_begins() -> None:
    problem = paper_problem(20, "7")
    start = uniform.uniform(problem)
    trial = optuna.trial.FixedTrial(_moves(problem).start())
    assert _moves(problem).propose(trial, "first").steps == start.steps


def test_full_steps_move_as_far_as_they_are_told_and_stay_behind_the_first() -> None:
    problem = paper_problem(20, "7")  # period 3: 0, 3, 6, 9, 12, 15, 18
    moves = _moves(problem)
    shifts = {"shift 1": -2, "shift 2": 2, "shift 3": 1, "shift 4": -1, "shift 5": 0, "shift 6": 2}
    candidate = moves.propose(optuna.trial.FixedTrial(moves.start() | shifts), "moved")
    assert [i for i, step in enumerate(candidate.steps) if step == FULL] == [0, 1, 8, 10, 11, 15, 19]


def test_full_steps_that_fall_together_are_made_up_for_elsewhere() -> None:
    problem = paper_problem(20, "7")
    moves = _moves(problem)
    shifts = {"shift 1": 1, "shift 2": -2}  # both at step 4
    candidate = moves.propose(optuna.trial.FixedTrial(moves.start() | shifts), "moved")
    full = {i for i, step in enumerate(candidate.steps) if step == FULL}
    assert len(full) == 7
    assert full > {0, 4, 9, 12, 15, 18}


def test_a_full_step_is_given_up_for_such_as_refresh() -> None:
    problem = paper_problem(20, "7", selective="deep")
    moves = _moves(problem)
    numbers = moves.start() | {"refresh": "deep", "given up": 2}
    candidate = moves.propose(optuna.trial.FixedTrial(numbers), "refreshing")
    # two full steps are worth eight of a quarter of the blocks
    assert plain(candidate).count("F") == 5
    assert plain(candidate).count("D") == 8
    assert candidate.deep_start == 21


def test_the_steps_with_the_largest_errors_are_refreshed() -> None:
    problem = paper_problem(12, "4", selective="deep")
    moves = _moves(problem)
    candidate = moves.propose(optuna.trial.FixedTrial(moves.start() | {"refresh": "deep"}), "refreshing")
    full = tuple(i for i, step in enumerate(candidate.steps) if step == FULL)
    fitted = Fitted(calibration_of(problem))
    newest = {i: max(place for place in full if place < i) for i in range(12) if i not in full}
    errors = {i: float(fitted.errors((place,))[i - place - 1]) for i, place in newest.items()}
    refreshed = [i for i, step in enumerate(candidate.steps) if step.forward is Forward.DEEP]
    assert refreshed
    assert sorted(refreshed) == sorted(sorted(errors, key=lambda i: -errors[i])[: len(refreshed)])


# the search


@pytest.mark.parametrize("seed", range(3))
def test_no_schedule_is_run_twice_and_the_best_is_no_worse_than_the_start(seed: int) -> None:
    problem = paper_problem(20, "7", seed=seed)
    workers = FakeWorkers(calibration=calibration_of(problem))
    lab = _lab(problem, workers)
    found = optimised.search(lab)
    assert len({candidate.key for candidate in workers.ran}) == len(workers.ran)
    assert len(found) == ROUNDS["quick"] * TRIALS["quick"]
    assert found[0].error <= lab.tried[0].error
    assert all(problem.fits(candidate) for candidate in workers.ran)


def _run(problem: Problem, *, backwards: bool = False) -> list[Scored]:
    return optimised.search(_lab(problem, FakeWorkers(calibration=calibration_of(problem), backwards=backwards)))


def test_the_same_seed_proposes_the_same_and_another_seed_something_else() -> None:
    problem = paper_problem(20, "7", seed=3)
    assert _run(problem) == _run(problem) == _run(problem, backwards=True)
    other = _run(paper_problem(20, "7", seed=4))
    assert {s.candidate.steps for s in other} != {s.candidate.steps for s in _run(problem)}


def test_proposals_come_some_at_a_time() -> None:
    problem = paper_problem(20, "7")
    asked: list[int] = []

    class Workers(FakeWorkers):
        def score(self, candidates: Any, on_scored: Any) -> None:
            asked.append(len(candidates))
            super().score(candidates, on_scored)

    optimised.search(_lab(problem, Workers(calibration=calibration_of(problem))))
    assert max(asked) <= AT_ONCE
    assert len(asked) >= 2


def test_rounds_begin_at_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDS, "quick", 3)
    starts: list[tuple[int, ...]] = []
    made = Moves.__init__

    def recorded(self: Moves, problem: Problem, fitted: Any, start: Any) -> None:
        starts.append(tuple(i for i, step in enumerate(start.steps) if step == FULL))
        made(self, problem, fitted, start)

    monkeypatch.setattr(Moves, "__init__", recorded)
    problem = paper_problem(20, "7")
    goal = {0, 2, 5, 9, 13, 16, 18}

    def distance(candidate: Any) -> float:
        return 1e-3 + len(goal ^ {i for i, step in enumerate(candidate.steps) if step == FULL})

    found = optimised.search(_lab(problem, FakeWorkers(distance, calibration_of(problem))))
    assert len(starts) == 3
    distances = [len(goal ^ set(start)) for start in starts]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0]
    assert found[0].error <= 1e-3 + distances[-1]


def test_without_anything_to_begin_at_it_is_refused() -> None:
    with pytest.raises(SearchError, match="no schedule that was tried keeps to 7 full"):
        optimised.search(lab_of(paper_problem(20, "7")))


def test_it_begins_at_the_kind_of_forecast_that_was_best() -> None:
    problem = paper_problem(20, "7")
    fitted = {forward: Fitted(calibration_of(problem), forward) for forward in FITTED_FORWARDS}
    plain_steps = uniform.uniform(problem)
    assert Moves(problem, fitted, plain_steps).start()["cached"] == "reuse"
    by_kind = {"reuse_2": (Forward.REUSE, 2), "residual_1": (Forward.RESIDUAL, 1)}
    for kind, (forward, order) in by_kind.items():
        step = replace(REUSE, forward=forward, forecast=(2.0, -1.0, 0.0)[: order + 1])
        start = replace(plain_steps, steps=(FULL, FULL, FULL, *[step] * 17))
        assert Moves(problem, fitted, start).start()["cached"] == kind
