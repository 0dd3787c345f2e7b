from __future__ import annotations

from dataclasses import replace

import pytest

from hemiola_search.comparison import (
    Verdict,
    chosen_point,
    components_of,
    costs_text,
    described,
    error_text,
    findings_of,
    first_budget,
    pareto_front,
    rows_of,
    strategies_of,
    uncached_point,
    verdict_of,
)
from hemiola_search.errors import SearchError
from hemiola_search.record import CostSource
from records import BUDGET, point, record, uncached


def test_rows_stand_in_the_order_of_their_held_out_errors() -> None:
    rows = rows_of(record(), BUDGET)
    found = [(row.point.strategy, row.error, row.verdict, row.is_chosen) for row in rows]
    assert found == [
        ("taylorseer", 0.01, Verdict.BETTER, True),
        ("uniform", 0.05, None, False),
        ("procache", 0.0525, Verdict.UNCLEAR, False),  # 0.04725 lies below 0.055
        ("learning_to_cache", 0.08, Verdict.WORSE, False),
        ("fewer_steps", 0.2, Verdict.WORSE, False),
    ]
    assert [row.speedup for row in rows] == [2.0] * 5
    assert [row.of_uniform for row in rows] == pytest.approx([0.2, 1, 1.05, 1.6, 4])
    assert [row.of_procache for row in rows] == pytest.approx([0.2 / 1.05, 1 / 1.05, 1, 1.6 / 1.05, 4 / 1.05])


def test_a_row_tells_the_figure_it_was_chosen_by() -> None:
    points = point("uniform", "searched", error=0.04), point("uniform", error=0.05)
    (row,) = rows_of(record(*points), BUDGET)
    assert row.searched == points[0]
    assert row.of_procache is None


def test_equal_schedules_are_said_to_be_the_same() -> None:
    first, second = point("uniform", key="k"), point("procache", rhythm="FCFCFC", key="k", error=0.05)
    rows = rows_of(record(first, second), BUDGET)
    assert [row.same_as for row in rows] == [(), ("uniform",)]
    assert [row.verdict for row in rows] == [None, Verdict.SAME]


def test_only_at_the_first_budget_a_schedule_is_the_chosen_one() -> None:
    points = point("uniform", key="k"), point("uniform", key="k", budget="2 full")
    made = record(*points)
    assert first_budget(made) == BUDGET
    assert [[row.is_chosen for row in rows_of(made, budget)] for budget in made.limits] == [[True], [False]]


@pytest.mark.parametrize(
    ("mine", "other", "verdict"),
    [
        (0.01, 0.02, Verdict.BETTER),
        (0.02, 0.01, Verdict.WORSE),
        (0.019, 0.02, Verdict.UNCLEAR),  # 0.0171–0.0209 and 0.018–0.022
        (0.01, 0.0123, Verdict.BETTER),  # 0.009–0.011 and 0.01107–0.01353
        (0.01, 0.0122, Verdict.UNCLEAR),  # 0.009–0.011 and 0.01098–0.01342
    ],
)
def test_errors_are_told_apart_where_their_intervals_are_apart(mine: float, other: float, verdict: Verdict) -> None:
    assert verdict_of(point("toca", rhythm="FSSFSS", error=mine), point("uniform", error=other)) is verdict


def test_without_intervals_means_decide() -> None:
    mine, other = (point(name, "searched", error=error) for name, error in (("procache", 0.019), ("uniform", 0.02)))
    assert verdict_of(mine, other) is Verdict.BETTER


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    figures = [(10, 0.5), (20, 0.3), (20, 0.2), (25, 0.4), (30, 0.2), (40, 0.1)]
    points = [point("uniform", cost=cost, error=error, name=str(i)) for i, (cost, error) in enumerate(figures)]
    assert [front.name for front in pareto_front(points)] == ["0", "2", "5"]


def test_components_are_compared_with_the_best_schedules_without_them() -> None:
    tokens, masks, forecasts = components_of(record(), BUDGET)
    for component, name, best_with, best_without, verdict in (
        (tokens, "selective tokens", "procache", "taylorseer", Verdict.WORSE),
        (masks, "masks", "learning_to_cache", "taylorseer", Verdict.WORSE),
        (forecasts, "forecasts", "taylorseer", "uniform", Verdict.BETTER),
    ):
        assert component.best_with is not None
        assert component.best_without is not None
        assert component.plain is not None
        assert (component.name, component.verdict) == (name, verdict)
        assert (component.best_with.strategy, component.best_without.strategy) == (best_with, best_without)
        assert component.plain.strategy == "uniform"
        assert component.best_with.images == "held_out"


def test_a_residual_that_is_repeated_is_no_forecast() -> None:
    letters = {"uniform": "FCFCFC", "magcache": "FRFRFR", "taylorseer": "FF¹F¹¹"}
    tried = [
        point(name, "searched", rhythm=rhythm, error=0.01 * (i + 1)) for i, (name, rhythm) in enumerate(letters.items())
    ]
    found = {component.name: component for component in components_of(record(point("uniform"), *tried), BUDGET)}
    assert found["forecasts"].best_with == tried[2]
    assert found["forecasts"].best_without == tried[0]
    assert found["residuals of the whole model"].best_with == tried[1]
    assert "deep blocks" not in found  # told of only where they were tried


