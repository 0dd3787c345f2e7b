from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from hemiola.pictures import as_png, row_of
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.bench import Machine, Measurement, Spread
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import BackendSpec, EngineSpec, FileSpec, Manifest
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    REUSE,
    FoundBy,
    ModelIdentity,
    Schedule,
    SchedulerIdentity,
    Step,
    TokenSelector,
    tokens,
)
from hemiola_search.plots import ParetoPoint, pareto_plot
from hemiola_search.record import Point, SearchRecord
from hemiola_search.report import LatencyModel, ReportInput, difference_image, render_report

STEPS: dict[str, Step] = {"F": FULL, "D": DEEP, "S": tokens(4), "C": REUSE}
RHYTHMS = {"procache": "FCSCFC", "uniform": "FCCFCC", "fewer_steps": "FF", "full": "FFFFFF"}
ENGINE_MS = {"F": 10.0, "S": 3.0, "C": 1.0}
CONDITIONING_MS, DECODER_MS = 2.0, 4.0
BATCH_SIZE = 2
MODEL = ModelIdentity("dit", "tiny", "0" * 64, (1, 8, 8))
SELECTOR = TokenSelector("value_norm", 0.0, 0.0, 1, 0)
MADE_BY = MadeBy("hemiola search tiny", {"python": "3.11.0", "torch": "2.11.0"}, "abcdef012345")
VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})  # elements of HTML that have no end tag
LOADED = frozenset({"src", "srcset", "href", "xlink:href", "poster", "data", "action", "background"})


def _schedule(strategy: str) -> Schedule:
    rhythm = RHYTHMS[strategy]
    is_deep = "S" in rhythm
    return Schedule(
        schema=1,
        model=MODEL,
        scheduler=SchedulerIdentity("DDIMScheduler", {}, len(rhythm), tuple(map(float, range(len(rhythm))))),
        guidance="classifier_free",
        deep_start=1 if is_deep else None,
        selector=SELECTOR if is_deep else None,
        steps=tuple(STEPS[letter] for letter in rhythm),
        found_by=FoundBy(strategy, {}, 0, MADE_BY),
        measured={},
    )


def _spread(median_ms: float) -> Spread:
    return Spread(median_ms, 0.9 * median_ms, 1.1 * median_ms, 1.2 * median_ms)


def _measurement(name: str) -> Measurement:
    rhythm = RHYTHMS[name]
    engines = {STEPS[letter].forward.value: _spread(ENGINE_MS[letter]) for letter in dict.fromkeys(rhythm)}
    engines |= {"conditioning": _spread(CONDITIONING_MS * len(rhythm) / 6), "vae_decoder": _spread(DECODER_MS)}
    return Measurement(name, rhythm, _spread(10.0 * len(rhythm)), 0.015, engines, 1.25)


def _point(strategy: str, images: str = "held_out", rhythm: str | None = None, **quality: float) -> Point:
    figures = {"relative_l2": 0.0123, "psnr": 31.27, "ssim": 0.9876} | quality
    return Point(
        strategy=strategy,
        name="uncached" if strategy == "full" else "as named",
        num_steps=6,
        rhythm=RHYTHMS[strategy] if rhythm is None else rhythm,
        tokens=0,
        images="held_out" if images == "held_out" else "searched",
        quality=figures,
        tera_flops=0.0415,
    )


def _png(seed: int) -> bytes:
    images = np.random.default_rng(seed).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    return as_png(row_of(images))


