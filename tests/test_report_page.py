from __future__ import annotations

import base64
import re
from dataclasses import replace

import numpy as np
import pytest

from hemiola.pictures import as_png
from hemiola_search.errors import SearchError
from hemiola_search.record import CostSource
from hemiola_search.report import ReportInput, chosen_schedule, difference_image, render_report
from hemiola_search.score import NOTES, note_id
from records import BUDGET, ERRORS, FIGURES, RHYTHMS, point, record
from report_pages import KEYS, SCHEDULES, Page, parsed, points_of, report_input, spread

LOADED = frozenset({"src", "srcset", "href", "xlink:href", "poster", "data", "action", "background"})
CHAIN = ("front", "deep")


@pytest.fixture(scope="module")
def given() -> ReportInput:
    return report_input()


@pytest.fixture(scope="module")
def text(given: ReportInput) -> str:
    return render_report(given)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return parsed(text)


def test_every_tag_of_the_page_is_closed_in_its_turn(page: Page) -> None:
    assert page.open_tags == []
    assert {"html", "head", "body", "table", "svg", "img"} <= {tag for tag, _ in page.elements}


def test_no_id_of_the_page_is_given_twice_and_every_reference_has_one(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    referred = {attributes["href"] for attributes in page.with_tag("use") if "href" in attributes}
    assert referred
    assert referred <= {f"#{name}" for name in ids}


def test_the_page_loads_nothing_from_elsewhere(text: str, page: Page) -> None:
    loaded = [value or "" for _, attributes in page.elements for key, value in attributes.items() if key in LOADED]
    assert loaded
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))


def test_the_page_shows_the_images_that_were_drawn_uncached_ones_first(given: ReportInput, page: Page) -> None:
    images = list(page.with_tag("img"))
    shown = [base64.b64decode((image["src"] or "").partition(",")[2]) for image in images]
    expected = [given.pictures["full"]]
    for name in ("taylorseer", "uniform", "procache", "fewer_steps"):
        expected += [given.pictures[name], given.differences[name]]
    assert shown == expected
    names = [image["alt"] for image in images]
    assert names[:4] == ["uncached", "TaylorSeer", "TaylorSeer, difference", "uniform (FORA)"]


def test_small_pictures_keep_their_pixels_and_large_ones_are_smoothed(given: ReportInput) -> None:
    large = as_png(np.zeros((128, 512, 1), dtype=np.uint8))
    pictures = {**given.pictures, "uniform": large}
    page = parsed(render_report(replace(given, pictures=pictures)))
    assert len(page.with_class("img", "small")) == len(list(page.with_tag("img"))) - 2  # its differences likewise


def test_differences_can_be_hidden_without_a_script(text: str, page: Page) -> None:
    (box,) = [attributes for attributes in page.with_tag("input") if attributes.get("type") == "checkbox"]
    assert "checked" in box
    assert [label["for"] for label in page.with_tag("label")] == [box["id"]]
    assert f"#{box['id']}:not(:checked) ~ .images .difference" in text


def test_the_page_draws_the_rhythm_of_every_schedule_that_was_found(page: Page) -> None:
    scores = [attributes["aria-label"] for attributes in page.with_class("div", "score")]
    assert scores == [RHYTHMS[name] for name in sorted(ERRORS, key=lambda name: ERRORS[name])]
    assert "3 × reuse, 2 × full, 1 × selected tokens" in page.text.replace(
        "\N{NO-BREAK SPACE}", " "
    )  # the most frequent comes first
    legend = page.text[page.text.index("The rhythm") : page.text.index("One note")]
    assert [word for word in ("full", "masked", "selected", "reuse", "order 1") if word not in legend] == []
    assert "order 2" not in legend


def test_every_note_has_a_symbol(page: Page) -> None:
    assert {note_id(letter) for letter in NOTES} <= {found["id"] for found in page.with_tag("g") if "id" in found}


def test_a_schedule_that_two_strategies_found_is_drawn_once(given: ReportInput) -> None:
    twin = point("toca", key=KEYS["uniform"], rhythm=RHYTHMS["uniform"], error=ERRORS["uniform"])
    page = parsed(render_report(replace(given, record=record(*points_of(), twin))))
    assert len(page.with_class("div", "score")) == len(ERRORS)
    assert "The same schedule as uniform (FORA)." in page.text
    assert page.row("ToCa")[0] == "ToCa as named the same schedule as uniform (FORA)"
    assert page.row("ToCa")[2] == "1.00× the same"


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("uncached", ["0", "–", "–", "–", "6", "60.00 41.50", "1.00×", "–", "1.0000"]),
        ("TaylorSeer", ["0.0100 0.00900–0.0110", "0.20× better", "0.19×", "0.0150", "3", "30.00 41.50", "2.00×"]),
        ("uniform (FORA)", ["0.0500 0.0450–0.0550", "1.00×", "0.95×", "0.0750", "3", "30.00 41.50", "2.00×"]),
        ("ProCache", ["0.0525 0.0473–0.0578", "1.05× not told apart", "1.00×", "0.0788", "2", "30.00 41.50", "2.00×"]),
        ("Learning-to-Cache", ["0.0800 0.0720–0.0880", "1.60× worse", "1.52×", "0.120", "2", "30.00 41.50", "2.00×"]),
        ("fewer steps", ["0.200 0.180–0.220", "4.00× worse", "3.81×", "0.300", "3 of 3", "30.00 41.50", "2.00×"]),
    ],
)
def test_the_table_holds_every_strategy_and_the_uncached_run(page: Page, name: str, cells: list[str]) -> None:
    row = page.row(name)
    assert row[1 : 1 + len(cells)] == cells


