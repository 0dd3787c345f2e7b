from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hemiola_runtime.schedule import DEEP, FULL, REUSE, Forward, Step, tokens
from hemiola_search import forecasts
from hemiola_search.calibration import Calibration
from hemiola_search.forecasts import Fitted, Weigh, polynomial, taylor, with_forecasts
from labs import calibration_of, paper_problem
from strategies import examples

Floats = NDArray[np.float64]
NUM_STEPS: Final = 14
CALIBRATION: Final = calibration_of(paper_problem(NUM_STEPS))


@st.composite
def histories(draw: st.DrawFn, most: int = 4) -> tuple[int, tuple[int, ...]]:
    """Draw a step and full steps before it, the newest first."""
    full_steps = draw(st.lists(st.integers(0, 49), min_size=1, max_size=most, unique=True))
    ordered = tuple(sorted(full_steps, reverse=True))
    return draw(st.integers(ordered[0] + 1, ordered[0] + 12)), ordered


def _rules(calibration: Calibration) -> dict[str, Weigh]:
    fitted = {f"fitted {forward.value}": Fitted(calibration, forward).weigh for forward in OUTPUTS}
    return {"taylor": taylor, "polynomial": polynomial, **fitted}


def _outputs(calibration: Calibration, forward: Forward, full_steps: tuple[int, ...]) -> Floats:
    """Return the products that a forecast is made of; behind the first full step there is plain `reuse` alone."""
    return OUTPUTS[forward if len(full_steps) > 1 else Forward.REUSE](calibration)


OUTPUTS: Final[dict[Forward, Callable[[Calibration], Floats]]] = {
    Forward.REUSE: lambda calibration: calibration.outputs,
    Forward.RESIDUAL: lambda calibration: calibration.residual_outputs,
}

# the two that are arithmetic


@given(history=histories())
@examples(100)
def test_weights_of_taylor_and_polynomial_add_up_to_one(history: tuple[int, tuple[int, ...]]) -> None:
    for weigh in (taylor, polynomial):
        weights = weigh(*history)
        assert len(weights) == len(history[1])
        assert sum(weights) == pytest.approx(1, abs=1e-9 * sum(map(abs, weights)))
        assert weights[0] > 0


@given(history=histories(), coefficients=st.lists(st.floats(-10, 10), min_size=4, max_size=4))
@examples(100)
def test_the_polynomial_is_exact_on_polynomials_of_its_order(
    history: tuple[int, tuple[int, ...]], coefficients: list[float]
) -> None:
    step, full_steps = history
    curve = np.polynomial.Polynomial(coefficients[: len(full_steps)])
    weights = polynomial(step, full_steps)
    terms = [weight * curve(place) for weight, place in zip(weights, full_steps, strict=True)]
    rounding = 1e-11 * (1 + sum(map(abs, terms)))
    assert sum(terms) == pytest.approx(float(curve(step)), abs=rounding)


@given(history=histories(most=2), offset=st.floats(-10, 10), slope=st.floats(-10, 10))
@examples(60)
def test_order_1_is_exact_on_a_straight_line(history: tuple[int, tuple[int, ...]], offset: float, slope: float) -> None:
    step, full_steps = history
    line = [offset + slope * place for place in (step, *full_steps)]
    if len(full_steps) == 2:
        assert float(np.dot(taylor(step, full_steps), line[1:])) == pytest.approx(line[0], abs=1e-9)
    assert taylor(step, full_steps) == pytest.approx(polynomial(step, full_steps))


def test_taylor_of_order_2_is_not_exact_on_a_parabola() -> None:
    """Finite differences are not derivatives: of x², over full steps 4, 2, 0 and one step ahead."""
    # D_0 = 16, D_1 = (16 - 4) / 2 = 6, its older value (4 - 0) / 2 = 2, D_2 = (6 - 2) / 2 = 2: 16 + 6 + 2 / 2 = 23
    weights = taylor(5, (4, 2, 0))
    assert np.dot(weights, [16, 4, 0]) == pytest.approx(23)
    assert np.dot(polynomial(5, (4, 2, 0)), [16, 4, 0]) == pytest.approx(25)


