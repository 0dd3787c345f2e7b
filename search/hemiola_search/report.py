"""The report: one self-contained HTML page from a bundle, a measurement of it and the record of the search."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from hemiola_runtime.bench import Machine, Measurement
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import CONDITIONING, VAE_DECODER
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.schedule import Forward, Schedule
from hemiola_search.errors import SearchError
from hemiola_search.plots import NAMES, ParetoPoint, pareto_plot
from hemiola_search.record import Point, SearchRecord

DIFFERENCE_GAIN: Final = 4  # differences are drawn this many times stronger

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ReportInput:
    """All that a report shows.

    Attributes:
        record: of the search.
        manifest: of the bundle.
        schedules: of the bundle; the first is the one that was found.
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


class LatencyModel:
    """Milliseconds per image of any schedule: the sum of its forwards, as they were measured."""

    def __init__(self, measured: Mapping[str, Measurement], batch_size: int, num_steps: int) -> None:
        self._batch_size = batch_size
        self._num_steps = num_steps
        samples: dict[str, list[float]] = {}
        for row in measured.values():
            for engine, spread in row.engines.items():
                samples.setdefault(engine, []).append(spread.median_ms)
        full = measured[UNCACHED].engines
        self._engines = {engine: min(values) for engine, values in samples.items()} | {
            engine: spread.median_ms for engine, spread in full.items()
        }

    def latency(self, rhythm: str) -> float | None:
        """Return milliseconds per image; None where one of the forwards was not measured."""
        symbols = {forward.symbol: forward.value for forward in Forward}
        total = self._engines[CONDITIONING] * len(rhythm) / self._num_steps + self._engines.get(VAE_DECODER, 0.0)
        for symbol, count in Counter(rhythm).items():
            if symbols[symbol] not in self._engines:
                return None
            total += count * self._engines[symbols[symbol]]
        return total / self._batch_size


