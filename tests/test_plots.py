from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest

from hemiola_search.appearance import LOOKS, look_of
from hemiola_search.plots import NARROW, SHEETS, WIDE, Sheet, marker_outline, pareto_plot, path_plot
from hemiola_search.record import CostSource, SearchRecord
from hemiola_search.strategies import STRATEGIES
from records import BUDGET, ERRORS, point, record

SVG = "{http://www.w3.org/2000/svg}"


def ids(text: str) -> set[str]:
    return {element.get("id", "") for element in ElementTree.fromstring(text).iter()} - {""}


def texts(text: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(text).iter(f"{SVG}text")]


def places(text: str, name: str) -> list[tuple[float, float]]:
    """Return where the markers of one part of a plot stand."""
    root = ElementTree.fromstring(text)
    part = next(element for element in root.iter(f"{SVG}g") if element.get("id") == name)
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in part.iter(f"{SVG}use")]


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.name)
@pytest.mark.parametrize("plot", [pareto_plot, path_plot])
def test_a_plot_is_the_same_every_time_and_as_wide_as_its_sheet(plot: object, sheet: Sheet) -> None:
    assert callable(plot)
    text = plot(record(), sheet)
    assert text.startswith("<svg ")
    assert text == plot(record(), sheet)
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == f"0 0 {sheet.width} {sheet.height}"
    assert root.get("width") is None  # the page decides
    assert "<style" not in text  # would rule the whole page


def test_plots_on_one_page_share_no_ids_and_refer_to_their_own() -> None:
    drawn = [plot(record(), sheet) for plot in (pareto_plot, path_plot) for sheet in SHEETS]
    for first, second in combinations(drawn, 2):
        assert ids(first).isdisjoint(ids(second))
    for text in drawn:
        referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        assert referred
        assert referred <= ids(text)


def test_every_held_out_schedule_is_a_point_with_its_interval_and_says_what_it_is() -> None:
    made = record()
    text = pareto_plot(made, WIDE)
    numbers = range(len(ERRORS))
    assert {f"pareto-wide-{part}-{i}" for part in ("point", "interval") for i in numbers} <= ids(text)
    tips = [element.text for element in ElementTree.fromstring(text).iter(f"{SVG}title")]
    assert "TaylorSeer “as named”: 0.0100 (0.00900–0.0110) at 30.00 ms" in tips
    assert len(tips) == len(ERRORS)
    assert len(places(text, "pareto-wide-tried-procache")) == 1
    assert {"pareto-wide-front", "pareto-wide-chosen", "pareto-wide-limit"} <= ids(text)


def test_the_chosen_schedule_is_ringed_where_it_stands() -> None:
    text = pareto_plot(record(), WIDE)
    chosen = places(text, "pareto-wide-chosen")
    assert chosen == places(text, "pareto-wide-point-0")  # points are numbered from the smallest error on
    lowest = max(y for i in range(len(ERRORS)) for _, y in places(text, f"pareto-wide-point-{i}"))
    assert chosen[0][1] == lowest


def test_schedules_of_one_cost_stand_beside_one_another_where_they_would_hide_each_other() -> None:
    apart, near = (0.01, 0.02), (0.01, 0.0105)
    for errors, is_moved in ((apart, False), (near, True)):
        first, second = (
            point(name, error=error) for name, error in zip(("uniform", "taylorseer"), errors, strict=True)
        )
        text = pareto_plot(record(first, second), WIDE)
        ((x, _),), ((other_x, _),) = (places(text, f"pareto-wide-point-{i}") for i in range(2))
        assert (other_x < x - WIDE.marker_size) == is_moved  # to the left: nothing lies beyond a limit


@pytest.mark.parametrize(
    ("costs", "axis", "note"),
    [
        (CostSource("ms", "here", ()), "cost, ms per image, measured", "uncached: 60.00 ms →"),
        (CostSource("GFLOP", "", ()), "cost, GFLOP per image, by the FLOPs model", "uncached: 60.00 GFLOP →"),
    ],
)
def test_the_axis_has_the_unit_of_the_costs_and_the_uncached_run_is_told(
    costs: CostSource, axis: str, note: str
) -> None:
    for sheet in SHEETS:
        said = texts(pareto_plot(record(costs=costs), sheet))
        assert {axis, note, f"limit of {BUDGET}", "speed-up against uncached", "2×"} <= set(said)


def test_a_budget_near_the_uncached_run_draws_it_as_a_line() -> None:
    made = record(limits={BUDGET: 59.0})
    text = pareto_plot(made, WIDE)
    assert "uncached: 60.00 ms" in texts(text)
    assert "pareto-wide-uncached" in ids(text)


def test_every_budget_has_its_limit() -> None:
    made = record(point("uniform"), point("uniform", budget="$2 & 2$", cost=20.0))
    assert {f"limit of {BUDGET}", "limit of $2 & 2$"} <= set(texts(pareto_plot(made, NARROW)))


def test_every_path_is_drawn_and_fewer_steps_are_marked_at_the_end() -> None:
    text = path_plot(record(), WIDE)
    drawn = {name.removeprefix("path-wide-") for name in ids(text)}
    assert {f"path-{strategy}" for strategy in ERRORS if strategy != "fewer_steps"} <= drawn
    assert "path-fewer_steps" not in drawn
    assert len(places(text, "path-wide-end-fewer_steps")) == 1


def test_full_steps_of_the_chosen_schedule_are_ticked() -> None:
    text = path_plot(record(), WIDE)
    part = next(e for e in ElementTree.fromstring(text).iter(f"{SVG}g") if e.get("id") == "path-wide-full-steps")
    assert len(list(part.iter(f"{SVG}path")) or list(part.iter(f"{SVG}use"))) == "FF1F11".count("F")
    assert "step; ticks: full steps of the chosen schedule" in texts(text)


def test_a_chosen_schedule_of_fewer_steps_has_no_ticks() -> None:
    made = record(point("fewer_steps", error=0.001), point("uniform"))
    text = path_plot(made, WIDE)
    assert "path-wide-full-steps" not in ids(text)
    assert "step" in texts(text)


@pytest.mark.parametrize("plot", [pareto_plot, path_plot])
def test_schedules_without_any_error_are_left_out(plot: object) -> None:
    assert callable(plot)
    exact = record(point("uniform", rhythm="FFFFFF", error=0.0))
    assert ElementTree.fromstring(plot(exact, NARROW)) is not None


def test_every_strategy_has_a_look_of_its_own() -> None:
    looks = [LOOKS[strategy] for strategy in STRATEGIES]
    for values in ([look.name for look in looks], [look.colour for look in looks], [look.marker for look in looks]):
        assert len(set(values)) == len(STRATEGIES)
    assert look_of("by_hand").name == "by_hand"


@pytest.mark.parametrize("strategy", [*LOOKS, "by_hand"])
def test_markers_are_outlines_of_about_two_units(strategy: str) -> None:
    outline = marker_outline(strategy)
    assert re.fullmatch(r"M[-\dMLQCZe. ]+", outline)
    numbers = [abs(float(number)) for number in re.findall(r"-?\d[\d.]*(?:e-\d+)?", outline)]
    assert max(numbers) == pytest.approx(1, abs=1e-9)


def test_a_record_of_one_schedule_can_be_drawn() -> None:
    made: SearchRecord = record(point("uniform"))
    assert "pareto-narrow-point-0" in ids(pareto_plot(made, NARROW))
    assert "path-narrow-path-uniform" in ids(path_plot(made, NARROW))