def _taylorseer(features: dict[int, float], step: int, order: int) -> float:
    """Forecast as TaylorSeer's code does: differences are updated at every full step, and kept up to an order."""
    differences: list[float] = []
    last = 0
    for place, feature in features.items():
        updated = [feature]
        for i in range(min(order, len(differences))):
            updated.append((updated[i] - differences[i]) / (place - last))
        differences, last = updated, place
    elapsed, total, factorial = step - last, 0.0, 1
    for i, difference in enumerate(differences):
        factorial *= max(1, i)
        total += difference * elapsed**i / factorial
    return total


@given(history=histories(), values=st.lists(st.floats(-10, 10), min_size=4, max_size=4))
@examples(100)
def test_taylor_is_the_recursion_of_differences_of_its_paper(
    history: tuple[int, tuple[int, ...]], values: list[float]
) -> None:
    step, full_steps = history
    features = dict(zip(reversed(full_steps), values, strict=False))
    weights = taylor(step, full_steps)
    terms = [weight * features[place] for weight, place in zip(weights, full_steps, strict=True)]
    expected = _taylorseer(features, step, len(full_steps) - 1)
    assert sum(terms) == pytest.approx(expected, abs=1e-10 * (1 + sum(map(abs, terms))))


def test_one_full_step_is_repeated() -> None:
    assert taylor(7, (3,)) == polynomial(7, (3,)) == (1.0,)


# writing them into schedules


def _steps(rhythm: str) -> tuple[Step, ...]:
    letters = {"F": FULL, "C": REUSE, "D": DEEP, "S": tokens(4)}
    return tuple(letters[letter] for letter in rhythm)


def test_a_forecast_is_made_of_as_many_full_steps_as_there_are() -> None:
    found = with_forecasts(_steps("FCFCCFCFFC"), 2)
    assert "".join(step.symbol for step in found) == "FCF11F2FF2"
    assert found[3].forecast == taylor(3, (2, 0))
    assert found[6].forecast == taylor(6, (5, 2, 0))
    assert found[9].forecast == taylor(9, (8, 7, 5))


def test_steps_that_refresh_forecast_what_they_read_and_keep_their_tokens() -> None:
    found = with_forecasts(_steps("FFDSC"), 1, polynomial)
    assert [step.kind for step in found] == ["full", "full", "deep_1", "tokens_1", "reuse_1"]
    assert found[3].tokens == 4
    assert [step.forecast for step in found[2:]] == [polynomial(i, (1, 0)) for i in (2, 3, 4)]


def test_the_residual_is_forecast_as_soon_as_there_are_two_full_steps() -> None:
    found = with_forecasts(_steps("FCFCDFC"), 2, forward=Forward.RESIDUAL)
    assert [step.kind for step in found] == ["full", "reuse", "full", "residual_1", "deep_1", "full", "residual_2"]


def test_forecasts_of_order_0_leave_a_schedule_as_it_is() -> None:
    assert with_forecasts(_steps("FCFCC"), 0) == _steps("FCFCC")


# those that are fitted


@given(history=histories())
@examples(60)
def test_weights_of_every_rule_add_up_to_one(history: tuple[int, tuple[int, ...]]) -> None:
    step, full_steps = min(history[0], NUM_STEPS - 1), tuple(place for place in history[1] if place < NUM_STEPS - 1)
    if not full_steps or step <= full_steps[0]:
        return
    for weigh in _rules(CALIBRATION).values():
        assert sum(weigh(step, full_steps)) == pytest.approx(1, abs=1e-6)


def _error(products: Floats, step: int, full_steps: tuple[int, ...], weights: tuple[float, ...]) -> float:
    """Return ‖Σ w_i o_i - o_t‖ of the products of one step."""
    places, signed = [*full_steps, step], np.array([*weights, -1.0])
    squared = signed @ products[step][np.ix_(places, places)] @ signed
    return float(np.sqrt(max(squared, 0)))


