"""What a report shows, made by hand, and a page taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Literal

import numpy as np

from hemiola.pictures import as_png, row_of
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.bench import Machine, Measurement, Spread
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import BackendSpec, EngineSpec, FileSpec, Manifest
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    MASKED,
    REUSE,
    Forward,
    FoundBy,
    ModelIdentity,
    Schedule,
    SchedulerIdentity,
    Step,
    TokenSelector,
    tokens,
)
from hemiola_search.record import Point
from hemiola_search.report import ReportInput, keys_of
from records import BUDGET, ERRORS, MADE_BY, RHYTHMS, point, record

STEPS: dict[str, Step] = {
    "F": FULL,
    "D": DEEP,
    "M": MASKED,
    "S": tokens(4),
    "C": REUSE,
    "1": Step(Forward.REUSE, None, (1.5, -0.5)),
}
IMAGES: tuple[Literal["searched", "held_out"], ...] = ("searched", "held_out")
IN_BUNDLE = ("taylorseer", "uniform", "procache", "fewer_steps", "full")
ENGINE_MS = {"full": 10.0, "tokens": 3.0, "reuse": 1.0, "reuse_1": 2.0}
CONDITIONING_MS, DECODER_MS = 2.0, 4.0
BATCH_SIZE = 2
MODEL = ModelIdentity("dit", "tiny", "0" * 64, (1, 8, 8))
SELECTOR = TokenSelector("value_norm", 0.0, 0.0, 1, 0)
VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})  # elements of HTML that have no end tag
BLOCKS = frozenset({"small", "span", "b"})  # elements whose text stands apart from what is around it


def schedule_by(strategy: str) -> Schedule:
    rhythm = RHYTHMS[strategy]
    is_deep = "S" in rhythm
    return Schedule(
        schema=2,
        model=MODEL,
        scheduler=SchedulerIdentity("DDIMScheduler", {}, len(rhythm), tuple(map(float, range(len(rhythm))))),
        guidance="classifier_free",
        deep_start=1 if is_deep else None,
        selector=SELECTOR if is_deep else None,
        mask=None,
        steps=tuple(STEPS[letter] for letter in rhythm),
        found_by=FoundBy(strategy, {}, 0, MADE_BY),
        measured={},
    )


SCHEDULES = {name: schedule_by(name) for name in IN_BUNDLE}
KEYS = keys_of(SCHEDULES)


def spread(median_ms: float) -> Spread:
    return Spread(median_ms, 0.9 * median_ms, 1.1 * median_ms, 1.2 * median_ms)


def measurement(name: str) -> Measurement:
    schedule = SCHEDULES[name]
    engines = {kind: spread(ENGINE_MS[kind]) for kind in schedule.kinds}
    engines |= {"conditioning": spread(CONDITIONING_MS), "vae_decoder": spread(DECODER_MS)}
    return Measurement(name, schedule.rhythm, spread(10.0 * len(schedule.steps)), 0.015, engines, 1.25)


def points_of(*, budget: str = BUDGET, cost: float = 30.0) -> list[Point]:
    """The best of every strategy of `records`, those of the bundle under its keys, and one more that was tried."""
    found = [
        point(strategy, images, budget=budget, cost=cost, key=KEYS.get(strategy), error=error)
        for strategy, held_out in ERRORS.items()
        for images, error in zip(IMAGES, (1.5 * held_out, held_out), strict=True)
    ]
    return [*found, point("procache", "searched", budget=budget, cost=cost, rhythm="FCCCFC", error=0.3)]


def png(seed: int) -> bytes:
    images = np.random.default_rng(seed).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    return as_png(row_of(images))


def report_input() -> ReportInput:
    """Make what a report of a bundle with four schedules shows."""
    schedules = {name: f"schedules/{name}.json" for name in SCHEDULES}
    engines = {
        name: EngineSpec(GraphSpec(name, f"engines/{name}.onnx", "0" * 64, (), (), (), 0), "0" * 64, ())
        for name in ("conditioning", *ENGINE_MS, "vae_decoder")
    }
    files = [*schedules.values(), *(engine.graph.file for engine in engines.values())]
    manifest = Manifest(
        schema=4,
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
            mask=None,
            has_block_counts=False,
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
        forwards={name: (name,) for name in ENGINE_MS},
        schedules=schedules,
        solvers={},
        files={file: FileSpec("0" * 64, 1) for file in files},
        parity={},
        forward_parity={},
        made_by=MadeBy("hemiola build graphs", {"onnxruntime": "1.23.0"}, None),
    )
    return ReportInput(
        record=record(*points_of()),
        manifest=manifest,
        schedules=SCHEDULES,
        measured={name: measurement(name) for name in ("full", *IN_BUNDLE)},
        batch_size=BATCH_SIZE,
        machine=Machine("A Processor", 16, "Linux x86_64", "3.11.0"),
        pictures={name: png(i) for i, name in enumerate(SCHEDULES)},
        differences={name: png(10 + i) for i, name in enumerate(SCHEDULES) if name != "full"},
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
        if tag in BLOCKS:
            self.handle_data(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags, f"</{tag}> closes nothing"
        assert self.open_tags.pop() == tag
        if tag in BLOCKS:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open_tags):
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]}{data}".split()) + " " * data.endswith(" ")

    def with_tag(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    def with_class(self, tag: str, word: str) -> list[dict[str, str | None]]:
        return [found for found in self.with_tag(tag) if word in (found.get("class") or "").split()]

    def row(self, name: str) -> list[str]:
        return next(row for row in self.table if row[0].startswith(name))

    @property
    def table(self) -> list[list[str]]:
        return [[cell.strip() for cell in row] for row in self.rows]


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    return page