def test_rows_are_grouped_by_budget_and_ordered_by_error(given: ReportInput) -> None:
    points = [*points_of(), *points_of(budget="2.5×", cost=20.0)]
    page = parsed(render_report(replace(given, record=record(*points))))
    names = [row[0].partition(" as named")[0] for row in page.table]
    ordered = ["TaylorSeer", "uniform (FORA)", "ProCache", "Learning-to-Cache", "fewer steps"]
    first = [f"Budget of {BUDGET}: at most 31.00 ms per image", *ordered]
    second = ["Budget of 2.5×: at most 31.00 ms per image", *ordered]
    assert names[:14] == ["schedule", "uncached", *first, *second]
    assert len(list(page.with_tag("details"))) == 1  # the rhythms of the second budget


def test_only_the_schedule_that_was_found_is_marked(given: ReportInput) -> None:
    points = [*points_of(), *points_of(budget="2.5×", cost=20.0)]
    page = parsed(render_report(replace(given, record=record(*points))))
    marked = [i for i, row in enumerate(page.with_tag("tr")) if "chosen" in (row.get("class") or "")]
    assert [page.table[i][0] for i in marked] == ["TaylorSeer as named chosen", "TaylorSeer"]  # and as it was measured
    assert len(page.with_class("div", "chosen")) == 2  # its rhythm, and its images


def test_strategies_that_are_worse_than_even_spacing_are_marked(page: Page) -> None:
    worse = [i for i, row in enumerate(page.with_tag("tr")) if "worse" in (row.get("class") or "")]
    assert [page.table[i][0] for i in worse] == ["Learning-to-Cache as named", "fewer steps as named"]


def test_strategies_that_found_nothing_stand_in_the_table_with_their_reason(given: ReportInput) -> None:
    failures = {BUDGET: {"toca": "no interval keeps to <3 full>"}}
    page = parsed(render_report(replace(given, record=record(*points_of(), failures=failures))))
    assert page.row("ToCa") == ["ToCa found nothing", "no interval keeps to <3 full>"]
    assert "#marker-toca" in {attributes.get("href") for attributes in page.with_tag("use")}


def test_the_findings_say_which_ideas_paid(page: Page) -> None:
    for said in ("Forecasts pay: at best 0.0100", "Masks do not pay", "Selective tokens do not pay"):
        assert said in page.text


def test_the_figures_of_a_judge_are_shown_where_there_is_one(given: ReportInput, page: Page) -> None:
    assert not {"agreement", "Fréchet"} & set(page.table[0])
    judged = [replace(p, quality={**p.quality, "agreement": 0.95}) for p in points_of()]
    judged = [replace(p, intervals={**p.intervals, "agreement": (0.93, 0.97)}) for p in judged]
    judged += [point("toca", rhythm="FSSFSS", error=0.4, quality={**FIGURES, "frechet": 12.345, "lpips": 0.25})]
    page = parsed(render_report(replace(given, record=record(*judged))))
    assert page.table[0][-5:] == ["PSNR dB", "SSIM", "agreement", "Fréchet", "LPIPS"]
    assert page.row("ProCache")[-5:] == ["31.3", "0.9876", "95.0% 93.0–97.0%", "–", "–"]
    assert page.row("ToCa")[-3:] == ["–", "12.35", "0.2500"]
    assert "it is not FID" in page.text
    assert "as asked, by the judge" in page.text


@pytest.mark.parametrize(
    ("costs", "heading", "said"),
    [
        (
            CostSource("ms", "A Processor, batch 2", ("masked",)),
            "cost, ms GFLOP",
            "measured: A Processor, batch 2. Not",
        ),
        (CostSource("GFLOP", "", ()), "cost, GFLOP", "nothing was measured for this search"),
    ],
)
def test_costs_have_their_unit_and_say_where_they_come_from(
    given: ReportInput, costs: CostSource, heading: str, said: str
) -> None:
    page = parsed(render_report(replace(given, record=record(*points_of(), costs=costs))))
    assert page.table[0][6] == heading
    assert said in page.text
    assert page.row("uncached")[6] == ("60.00 41.50" if costs.unit == "ms" else "60.00")