@pytest.mark.parametrize("forward", OUTPUTS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", [1, 2])
def test_a_fitted_forecast_is_never_worse_than_the_newest_alone(forward: Forward, seed: int, order: int) -> None:
    calibration = calibration_of(paper_problem(NUM_STEPS), seed)
    products, fitted = OUTPUTS[forward](calibration), Fitted(calibration, forward)
    full_steps = (6, 4, 1)[: order + 1]
    for step in range(7, NUM_STEPS):
        mine = _error(products, step, full_steps, fitted.weigh(step, full_steps))
        assert mine <= _error(products, step, full_steps, (1.0, *(0.0,) * order)) * (1 + 1e-9)


@pytest.mark.parametrize("forward", OUTPUTS)
def test_without_a_ridge_a_fit_is_the_best_of_all_weights_that_add_up_to_one(
    forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "RIDGE", 0.0)
    products, fitted = OUTPUTS[forward](CALIBRATION), Fitted(CALIBRATION, forward)
    draw = np.random.default_rng(0)
    for step in range(9, NUM_STEPS):
        full_steps = (8, 5, 3)
        best = fitted.weigh(step, full_steps)
        least = _error(products, step, full_steps, best)
        for _ in range(20):
            shift = draw.normal(size=3)
            other = tuple(float(w) for w in np.array(best) + 0.1 * (shift - shift.mean()))
            assert least <= _error(products, step, full_steps, other) + 1e-9
        for weigh in (taylor, polynomial):
            assert least <= _error(products, step, full_steps, weigh(step, full_steps)) + 1e-9


def test_a_fit_finds_the_combination_that_outputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "RIDGE", 0.0)
    draw = np.random.default_rng(1)
    true = (1.6, -0.9, 0.3)
    drawn = draw.normal(size=(10, 12))
    drawn[9] = true[0] * drawn[8] + true[1] * drawn[6] + true[2] * drawn[2]
    fitted = _fitted(drawn)
    assert fitted.weigh(9, (8, 6, 2)) == pytest.approx(true)
    assert fitted.errors((8, 6, 2)) == pytest.approx([0], abs=1e-6)


def _fitted(drawn: Floats) -> Fitted:
    """Fit on the same output (T, n) of each step's cache at all steps."""
    count = len(drawn)
    outputs = np.broadcast_to(drawn @ drawn.T, (count,) * 3)
    return Fitted(replace(CALIBRATION, outputs=outputs, sensitivity=np.ones(count)))


def test_a_ridge_keeps_weights_small_where_full_steps_lie_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(2)
    line = np.array([0.0, 1.0, 2.0, 3.0])[:, None] * draw.normal(size=20) + 1e-5 * draw.normal(size=(4, 20))
    line[3] += 0.1 * draw.normal(size=20)  # which is not on it
    weights = _fitted(line).weigh(3, (2, 1, 0))
    assert max(map(abs, weights)) < 3
    monkeypatch.setattr(forecasts, "RIDGE", 0.0)
    assert max(map(abs, _fitted(line).weigh(3, (2, 1, 0)))) > 100


def test_where_full_steps_do_not_differ_the_newest_is_repeated() -> None:
    assert _fitted(np.ones((5, 3))).weigh(4, (2, 1, 0)) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("forward", OUTPUTS)
@pytest.mark.parametrize("full_steps", [(0,), (5,), (5, 2), (7, 6, 0), (NUM_STEPS - 2, 3)])
def test_errors_are_those_of_the_outputs_times_what_an_error_does(
    forward: Forward, full_steps: tuple[int, ...]
) -> None:
    fitted = Fitted(CALIBRATION, forward)
    expected = [
        _error(_outputs(CALIBRATION, forward, full_steps), step, full_steps, fitted.weigh(step, full_steps))
        * CALIBRATION.sensitivity[step]
        for step in range(full_steps[0] + 1, NUM_STEPS)
    ]
    np.testing.assert_allclose(fitted.errors(full_steps), expected, rtol=1e-9, atol=1e-9)


def test_behind_the_last_step_there_is_nothing_to_forecast() -> None:
    assert Fitted(CALIBRATION).errors((NUM_STEPS - 1, 3)).shape == (0,)