def render_report(given: ReportInput) -> str:
    """Write the page."""
    record, measured = given.record, given.measured
    chosen_name = next(iter(given.schedules))
    chosen = measured[chosen_name]
    latency = LatencyModel(measured, given.batch_size, len(given.schedules[UNCACHED].steps))
    held_out = [point for point in record.points if point.images == "held_out"]
    _check_record(record, given)
    best = next((point for point in held_out if point.rhythm == chosen.rhythm), held_out[0])
    environment = Environment(
        loader=PackageLoader("hemiola_search"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    backend = given.manifest.backend
    page: str = environment.get_template("report.html.j2").render(
        title=f"{record.model}: {record.sampler} with {NAMES.get(best.strategy, best.strategy)}",
        subtitle=f"{backend.name} {backend.version}, {given.manifest.precision}, guidance {record.guidance_scale:g}",
        headline=_headline(chosen, best),
        rhythms=[
            {"name": NAMES.get(name, name), "summary": schedule.summary, "letters": schedule.rhythm}
            for name, schedule in given.schedules.items()
        ],
        image_note="Drawn by the engines of the bundle from the same noise. Differences from the uncached images are "
        f"{DIFFERENCE_GAIN} times enlarged around grey."
        + (f" From left to right: {'; '.join(given.prompts)}." if given.prompts else ""),
        image_rows=_image_rows(given),
        pareto=pareto_plot(_pareto_points(record.points, latency, chosen.rhythm)),
        pareto_note=f"Errors against the uncached run in PyTorch, means over {record.num_held_out} images that were "
        f"not searched on (pale: all candidates, on the {record.num_images} images of the search). "
        f"Latencies are sums of forwards as measured below, at batch {given.batch_size}.",
        has_judge=any("agreement" in point.quality for point in held_out),
        rows=_rows(held_out, latency, chosen.rhythm),
        table_note=_table_note(record, held_out),
        machine_note=f"{given.machine.processor}, {given.machine.num_cores} cores, Python {given.machine.python}; "
        f"batch {given.batch_size}; requests of all schedules in turn, speed-up is the median of ratios of neighbours.",
        measured=_measured_rows(measured),
        engines=_engine_rows(measured),
        made_by=_made_by(record, given.manifest),
    )
    return page


def _check_record(record: SearchRecord, given: ReportInput) -> None:
    """Make sure that a record is of the search that the bundle's schedules come from."""
    model, rhythms = given.manifest.pipeline.model.name, [schedule.rhythm for schedule in given.schedules.values()]
    if record.model != model or record.chosen not in rhythms:
        raise SearchError(
            f"the record is of a search for {record.model} that chose {record.chosen}, but the bundle is of {model} "
            "and runs no such schedule. Give the search.json beside the schedule that was exported"
        )
    if not any(point.images == "held_out" and point.strategy == UNCACHED for point in record.points):
        raise SearchError("the record holds no uncached run to compare with; `hemiola search` writes valid records")


def difference_image(images: Pixels, reference: Pixels) -> Pixels:
    """Draw by how much images differ, enlarged around middle grey."""
    difference = images.astype(np.int16) - reference.astype(np.int16)
    return np.asarray(np.clip(128 + DIFFERENCE_GAIN * difference, 0, 255).astype(np.uint8))


def _headline(chosen: Measurement, best: Point) -> list[dict[str, str]]:
    figures = [
        {"value": f"{chosen.speedup:.2f}×", "name": "faster than uncached, end to end"},
        {"value": f"{best.quality['relative_l2']:.2%}", "name": "relative L2 error of the latents"},
        {"value": f"{best.quality['psnr']:.1f} dB", "name": "PSNR against uncached"},
    ]
    if "agreement" in best.quality:
        figures.append({"value": f"{best.quality['agreement']:.1%}", "name": "as asked, by the judge"})
    return figures


def _image_rows(given: ReportInput) -> list[dict[str, str]]:
    rows = []
    for name in (UNCACHED, *(name for name in given.schedules if name != UNCACHED)):
        rows.append((NAMES.get(name, name), given.pictures[name]))
        if name in given.differences:
            rows.append(("difference", given.differences[name]))
    return [{"name": name, "png": base64.b64encode(png).decode()} for name, png in rows]


def _pareto_points(points: Sequence[Point], latency: LatencyModel, chosen: str) -> list[ParetoPoint]:
    drawn = []
    for point in points:
        milliseconds = latency.latency(point.rhythm)
        if milliseconds is not None and point.strategy != UNCACHED:
            is_minor = point.images == "searched"
            is_chosen = point.rhythm == chosen and not is_minor
            drawn.append(ParetoPoint(point.strategy, milliseconds, point.quality["relative_l2"], is_chosen, is_minor))
    return drawn


def _rows(points: Sequence[Point], latency: LatencyModel, chosen: str) -> list[dict[str, Any]]:
    uncached = latency.latency(next(point.rhythm for point in points if point.strategy == UNCACHED))
    assert uncached is not None
    rows = []
    for point in points:
        milliseconds, quality = latency.latency(point.rhythm), point.quality
        rows.append(
            {
                "name": f"{NAMES.get(point.strategy, point.strategy)} {point.name}".replace(
                    "uncached uncached", "uncached"
                ),
                "is_chosen": point.rhythm == chosen,
                "num_full": point.rhythm.count("F"),
                "latency": "–" if milliseconds is None else f"{milliseconds:.1f}",
                "speedup": "–" if milliseconds is None else f"{uncached / milliseconds:.2f}×",
                "relative_l2": f"{quality['relative_l2']:.4f}",
                "psnr": "–" if point.strategy == UNCACHED else f"{quality['psnr']:.1f}",
                "ssim": f"{quality['ssim']:.4f}",
                "agreement": f"{quality['agreement']:.1%}" if "agreement" in quality else "–",
                "frechet": f"{quality['frechet']:.4g}" if "frechet" in quality else "–",
                "gflops": f"{1000 * point.tera_flops:.1f}",
            }
        )
    return rows


def _table_note(record: SearchRecord, points: Sequence[Point]) -> str:
    note = f"{record.num_held_out} held-out images. GFLOP per image by the FLOPs model."
    if any("frechet" in point.quality for point in points):
        note += (
            " Fréchet is the distance to the real images in the feature space of the model's own judge; it is not FID, "
            "and on so few images it only compares rows of this table."
        )
    return note


def _measured_rows(measured: Mapping[str, Measurement]) -> list[dict[str, str]]:
    return [
        {
            "name": NAMES.get(name, name),
            "median": f"{row.wall.median_ms:.1f}",
            "p10": f"{row.wall.p10_ms:.1f}",
            "p90": f"{row.wall.p90_ms:.1f}",
            "speedup": f"{row.speedup:.2f}×",
            "overhead": f"{row.overhead:.1%}",
        }
        for name, row in measured.items()
    ]


def _engine_rows(measured: Mapping[str, Measurement]) -> list[dict[str, str]]:
    full_ms = measured[UNCACHED].engines["full"].median_ms
    spreads = {engine: spread for row in reversed(list(measured.values())) for engine, spread in row.engines.items()}
    return [
        {
            "name": engine,
            "median": f"{spread.median_ms:.3f}",
            "p10": f"{spread.p10_ms:.3f}",
            "p90": f"{spread.p90_ms:.3f}",
            "share": f"{spread.median_ms / full_ms:.1%}",
        }
        for engine, spread in sorted(spreads.items(), key=lambda item: -item[1].median_ms)
    ]


def _made_by(record: SearchRecord, manifest: Manifest) -> str:
    versions = {**record.made_by.versions, **manifest.made_by.versions}
    revision = f", revision {record.made_by.git_revision}" if record.made_by.git_revision else ""
    return (
        f"{record.made_by.command} — " + ", ".join(f"{name} {version}" for name, version in versions.items()) + revision
    )