def test_both_plots_are_drawn_for_a_laptop_and_for_a_phone(page: Page) -> None:
    assert len(page.with_class("div", "wide")) == len(page.with_class("div", "narrow")) == 2
    ids = {attributes.get("id") for _, attributes in page.elements}
    for strategy in ERRORS:
        drawn = "end" if strategy == "fewer_steps" else "path"
        assert {f"path-{sheet}-{drawn}-{strategy}" for sheet in ("wide", "narrow")} <= ids
        assert {f"pareto-{sheet}-tried-{strategy}" for sheet in ("wide", "narrow")} <= ids


def test_every_table_scrolls_by_itself(page: Page) -> None:
    assert len(page.with_class("div", "scroll")) == len(list(page.with_tag("table"))) + 1  # and the images


def test_names_of_another_make_are_text_and_no_markup(given: ReportInput) -> None:
    evil = '<script>"&'
    strange = point("by_hand", name=evil, rhythm="FCFCFC", error=0.3)
    made = record(*points_of(), strange, model="tiny", failures={BUDGET: {evil: evil}})
    page = parsed(render_report(replace(given, record=made, prompts=[evil])))
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.row("by_hand")[0] == f"by_hand {evil}"
    assert page.text.count(evil) >= 4


def test_the_measurement_is_shown_with_the_machine_that_made_it(page: Page) -> None:
    assert "A Processor, 16 cores, Python 3.11.0; batch 2" in page.text
    assert ["full", "10.000", "9.000", "11.000", "100.0%", "full"] in page.table
    assert ["tokens", "3.000", "2.700", "3.300", "30.0%", "tokens"] in page.table
    assert ["vae_decoder", "4.000", "3.600", "4.400", "40.0%", "vae_decoder"] in page.table
    # two images a request; cost and the speed-up that it promises are those of the record
    assert ["ProCache", "30.0", "1.25×", "60.0", "54.0", "66.0", "1.5%", "30.00 ms", "2.00×"] in page.table
    assert "the chosen schedule should be 2.00× faster; end to end it is 1.25×" in page.text
    assert "hemiola search tiny" in page.text
    assert "revision abcdef012345" in page.text


def test_a_forward_of_two_engines_is_as_long_as_both(given: ReportInput) -> None:
    engines = dict(given.manifest.engines)
    engines |= {name: replace(engines["full"], graph=replace(engines["full"].graph, name=name)) for name in CHAIN}
    forwards = {**given.manifest.forwards, "full": CHAIN}
    spreads = {"front": spread(6.0), "deep": spread(5.0)}
    kept = {"conditioning", "reuse", "vae_decoder"}
    measured = {
        name: replace(row, engines={**{key: row.engines[key] for key in kept & set(row.engines)}, **spreads})
        for name, row in given.measured.items()
    }
    manifest = replace(given.manifest, engines=engines, forwards=forwards)
    page = parsed(render_report(replace(given, manifest=manifest, measured=measured)))
    assert ["full", "11.000", "9.900", "12.100", "100.0%", "front + deep"] in page.table
    assert ["reuse", "1.000", "0.900", "1.100", "9.1%", "reuse"] in page.table


def test_the_schedule_that_was_chosen_is_found_by_what_it_computes(given: ReportInput) -> None:
    renamed = {"mine": SCHEDULES["taylorseer"], "full": SCHEDULES["full"]}
    assert chosen_schedule(given.record, given.manifest, renamed) == "mine"
    assert len(set(KEYS.values())) == len(KEYS)


@pytest.mark.parametrize("changed", [{"model": "other"}, {"chosen": KEYS["full"]}])
def test_a_record_of_another_search_is_refused(given: ReportInput, changed: dict[str, str]) -> None:
    schedules = {name: SCHEDULES[name] for name in ("taylorseer", "uniform")}
    uncached_chosen = point("fewer_steps", key=KEYS["full"], rhythm="FFFFFF", error=0.5)
    made = replace(record(*points_of(), uncached_chosen), **changed)  # type: ignore[arg-type]
    with pytest.raises(SearchError, match=r"Give the search\.json beside the schedule that was exported") as caught:
        chosen_schedule(made, given.manifest, schedules)
    assert "the bundle is of tiny and runs taylorseer, uniform" in str(caught.value)


@pytest.mark.parametrize(
    ("drawn", "reference", "grey"),
    [(0, 0, 128), (255, 255, 128), (110, 100, 168), (100, 110, 88), (255, 0, 255), (0, 255, 0), (131, 100, 252)],
)
def test_a_difference_is_drawn_four_times_enlarged_around_grey(drawn: int, reference: int, grey: int) -> None:
    images = np.full((2, 3, 4, 1), drawn, dtype=np.uint8), np.full((2, 3, 4, 1), reference, dtype=np.uint8)
    difference = difference_image(*images)
    assert difference.dtype == np.uint8
    assert difference.shape == (2, 3, 4, 1)
    assert set(difference.flat) == {grey}