@pytest.fixture
def given() -> ReportInput:
    record = SearchRecord(
        schema=2,
        model="tiny",
        sampler="DDIM-6",
        guidance_scale=3.5,
        num_images=20,
        num_held_out=60,
        chosen=RHYTHMS["procache"],
        points=(
            _point("procache", "searched", "FCCCFC"),
            _point("procache", "searched"),
            _point("full", relative_l2=0.0, psnr=100.0, ssim=1.0),
            _point("procache"),
            _point("uniform", relative_l2=0.05),
            _point("fewer_steps", relative_l2=0.2),
        ),
        made_by=MADE_BY,
        prompts=(),
    )
    schedules = {name: f"schedules/{name}.json" for name in RHYTHMS}
    engines = {
        name: EngineSpec(GraphSpec(name, f"engines/{name}.onnx", "0" * 64, (), (), (), 0), "0" * 64, ())
        for name in ("conditioning", "full", "tokens", "reuse", "vae_decoder")
    }
    files = [*schedules.values(), *(engine.graph.file for engine in engines.values())]
    manifest = Manifest(
        schema=3,
        backend=BackendSpec("onnxruntime", "1.23.0"),
        pipeline=Pipeline(
            model=MODEL,
            guidance="classifier_free",
            num_blocks=2,
            width=32,
            patch_size=2,
            branches=("attention", "mlp"),
            state_rows=1,
            deep_start=1,
            selector=SELECTOR,
            labels={"0": "zero"},
            text=None,
            min_size=(8, 8),
            max_size=(8, 8),
            pixels_per_latent=1,
            image_channels=1,
            tile_size=None,
        ),
        precision="fp32",
        max_batch_size=4,
        engines=engines,
        forwards={name: (name,) for name in ("full", "tokens", "reuse")},
        schedules=schedules,
        solvers={},
        files={file: FileSpec("0" * 64, 1) for file in files},
        parity={},
        forward_parity={},
        made_by=MadeBy("hemiola build graphs", {"onnxruntime": "1.23.0"}, None),
    )
    return ReportInput(
        record=record,
        manifest=manifest,
        schedules={name: _schedule(name) for name in RHYTHMS},
        measured={name: _measurement(name) for name in RHYTHMS},
        batch_size=BATCH_SIZE,
        machine=Machine("A Processor", 16, "Linux x86_64", "3.11.0"),
        pictures={name: _png(i) for i, name in enumerate(RHYTHMS)},
        differences={name: _png(10 + i) for i, name in enumerate(RHYTHMS) if name != "full"},
    )