def test_what_costs_too_much_or_caches_nothing_is_no_argument_for_or_against_an_idea() -> None:
    dear = point("taylorseer", "searched", cost=31.1)
    fewer = point("fewer_steps", "searched", error=0.001)
    made = record(point("uniform"), point("uniform", "searched"), dear, fewer)
    found = {component.name: component for component in components_of(made, BUDGET)}
    assert found["forecasts"].best_with is None
    assert [component.verdict for component in found.values()] == [None] * 3


def test_a_component_that_was_not_held_out_is_compared_on_the_images_of_the_search() -> None:
    points = [point("uniform"), point("uniform", "searched"), point("procache", "searched")]
    tokens = components_of(record(*points), BUDGET)[0]
    assert tokens.best_with == points[2]
    assert tokens.best_without == points[1]
    assert "on the 20 images searched on" in " ".join(findings_of(record(*points), BUDGET))


def test_the_findings_say_what_is_best_what_is_worse_than_even_spacing_and_what_paid() -> None:
    assert findings_of(record(), BUDGET) == [
        "The smallest error on held-out images is that of TaylorSeer “as named”: 0.0100 (0.00900–0.0110), which is "
        "0.20 times that of uniform (FORA) and 0.05 times that of fewer steps.",
        "Worse than a uniform period at this cost: Learning-to-Cache and fewer steps.",
        "Selective tokens do not pay: at best 0.0525 (0.0473–0.0578) with them (ProCache “as named”), "
        "0.0100 (0.00900–0.0110) without (TaylorSeer “as named”), on the 60 held-out images. "
        "Repeating caches alone gives 0.0500 (0.0450–0.0550).",
        "Masks do not pay: at best 0.0800 (0.0720–0.0880) with them (Learning-to-Cache “as named”), "
        "0.0100 (0.00900–0.0110) without (TaylorSeer “as named”), on the 60 held-out images. "
        "Repeating caches alone gives 0.0500 (0.0450–0.0550).",
        "Forecasts pay: at best 0.0100 (0.00900–0.0110) with them (TaylorSeer “as named”), "
        "0.0500 (0.0450–0.0550) by repeating caches (uniform (FORA) “as named”), on the 60 held-out images.",
    ]


def test_the_findings_say_that_caching_does_not_pay_where_fewer_steps_are_best() -> None:
    fewer, even = point("fewer_steps", error=0.04), point("uniform")
    said = findings_of(record(fewer, even), BUDGET)
    assert said[1] == "Caching does not pay at this budget: fewer steps, all of them computed, land closer."
    assert "Selective tokens: no schedule with them was tried." in said


@pytest.mark.parametrize(
    ("error", "told"), [(0.0105, "not told apart from the best"), (0.02, "worse than the best, beyond")]
)
def test_the_findings_say_where_another_schedule_than_the_chosen_one_is_best(error: float, told: str) -> None:
    best, chosen = point("taylorseer"), point("procache", error=error)
    said = findings_of(record(best, chosen, chosen=chosen.key), BUDGET)
    assert said[1].startswith("The schedule that was chosen, ProCache “as named”, was the best on the images of the")
    assert told in said[1]


def test_strategies_have_one_order_and_unknown_ones_come_last() -> None:
    points = [point(name) for name in ("taylorseer", "uniform", "fewer_steps")]
    made = record(point("by_hand", rhythm="FCFCFC", error=0.1), *points)
    assert strategies_of(made) == ["fewer_steps", "uniform", "taylorseer", "by_hand"]
    assert described(made.points[1]) == "by_hand “as named”"
    assert described(uncached()) == "uncached"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (CostSource("GFLOP", "", ()), ["by the FLOPs model", "nothing was measured", "count nothing"]),
        (CostSource("ms", "here, batch 2", ()), ["milliseconds per image, measured: here, batch 2."]),
        (CostSource("ms", "here", ("masked", "reuse_3")), ["measured: here.", "Not measured", ": masked, reuse_3."]),
    ],
)
def test_costs_are_said_to_be_measured_or_estimated(source: CostSource, said: list[str]) -> None:
    text = costs_text(record(costs=source))
    assert [part for part in said if part not in text] == []
    assert ("estimated" in text) == bool(source.estimated)


def test_an_error_without_an_interval_stands_alone() -> None:
    assert error_text(point("uniform", "searched", error=0.0123456)) == "0.0123"
    assert error_text(point("uniform", error=0.0123456)) == "0.0123 (0.0111–0.0136)"


def test_a_record_that_lacks_what_it_is_about_is_refused() -> None:
    made = record()
    with pytest.raises(SearchError, match="no uncached run to compare with"):
        uncached_point(replace(made, points=made.points[1:]))
    with pytest.raises(SearchError, match="no held-out figures of the schedule that it chose"):
        chosen_point(replace(made, chosen="another"))
    with pytest.raises(SearchError, match="names no budget"):
        first_budget(replace(made, limits={}))
