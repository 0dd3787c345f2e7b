"""A record of a search as Markdown: its held-out figures as one table for each budget."""

from __future__ import annotations

from collections.abc import Iterable

from hemiola_search.appearance import FIGURES, amount, look_of, significant
from hemiola_search.comparison import (
    ERROR,
    Row,
    budget_text,
    chosen_point,
    costs_text,
    described,
    error_text,
    figures_of,
    has_figure,
    rows_of,
    uncached_point,
)
from hemiola_search.record import Point, SearchRecord


def record_lines(record: SearchRecord) -> list[str]:
    """Describe a record in lines."""
    chosen, tried = chosen_point(record), [point for point in record.points if point.images == "searched"]
    lines = [
        f"search of {record.model}, {record.sampler}, guidance {record.guidance_scale:g}: {chosen.rhythm}",
        f"{described(chosen)} was chosen; {len(tried)} schedules were tried on {record.num_images} images "
        f"({record.effort}), the best of each strategy drawn again on {record.num_held_out} held-out images",
        costs_text(record),
    ]
    for budget in record.limits:
        rows = rows_of(record, budget)
        lines += ["", budget_text(record, budget), "", *_table(record, rows)]
        if failures := record.failures.get(budget):
            lines += ["", *(f"{look_of(name).name} found nothing: {reason}" for name, reason in failures.items())]
        lines += ["", *_searched([point for point in tried if point.budget == budget])]
    return lines


def _table(record: SearchRecord, rows: Iterable[Row]) -> list[str]:
    figures = [name for name in figures_of(record) if name != "ssim"]  # beside PSNR it tells little more
    heads = ["strategy", "schedule", "full steps", record.costs.unit, "speed-up", "relative L2 (95 %)"]
    heads += [FIGURES[name].name for name in figures]
    uncached = uncached_point(record)
    lines = [_line(heads), _line(["---"] * 2 + ["---:"] * (len(heads) - 2))]
    lines.append(_line(["uncached", "", *_costs(uncached, 1.0), "0", *_figures(uncached, figures)]))
    for row in rows:
        cells = [look_of(row.point.strategy).name, row.point.name, *_costs(row.point, row.speedup)]
        cells += [error_text(row.point), *_figures(row.point, figures)]
        lines.append(_line([f"**{cell}**" if row.is_chosen and cell else cell for cell in cells]))
    return lines


def _costs(point: Point, speedup: float) -> list[str]:
    return [str(point.num_full), amount(point.cost), f"{speedup:.2f}×"]


def _figures(point: Point, names: Iterable[str]) -> list[str]:
    return [
        f"{FIGURES[name].write(point.quality[name])} {FIGURES[name].unit}".rstrip() if has_figure(point, name) else ""
        for name in names
    ]


def _searched(tried: Iterable[Point]) -> list[str]:
    """Sum up what each strategy tried on the images of the search."""
    errors: dict[str, list[float]] = {}
    for point in tried:
        errors.setdefault(point.strategy, []).append(point.quality[ERROR])
    return [
        f"searched: {look_of(name).name}, {len(found)} tried, relative L2 "
        + " to ".join(dict.fromkeys(map(significant, (min(found), max(found)))))
        for name, found in errors.items()
    ]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
