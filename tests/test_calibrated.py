"""The strategies that need a calibration and no trajectory: SmoothCache, MagCache, Learning-to-Cache, TaylorSeer."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hemiola_runtime.schedule import FULL, REUSE, Forward
from hemiola_search.calibration import MAX_LAG
from hemiola_search.costs import FlopsModel
from hemiola_search.errors import SearchError
from hemiola_search.forecasts import taylor, with_forecasts
from hemiola_search.strategies import learning_to_cache, magcache, smoothcache, taylorseer
from labs import DIT_XL_2, PIXART_XL_2, FakeWorkers, calibration_of, lab_of, paper_problem, plain
from strategies import examples

Floats = NDArray[np.float64]
BUDGETS: Final = ("17", "25", "2.5x")


# SmoothCache


def _errors(by_lag: list[float], num_steps: int, late: int = 99, factor: float = 1.0) -> Floats:
    """Return errors that depend on the lag alone; from a step on, they are larger by a factor."""
    errors = np.zeros((MAX_LAG, num_steps))
    for lag, error in enumerate(by_lag):
        errors[lag] = error * np.where(np.arange(num_steps) >= late, factor, 1)
    errors[len(by_lag) :] = 9
    return errors


@pytest.mark.parametrize(
    ("threshold", "rhythm"),
    [
        (0.0, "FFFFFFFFFFFF"),
        (0.1, "FCFCFCFCFCFC"),
        (0.19, "FCFCFCFCFCFC"),
        (0.2, "FCCFCCFCCFCC"),
        (0.3, "FCCCFCCCFCCC"),
        (5.0, "FCCCFCCCFCCC"),
    ],
)
def test_smoothcache_caches_as_long_as_the_error_allows(threshold: float, rhythm: str) -> None:
    steps = smoothcache.steps_for(_errors([0.1, 0.2, 0.3], 12), threshold)
    assert "".join(step.symbol for step in steps) == rhythm


def test_smoothcache_computes_where_errors_are_larger() -> None:
    steps = smoothcache.steps_for(_errors([0.1, 0.2, 0.3], 12, late=6, factor=2), 0.3)
    assert "".join(step.symbol for step in steps) == "FCCCFCFCFCFC"


def test_smoothcache_stops_at_the_longest_pause_that_was_measured() -> None:
    steps = smoothcache.steps_for(np.zeros((MAX_LAG, 20)), 0.0)
    assert "".join(step.symbol for step in steps) == "FCCCCCCCC" * 2 + "FC"


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_smoothcache_takes_the_smallest_threshold_that_keeps_to_the_limit(budget: str, seed: int) -> None:
    problem = paper_problem(50, budget)
    calibration = calibration_of(problem, seed)
    (scored,) = smoothcache.search(lab_of(problem, FakeWorkers(calibration=calibration)))
    errors = calibration.layer_errors.mean(axis=(2, 3))
    fitting = [
        threshold
        for threshold in sorted(set(errors.flat))
        if problem.fits(problem.candidate("", "", smoothcache.steps_for(errors, threshold)))
    ]
    assert scored.candidate.steps == smoothcache.steps_for(errors, fitting[0])
    assert scored.candidate.name == f"α = {fitting[0]:.3g}"


def test_smoothcache_refuses_a_limit_beyond_its_longest_pause() -> None:
    # one step of nine is full: 6 of 50
    assert smoothcache.search(lab_of(paper_problem(50, "6")))[0].candidate.num_full == 6
    with pytest.raises(SearchError, match="no such schedule keeps to 5 full"):
        smoothcache.search(lab_of(paper_problem(50, "5")))


# MagCache


@pytest.mark.parametrize(
    ("threshold", "rhythm"),
    [
        # the ratio is 1.1, 1.21, 1.331 and so on since the last full step; its errors add up to 0.1, 0.31, 0.641
        (0.05, "FFFFFFFFFF"),
        (0.11, "FCFCFCFCFC"),
        (0.32, "FCCFCCFCCF"),
        (0.65, "FCCCFCCCFC"),
    ],
)
def test_magcache_caches_while_the_magnitude_stays_within_the_threshold(threshold: float, rhythm: str) -> None:
    ratios = np.array([1.0, *[1.1] * 9])
    steps = magcache.steps_for(ratios, threshold)
    assert "".join(step.symbol for step in steps) == rhythm


@given(
    ratios=st.lists(st.floats(0.5, 2), min_size=1, max_size=40),
    threshold=st.floats(0, 20),
)
@examples(60)
def test_magcache_never_goes_beyond_its_threshold(ratios: list[float], threshold: float) -> None:
    steps = magcache.steps_for(np.array(ratios), threshold)
    first = -(-len(ratios) // 10)  # a tenth of all, rounded up
    assert all(step == FULL for step in steps[:first])
    ratio, error = 1.0, 0.0
    for step, factor in zip(steps, ratios, strict=True):
        ratio *= factor
        error += abs(1 - ratio)
        if step == FULL:
            ratio, error = 1.0, 0.0
        else:
            assert step == REUSE
            assert error <= threshold


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_magcache_takes_the_smallest_threshold_that_keeps_to_the_limit(budget: str, seed: int) -> None:
    problem = paper_problem(50, budget)
    calibration = calibration_of(problem, seed)
    (scored,) = magcache.search(lab_of(problem, FakeWorkers(calibration=calibration)))
    found = float(scored.candidate.name.split()[-1])
    ratios = calibration.residual_ratios

    def fits(threshold: float) -> bool:
        return problem.fits(problem.candidate("", "", magcache.steps_for(ratios, threshold)))

    assert problem.fits(scored.candidate)
    assert not any(fits(threshold) for threshold in np.geomspace(1e-5, found * 0.96, 300).tolist())


def test_magcache_finds_a_threshold_for_the_fewest_full_steps_that_it_takes() -> None:
    """A tenth of all steps is full whatever the threshold; the magnitude may jump behind it."""
    problem = paper_problem(20, "2")
    ratios = np.array([1.0, 0.1, 10.0, *[1.0] * 17])
    calibration = replace(calibration_of(problem), residual_ratios=ratios)
    (scored,) = magcache.search(lab_of(problem, FakeWorkers(calibration=calibration)))
    assert plain(scored.candidate) == "FF" + "C" * 18


def test_magcache_refuses_a_limit_below_the_steps_that_are_always_full() -> None:
    with pytest.raises(SearchError, match="no such schedule keeps to 4 full"):
        magcache.search(lab_of(paper_problem(50, "4")))  # a tenth of 50 is 5


# Learning-to-Cache


def test_changes_are_averaged_over_the_steps_that_are_cached() -> None:
    changes = np.zeros((MAX_LAG, 7, 2, 3))
    changes[0], changes[1] = 1, 3
    # of period 3, steps 1 and 4 follow a full one by a step, 2 and 5 by two; 0, 3 and 6 are full
    np.testing.assert_allclose(learning_to_cache.layer_changes(changes, 3), np.full((2, 3), 2))
    np.testing.assert_allclose(learning_to_cache.layer_changes(changes, 2), np.full((2, 3), 1))


@pytest.mark.parametrize("budget", ["17", "25", "2.5x", "1.5x"])
@pytest.mark.parametrize("flops", [DIT_XL_2, PIXART_XL_2], ids=["dit", "pixart"])
def test_masks_compute_the_layers_that_change_most_for_what_they_cost(budget: str, flops: FlopsModel) -> None:
    problem = paper_problem(50, budget, flops=flops)
    calibration = calibration_of(problem)
    found = [s.candidate for s in learning_to_cache.search(lab_of(problem, FakeWorkers(calibration=calibration)))]
    for candidate in found:
        assert candidate.mask is not None
        assert {step.forward for step in candidate.steps} == {Forward.FULL, Forward.MASKED}
        period = candidate.rhythm.index("F", 1)
        assert candidate.rhythm == "".join("M" if i % period else "F" for i in range(50))
        computed = np.array([[letter == "x" for letter in row] for row in candidate.mask])
        assert candidate.name == f"period {period}, {computed.sum()} of {computed.size} layers"
        # within a branch all layers cost the same
        importance = learning_to_cache.layer_changes(calibration.layer_changes, period)
        for chosen, changes in zip(computed, importance, strict=True):
            if chosen.any() and not chosen.all():
                assert changes[chosen].min() >= changes[~chosen].max()
    assert len({candidate.rhythm for candidate in found}) == len(found)


@pytest.mark.parametrize("budget", ["17", "2.5x"])
def test_one_layer_more_would_exceed_the_limit(budget: str) -> None:
    problem = paper_problem(50, budget)
    for scored in learning_to_cache.search(lab_of(problem)):
        mask = scored.candidate.mask
        assert mask is not None
        cached = [(m, block) for m, row in enumerate(mask) for block, letter in enumerate(row) if letter == "."]
        larger = [
            tuple(row[:block] + "x" + row[block + 1 :] if i == m else row for i, row in enumerate(mask))
            for m, block in cached
        ]
        attention, mlp = ([replace(scored.candidate, mask=m) for m in larger if (m[0] == mask[0]) == k] for k in (0, 1))
        assert not (any(map(problem.fits, attention)) and any(map(problem.fits, mlp)))


def test_where_every_step_may_be_full_masks_compute_every_layer() -> None:
    found = [scored.candidate for scored in learning_to_cache.search(lab_of(paper_problem(20, "20")))]
    assert {candidate.rhythm.index("F", 1) for candidate in found} == {2, 3, 5}
    assert {candidate.mask for candidate in found} == {("x" * 28, "x" * 28)}


def test_one_full_step_leaves_no_period() -> None:
    with pytest.raises(SearchError, match="no step between full ones keeps to 1 full"):
        learning_to_cache.search(lab_of(paper_problem(20, "1")))


# TaylorSeer


@pytest.mark.parametrize("forward", [Forward.REUSE, Forward.RESIDUAL])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_first_two_steps_are_full_and_then_every_nth(order: int, forward: Forward) -> None:
    candidate = taylorseer.candidate(paper_problem(20), 4, order, forward)
    full = [i for i, step in enumerate(candidate.steps) if step == FULL]
    assert full == [0, 1, 5, 9, 13, 17]
    plain_steps = [FULL if i in full else REUSE for i in range(20)]
    assert candidate.steps == with_forecasts(plain_steps, order, taylor, forward)
    assert max(step.order for step in candidate.steps) == order
    letters = {Forward.REUSE: "123", Forward.RESIDUAL: "¹²³"}[forward]
    assert candidate.rhythm[2:5] == letters[0] * 3  # there are only two full steps by then
    assert candidate.rhythm[-2:] == letters[order - 1] * 2


def test_a_period_need_not_be_whole() -> None:
    candidate = taylorseer.candidate(paper_problem(20), 2.5, 1, Forward.REUSE)
    full = [i for i, step in enumerate(candidate.steps) if step == FULL]
    # 1 + 2.5 i, rounded to even: 1, 3 (2.5), 6, 9 (7.5), 11, 13 (12.5), 16, 19 (17.5)
    assert full == [0, 1, 3, 6, 9, 11, 13, 16, 19]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("max_order", [1, 3])
def test_taylorseer_tries_every_order_with_the_smallest_period_that_keeps_to_the_limit(
    budget: str, max_order: int
) -> None:
    problem = paper_problem(50, budget, max_order=max_order)
    found = {scored.candidate.name: scored.candidate for scored in taylorseer.search(lab_of(problem))}
    assert len(found) == 2 * max_order
    for name, candidate in found.items():
        period, order = float(name.split(",")[0].split()[-1]), int(name.split("order ")[1].split()[0])
        forward = Forward.RESIDUAL if name.endswith("residual") else Forward.REUSE
        assert taylorseer.candidate(problem, period, order, forward) == candidate
        assert problem.fits(candidate)
        periods = [i / 20 for i in range(20, round(period * 20))]
        assert not any(problem.fits(taylorseer.candidate(problem, n, order, forward)) for n in periods)
