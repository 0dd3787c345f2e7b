"""The report: one self-contained HTML page from a bundle, a measurement of it and the record of the search."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from hemiola_runtime.bench import Machine, Measurement
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.schedule import Forward, Schedule
from hemiola_search.appearance import FIGURES, amount, look_of, significant
from hemiola_search.comparison import (
    ERROR,
    Row,
    Verdict,
    budget_text,
    chosen_point,
    costs_text,
    described,
    figures_of,
    findings_of,
    has_figure,
    rows_of,
    strategies_of,
    uncached_point,
)
from hemiola_search.errors import SearchError
from hemiola_search.plots import SHEETS, marker_outline, pareto_plot, path_plot
from hemiola_search.problem import Candidate
from hemiola_search.record import Point, SearchRecord
from hemiola_search.score import NOTES, in_words, note_id, score

DIFFERENCE_GAIN: Final = 4  # differences are drawn this many times stronger
SMALL_SIDE: Final = 96  # of pictures, in pixels; smaller ones are enlarged without smoothing

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ReportInput:
    """All that a report shows.

    Attributes:
        record: of the search.
        manifest: of the bundle.
        schedules: of the bundle; one of them is what the search chose.
        measured: by schedule.
        batch_size: of the measurement.
        machine: where it was made.
        pictures: PNG of a row of images, by schedule; the uncached ones under `full`.
        differences: PNG of a row of differences from the uncached images, by schedule.
        prompts: of the images, from left to right; none where they are drawn of labels.
    """

    record: SearchRecord
    manifest: Manifest
    schedules: Mapping[str, Schedule]
    measured: Mapping[str, Measurement]
    batch_size: int
    machine: Machine
    pictures: Mapping[str, bytes]
    differences: Mapping[str, bytes]
    prompts: Sequence[str] = ()


def render_report(given: ReportInput) -> str:
    """Write the page.

    Raises:
        SearchError: the record is not of the search that the bundle's schedules come from.
    """
    record, keys = given.record, keys_of(given.schedules)
    name = chosen_schedule(record, given.manifest, given.schedules)
    best, uncached = chosen_point(record), uncached_point(record)
    environment = Environment(
        loader=PackageLoader("hemiola_search"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    backend = given.manifest.backend
    budgets = {budget: rows_of(record, budget) for budget in record.limits}
    page: str = environment.get_template("report.html.j2").render(
        title=f"{record.model}: {record.sampler}, {best.budget}",
        subtitle=f"Schedule by {described(best)}; guidance {record.guidance_scale:g}; searched on {record.num_images} "
        f"images, {record.effort}. Engines: {backend.name} {backend.version}, {given.manifest.precision}",
        headline=_headline(given.measured[name], best, next(iter(budgets.values()))),
        record=record,
        costs=costs_text(record),
        looks={strategy: look_of(strategy) for strategy in ("full", *strategies_of(record), *_failed(record))},
        outlines={s: Markup(marker_outline(s)) for s in ("full", *strategies_of(record), *_failed(record))},
        pareto=[(sheet.name, Markup(pareto_plot(record, sheet))) for sheet in SHEETS],
        paths=[(sheet.name, Markup(path_plot(record, sheet))) for sheet in SHEETS],
        path_legend=_path_legend(next(iter(budgets.values()))),
        budgets=[_budget(record, budget, rows, keys) for budget, rows in budgets.items()],
        uncached=_cells(record, uncached),
        figures={name: FIGURES[name] for name in figures_of(record)},
        has_gflop=record.costs.unit != "GFLOP",
        notes=NOTES,
        letters=[letter for letter in NOTES if any(letter in point.rhythm for point in record.held_out)],
        note_id=note_id,
        gain=DIFFERENCE_GAIN,
        prompts=given.prompts,
        images=_images(given, keys),
        machine=given.machine,
        batch_size=given.batch_size,
        measured=_measured_rows(given, keys),
        promised=f"{uncached.cost / best.cost:.2f}×",
        forwards=_forward_rows(given),
        made_by=_made_by(record, given.manifest),
    )
    return page


def difference_image(images: Pixels, reference: Pixels) -> Pixels:
    """Draw by how much images differ, enlarged around middle grey."""
    difference = images.astype(np.int16) - reference.astype(np.int16)
    return np.asarray(np.clip(128 + DIFFERENCE_GAIN * difference, 0, 255).astype(np.uint8))


def keys_of(schedules: Mapping[str, Schedule]) -> dict[str, str]:
    """Return by what key a record knows each schedule, by name."""
    return {
        name: Candidate(
            "",
            "",
            schedule.scheduler.num_inference_steps,
            schedule.steps,
            schedule.deep_start,
            schedule.selector,
            schedule.mask,
        ).key
        for name, schedule in schedules.items()
    }


def chosen_schedule(record: SearchRecord, manifest: Manifest, schedules: Mapping[str, Schedule]) -> str:
    """Return the name of the schedule that a search chose, among those of a bundle.

    Raises:
        SearchError: the record is not of the search that the bundle's schedules come from.
    """
    model = manifest.pipeline.model.name
    named = [name for name, key in keys_of(schedules).items() if key == record.chosen]
    if record.model != model or not named:
        raise SearchError(
            f"the record is of a search for {record.model} that chose {described(chosen_point(record))}, but the "
            f"bundle is of {model} and runs {', '.join(schedules)}, none of which is that schedule. Give the "
            "search.json beside the schedule that was exported"
        )
    return named[0]


def _headline(chosen: Measurement, best: Point, rows: Sequence[Row]) -> list[dict[str, str]]:
    row = next(row for row in rows if row.point == best)
    figures = [
        {"value": f"{chosen.speedup:.2f}×", "name": "faster than uncached, measured end to end", "range": ""},
        _headline_figure(best, ERROR, "relative L2 error of the latents", significant),
        _headline_figure(best, "psnr", "PSNR against uncached, dB", FIGURES["psnr"].write),
    ]
    if row.of_uniform is not None and row.verdict is not Verdict.SAME:
        said = "of the uniform period’s error at this cost"
        figures.insert(2, {"value": f"{row.of_uniform:.2f}×", "name": said, "range": ""})
    if "agreement" in best.quality:
        figures.append(_headline_figure(best, "agreement", "as asked, by the judge", FIGURES["agreement"].write))
    return figures


def _headline_figure(point: Point, name: str, said: str, write: Any) -> dict[str, str]:
    return {"value": write(point.quality[name]), "name": said, "range": _range(point, name, write)}


def _range(point: Point, name: str, write: Any) -> str:
    """Write an interval, nothing where there is none."""
    if name not in point.intervals:
        return ""
    low, high = map(write, point.intervals[name])
    return f"{low.removesuffix('%')}–{high}"


def _failed(record: SearchRecord) -> list[str]:
    names = dict.fromkeys(name for failures in record.failures.values() for name in failures)
    return [name for name in names if name not in strategies_of(record)]


def _budget(record: SearchRecord, budget: str, rows: Sequence[Row], keys: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": budget,
        "heading": budget_text(record, budget),
        "findings": findings_of(record, budget),
        "rows": [_row(record, row, keys) for row in rows],
        "failures": record.failures.get(budget, {}),
    }


def _row(record: SearchRecord, row: Row, keys: Mapping[str, str]) -> dict[str, Any]:
    point = row.point
    return {
        **_cells(record, point),
        "speedup": f"{row.speedup:.2f}×",
        "searched": "–" if row.searched is None else significant(row.searched.quality[ERROR]),
        "of_procache": "–" if row.of_procache is None else f"{row.of_procache:.2f}×",
        "of_uniform": "–" if row.of_uniform is None else f"{row.of_uniform:.2f}×",
        "verdict": "" if row.verdict is None else row.verdict.value,
        "is_worse": row.verdict is Verdict.WORSE,
        "is_chosen": row.is_chosen,
        "same_as": ", ".join(look_of(strategy).name for strategy in row.same_as),
        "in_bundle": [name for name, key in keys.items() if key == point.key],
        "words": in_words(point.rhythm),
        "rhythm": point.rhythm,
        "bars": score(point.rhythm),
    }


def _cells(record: SearchRecord, point: Point) -> dict[str, Any]:
    """Write out the figures of a point."""
    is_uncached = point.strategy == UNCACHED
    figures = []
    for name in figures_of(record):
        is_told, write = has_figure(point, name), FIGURES[name].write
        value = write(point.quality[name]) if is_told else "–"
        interval = "" if is_uncached or not is_told else _range(point, name, write)
        figures.append({"value": value, "interval": interval})
    return {
        "strategy": point.strategy,
        "name": point.name,
        "num_full": point.num_full,
        "num_steps": len(point.rhythm),
        "cost": amount(point.cost),
        "error": significant(point.quality[ERROR]),
        "interval": "" if is_uncached else _range(point, ERROR, significant),
        "figures": figures,
        "gflop": amount(1000 * point.tera_flops),
    }


def _path_legend(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {
            "strategy": row.point.strategy,
            "error": significant(row.error),
            "is_chosen": row.is_chosen,
            "has_path": bool(row.point.path),
        }
        for row in rows
    ]


def _images(given: ReportInput, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    points = {point.key: point for point in reversed(given.record.held_out)}
    rows = []
    for name in (UNCACHED, *(name for name in given.schedules if name != UNCACHED)):
        point, pictures = points.get(keys[name]), {"images": given.pictures[name]}
        if name in given.differences:
            pictures["difference"] = given.differences[name]
        _, height = struct.unpack(">II", given.pictures[name][16:24])  # of the PNG's header
        rows.append(
            {
                "name": look_of(name).name,
                "summary": "" if name == UNCACHED else in_words(given.schedules[name].rhythm),
                "error": "" if point is None or name == UNCACHED else significant(point.quality[ERROR]),
                "is_chosen": keys[name] == given.record.chosen,
                "is_small": height <= SMALL_SIDE,
                "pictures": {kind: base64.b64encode(png).decode() for kind, png in pictures.items()},
            }
        )
    return rows


def _measured_rows(given: ReportInput, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    costs = {point.key: point.cost for point in given.record.held_out}
    uncached, unit = uncached_point(given.record).cost, given.record.costs.unit
    return [
        {
            "name": look_of(name).name,
            "is_chosen": keys[name] == given.record.chosen,
            "per_image": f"{row.wall.median_ms / given.batch_size:.1f}",
            "median": f"{row.wall.median_ms:.1f}",
            "p10": f"{row.wall.p10_ms:.1f}",
            "p90": f"{row.wall.p90_ms:.1f}",
            "speedup": f"{row.speedup:.2f}×",
            "cost": f"{amount(costs[keys[name]])} {unit}" if keys[name] in costs else "–",
            "promised": f"{uncached / costs[keys[name]]:.2f}×" if keys[name] in costs else "–",
            "overhead": f"{row.overhead:.1%}",
        }
        for name, row in given.measured.items()
    ]


def _forward_rows(given: ReportInput) -> list[dict[str, str]]:
    """List every kind of step with the engines that make it up, and what runs beside the steps."""
    spreads = {
        engine: spread for row in reversed(list(given.measured.values())) for engine, spread in row.engines.items()
    }
    chains = {kind: chain for kind, chain in given.manifest.forwards.items() if set(chain) <= set(spreads)}
    in_steps = {engine for chain in given.manifest.forwards.values() for engine in chain}
    chains |= {engine: (engine,) for engine in spreads if engine not in in_steps}
    full = sum(spreads[engine].median_ms for engine in chains.get(Forward.FULL.value, ()))
    rows = []
    for kind, chain in sorted(chains.items(), key=lambda item: -sum(spreads[e].median_ms for e in item[1])):
        median, p10, p90 = (
            sum(getattr(spreads[engine], name) for engine in chain) for name in ("median_ms", "p10_ms", "p90_ms")
        )
        rows.append(
            {
                "name": kind,
                "engines": " + ".join(chain),
                "median": f"{median:.3f}",
                "p10": f"{p10:.3f}",
                "p90": f"{p90:.3f}",
                "share": f"{median / full:.1%}" if full else "–",
            }
        )
    return rows


def _made_by(record: SearchRecord, manifest: Manifest) -> str:
    versions = {**record.made_by.versions, **manifest.made_by.versions}
    revision = f", revision {record.made_by.git_revision}" if record.made_by.git_revision else ""
    return (
        f"{record.made_by.command} — " + ", ".join(f"{name} {version}" for name, version in versions.items()) + revision
    )