@dataclass
class Page(HTMLParser):
    """A page in parts: its elements, and the text of every cell by row; fails on tags that do not match."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags, f"</{tag}> closes nothing"
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open_tags and self.open_tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def with_tag(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)


def _parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    return page


def test_every_tag_of_the_page_is_closed_in_its_turn(given: ReportInput) -> None:
    page = _parsed(render_report(given))
    assert page.open_tags == []
    assert {"html", "head", "body", "table", "svg", "img"} <= {tag for tag, _ in page.elements}


def test_the_page_loads_nothing_from_elsewhere(given: ReportInput) -> None:
    text = render_report(given)
    page = _parsed(text)
    loaded = [value or "" for _, attributes in page.elements for key, value in attributes.items() if key in LOADED]
    assert loaded
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))


def test_the_page_shows_the_images_that_were_drawn_uncached_ones_first(given: ReportInput) -> None:
    images = list(_parsed(render_report(given)).with_tag("img"))
    shown = [base64.b64decode((image["src"] or "").partition(",")[2]) for image in images]
    expected = [given.pictures["full"]]
    for name in ("procache", "uniform", "fewer_steps"):
        expected += [given.pictures[name], given.differences[name]]
    assert shown == expected
    names = ["uncached", "ProCache", "difference", "uniform period (FORA)", "difference", "fewer steps", "difference"]
    assert [image["alt"] for image in images] == names


def test_the_page_draws_the_rhythm_of_every_schedule(given: ReportInput) -> None:
    page = _parsed(render_report(given))
    bars = [attributes["aria-label"] for attributes in page.with_tag("div") if attributes.get("class") == "bars"]
    assert bars == list(RHYTHMS.values())
    for letter in "FSC":
        drawn = [attributes for attributes in page.with_tag("i") if attributes == {"class": letter}]
        assert len(drawn) == "".join(RHYTHMS.values()).count(letter)
    assert "2 full, 3 reuse, 1 tokens" not in page.text  # the most frequent comes first
    assert "3 reuse, 2 full, 1 tokens" in page.text


@pytest.mark.parametrize(
    ("name", "milliseconds", "speedup"),
    [  # conditioning 2 ms for 6 steps, decoder 4, full 10, tokens 3, reuse 1; two images at once
        ("uncached", "33.0", "1.00×"),  # (2 + 4 + 60) / 2
        ("ProCache as named", "16.0", "2.06×"),  # (2 + 4 + 20 + 3 + 3) / 2
        ("uniform period (FORA) as named", "15.0", "2.20×"),  # (2 + 4 + 20 + 4) / 2
        ("fewer steps as named", "12.3", "2.68×"),  # (2·2/6 + 4 + 20) / 2
    ],
)
def test_the_table_holds_the_schedule_both_baselines_and_the_uncached_run(
    given: ReportInput, name: str, milliseconds: str, speedup: str
) -> None:
    row = _parsed(render_report(given)).row(name)
    assert row[2:4] == [milliseconds, speedup]
    assert row[-1] == "41.5"  # GFLOP


def test_the_table_shows_the_figures_of_held_out_images(given: ReportInput) -> None:
    page = _parsed(render_report(given))
    assert page.row("ProCache as named")[1:] == ["2", "16.0", "2.06×", "0.0123", "31.3", "0.9876", "41.5"]
    assert page.row("uncached")[5] == "–"  # its PSNR against itself says nothing
    assert [row[0] for row in page.rows].count("ProCache as named") == 1


def test_only_the_schedule_that_was_found_is_marked(given: ReportInput) -> None:
    page = _parsed(render_report(given))
    marked = [i for i, attributes in enumerate(page.with_tag("tr")) if attributes.get("class") == "chosen"]
    assert [page.rows[i][0] for i in marked] == ["ProCache as named"]


def test_the_figures_of_a_judge_are_shown_where_there_is_one(given: ReportInput) -> None:
    headings = _parsed(render_report(given)).rows[0]
    assert not {"agreement", "Fréchet"} & set(headings)
    judged = [replace(point, quality={**point.quality, "agreement": 0.95}) for point in given.record.points]
    judged[3] = replace(judged[3], quality={**judged[3].quality, "frechet": 12.345})
    page = _parsed(render_report(replace(given, record=replace(given.record, points=tuple(judged)))))
    assert page.rows[0][7:9] == ["agreement", "Fréchet"]
    assert page.row("ProCache as named")[7:9] == ["95.0%", "12.35"]
    assert page.row("uniform period (FORA) as named")[7:9] == ["95.0%", "–"]
    assert "it is not FID" in page.text


def test_a_schedule_with_a_forward_that_was_not_measured_has_no_latency(given: ReportInput) -> None:
    points = (*given.record.points, replace(_point("by_hand", rhythm="FDCFDC")))
    page = _parsed(render_report(replace(given, record=replace(given.record, points=points))))
    assert page.row("by_hand as named")[2:4] == ["–", "–"]


def test_the_measurement_is_shown_with_the_machine_that_made_it(given: ReportInput) -> None:
    page = _parsed(render_report(given))
    assert "A Processor, 16 cores, Python 3.11.0; batch 2" in page.text
    assert page.row("full") == ["full", "10.000", "9.000", "11.000", "100.0%"]
    assert page.row("tokens") == ["tokens", "3.000", "2.700", "3.300", "30.0%"]
    assert ["ProCache", "60.0", "54.0", "66.0", "1.25×", "1.5%"] in page.rows
    assert "hemiola search tiny" in page.text
    assert "revision abcdef012345" in page.text


@pytest.mark.parametrize(
    ("rhythm", "milliseconds"),
    [
        ("FFFFFF", 33.0),
        ("FCCCCC", 10.5),  # (2 + 4 + 10 + 5) / 2
        ("FSSSSS", 15.5),  # (2 + 4 + 10 + 15) / 2
        ("F" * 12, 64.0),  # (4 + 4 + 120) / 2: twice the steps, twice the conditioning
        ("FD", None),
    ],
)
def test_a_latency_is_the_sum_of_its_forwards(given: ReportInput, rhythm: str, milliseconds: float | None) -> None:
    latency = LatencyModel(given.measured, BATCH_SIZE, num_steps=6).latency(rhythm)
    assert latency is None if milliseconds is None else latency == pytest.approx(milliseconds)


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


def test_the_plot_names_every_strategy_and_is_the_same_every_time() -> None:
    points = [
        ParetoPoint("procache", 16.0, 0.01, is_chosen=True, is_minor=False),
        ParetoPoint("procache", 17.0, 0.02, is_chosen=False, is_minor=True),
        ParetoPoint("uniform", 15.0, 0.05, is_chosen=False, is_minor=False),
        ParetoPoint("by_hand", 12.0, 0.2, is_chosen=False, is_minor=False),
    ]
    text = pareto_plot(points)
    assert text.startswith("<svg")
    for name in ("ProCache", "ProCache, all candidates", "uniform period (FORA)", "by_hand"):
        assert f">{name}</text>" in text
    assert pareto_plot(points) == text
