"""The plots of a report, as SVG text: every figure twice, for a laptop and for a phone, at the size of its text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import count, cycle
from typing import Any, Final

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation, Transform

from hemiola_search.appearance import amount, look_of
from hemiola_search.comparison import (
    ERROR,
    chosen_point,
    described,
    error_text,
    first_budget,
    pareto_front,
    rows_of,
    strategies_of,
    uncached_point,
)
from hemiola_search.record import Point, SearchRecord

INK: Final = "#1c1917"
SOFT: Final = "#78716c"
FRONT: Final = "#918a84"
FLOOR: Final = 1e-7  # errors below are rounding, and no place on a logarithmic axis
SPEEDUPS: Final = (1, 1.1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)  # ticks to choose from
COMMANDS: Final = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}


@dataclass(frozen=True, slots=True)
class Sheet:
    """The size of a figure, one unit a pixel of the page.

    Attributes:
        name: tells the ids of its parts from those of other figures on the page.
        width: in pixels.
        height: likewise.
        font_size: likewise.
        marker_size: of points that count.
    """

    name: str
    width: int
    height: int
    font_size: float
    marker_size: float


WIDE: Final = Sheet("wide", 980, 500, 12, 10)
NARROW: Final = Sheet("narrow", 358, 430, 10.5, 8)
SHEETS: Final = (WIDE, NARROW)


def pareto_plot(record: SearchRecord, sheet: Sheet) -> str:
    """Draw errors against costs: held-out figures with intervals, their front, the budgets, and all that was tried."""
    uncached, chosen = uncached_point(record).cost, chosen_point(record)
    points = [point for point in record.held_out if point.strategy in strategies_of(record) and _is_drawn(point)]
    tips: dict[str, str] = {}
    with _figure(sheet) as (figure, axes):
        _draw_candidates(axes, record, sheet)
        for strategy in strategies_of(record):
            mine = sorted((point for point in points if point.strategy == strategy), key=lambda point: point.cost)
            axes.plot(*_places(mine), color=look_of(strategy).colour, linewidth=0.8, alpha=0.45, zorder=2)
        axes.step(*_places(pareto_front(points)), color=FRONT, linewidth=2.2, where="post", zorder=1.5, gid="front")
        _scale_costs(axes, record, [point.cost for point in points], uncached, sheet)
        for i, (point, shift) in enumerate(_beside_one_another(points, axes.get_xlim())):
            aside = ScaledTranslation(shift * 1.25 * sheet.marker_size / 72, 0, figure.dpi_scale_trans)
            _draw_point(axes, point, sheet, str(i), axes.transData + aside, is_chosen=point is chosen)
            tips[f"point-{i}"] = f"{described(point)}: {error_text(point)} at {amount(point.cost)} {record.costs.unit}"
        kind = "measured" if record.costs.unit == "ms" else "by the FLOPs model"
        axes.set_xlabel(f"cost, {record.costs.unit} per image, {kind}")
        axes.set_ylabel("relative L2 error of the final latents")
        return _as_svg(figure, f"pareto-{sheet.name}", tips)


def path_plot(record: SearchRecord, sheet: Sheet) -> str:
    """Draw how the error of every strategy's best grows step by step; full steps of the chosen schedule are ticked."""
    chosen = chosen_point(record)
    tips: dict[str, str] = {}
    with _figure(sheet) as (figure, axes):
        rows = [row for row in rows_of(record, first_budget(record)) if _is_drawn(row.point)]
        drawn = [row for row in rows if row.point.path]
        last = max((len(row.point.path) for row in drawn), default=1) - 1
        for i, row in enumerate(reversed(drawn)):  # the best on top
            point, look = row.point, look_of(row.point.strategy)
            gid = f"path-{point.strategy}"
            tips[gid] = f"{described(point)}: {error_text(point)} behind the last step"
            axes.plot(
                range(len(point.path)),
                [error if error > FLOOR else float("nan") for error in point.path],
                linestyle="--" if look.is_baseline else "-",
                color=look.colour,
                linewidth=3 if row.is_chosen else 1.4,
                marker=look.marker,
                markersize=(0.95 if row.is_chosen else 0.75) * sheet.marker_size,
                markeredgecolor="white",
                markeredgewidth=0.4,
                markevery=(i % 5, max(1, len(point.path) // 6)),
                zorder=5 if row.is_chosen else 3,
                gid=gid,
            )
        for row in rows:
            if not row.point.path:  # other steps than the uncached run's: only their last samples compare
                look, gid = look_of(row.point.strategy), f"end-{row.point.strategy}"
                tips[gid] = f"{described(row.point)}: {error_text(row.point)} at its end"
                marker: dict[str, Any] = {
                    "marker": look.marker,
                    "markersize": sheet.marker_size,
                    "color": look.colour,
                    "clip_on": False,
                }
                axes.plot(last, row.error, zorder=4, gid=gid, **marker)
        axes.set_xlim(-0.5, max(last, 1) + 0.5)
        _scale_errors(axes)
        axes.set_xlabel("step")
        if chosen.path:
            full_steps = [step for step, letter in enumerate(chosen.rhythm) if letter == "F"]
            line: dict[str, Any] = {"color": look_of(chosen.strategy).colour, "linewidth": 1.4, "gid": "full-steps"}
            axes.vlines(full_steps, 0, 0.035, transform=axes.get_xaxis_transform(), **line)
            axes.set_xlabel("step; ticks: full steps of the chosen schedule")
        axes.set_ylabel("relative L2 error of the sample")
        return _as_svg(figure, f"path-{sheet.name}", tips)


def marker_outline(strategy: str) -> str:
    """Return the marker of a strategy as the `d` of an SVG path, about 2 units wide around the origin."""
    style = MarkerStyle(look_of(strategy).marker)
    outline = style.get_path().transformed(style.get_transform())
    largest = np.abs(np.asarray(outline.vertices)).max()
    parts = []  # signs turn matplotlib's upward y into SVG's downward one
    for vertices, code in outline.iter_segments(simplify=False, curves=True):
        if code == Outline.CLOSEPOLY:
            parts.append("Z")
        else:
            numbers = " ".join(
                f"{sign * value / largest:.3g}" for value, sign in zip(vertices, cycle((1, -1)), strict=False)
            )
            parts.append(COMMANDS[code] + numbers)
    return "".join(parts)


@contextmanager
def _figure(sheet: Sheet) -> Iterator[tuple[Figure, Axes]]:
    settings: dict[Any, Any] = {"font.family": "sans-serif", "font.size": sheet.font_size, "svg.fonttype": "none"}
    settings |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT)
    settings |= dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK)
    with plt.rc_context({**settings, "svg.hashsalt": "hemiola"}):
        figure, axes = plt.subplots(figsize=(sheet.width / 72, sheet.height / 72), layout="constrained")
        axes.grid(visible=True, which="major", color="#e7e5e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.cost for point in points], [point.quality[ERROR] for point in points]


def _draw_candidates(axes: Axes, record: SearchRecord, sheet: Sheet) -> None:
    look: dict[str, Any] = {"alpha": 0.35, "markeredgewidth": 0, "markersize": 0.5 * sheet.marker_size, "zorder": 1.2}
    for strategy in strategies_of(record):
        tried = [p for p in record.points if p.images == "searched" and p.strategy == strategy and _is_drawn(p)]
        axes.plot(*_places(tried), "o", color=look_of(strategy).colour, gid=f"tried-{strategy}", **look)


def _draw_point(axes: Axes, point: Point, sheet: Sheet, number: str, transform: Transform, *, is_chosen: bool) -> None:
    """Draw the figures of one schedule with their interval, ringed if it is the one that was found."""
    look, (costs, errors) = look_of(point.strategy), _places([point])
    if ERROR in point.intervals:
        bounds = [max(bound, FLOOR) for bound in point.intervals[ERROR]]
        line: dict[str, Any] = {"color": look.colour, "linewidth": 1.4, "transform": transform, "zorder": 3}
        axes.plot(costs * 2, bounds, gid=f"interval-{number}", **line)
    size = sheet.marker_size * (1.35 if look.marker == "*" else 1)
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8, "transform": transform, "zorder": 4}
    axes.plot(costs, errors, look.marker, color=look.colour, markersize=size, gid=f"point-{number}", **edge)
    if is_chosen:
        edge |= {"markeredgecolor": INK, "markeredgewidth": 1.6, "markerfacecolor": "none", "zorder": 6}
        axes.plot(costs, errors, "o", markersize=2.1 * sheet.marker_size, gid="chosen", **edge)


def _beside_one_another(points: Sequence[Point], limits: tuple[float, float]) -> list[tuple[Point, int]]:
    """Return by how many markers each point is drawn to the left, so that none hides one of like cost and error."""
    near = 0.012 * (limits[1] - limits[0])
    placed: list[tuple[Point, int]] = []
    for point in sorted(points, key=lambda point: point.quality[ERROR]):
        low = point.intervals.get(ERROR, (point.quality[ERROR],))[0]
        taken = {
            shift
            for other, shift in placed
            if abs(other.cost - point.cost) < near
            and max(other.quality[ERROR] * 1.06, other.intervals.get(ERROR, (0.0, 0.0))[1]) > 0.97 * low
        }
        placed.append((point, next(shift for shift in count(0, -1) if shift not in taken)))
    return placed


def _scale_costs(axes: Axes, record: SearchRecord, costs: Sequence[float], uncached: float, sheet: Sheet) -> None:
    """Set both scales: costs with the budgets' limits below, speed-ups above."""
    limits = record.limits
    least, most = min([*costs, *limits.values()]), max([*costs, *limits.values()])
    margin = 0.08 * max(most - least, 0.3 * most)
    left, right = max(least - margin, 0.02 * uncached), most + margin
    axes.set_xlim(left, right)
    _scale_errors(axes)
    top = axes.get_xaxis_transform()
    for budget, limit in limits.items():
        axes.axvline(limit, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1, gid="limit")
        text = f"limit of {budget}".replace("$", r"\$")
        small: dict[str, Any] = {
            "fontsize": 0.9 * sheet.font_size,
            "color": SOFT,
        }  # behind the limit, where no schedule can lie
        axes.annotate(text, (limit, 0.985), (4, 0), top, "offset points", rotation=90, ha="left", va="top", **small)
    if uncached <= right:
        axes.axvline(uncached, color=INK, linewidth=1, linestyle=":", gid="uncached")
    arrow = " →" if uncached > right else ""
    note = f"uncached: {amount(uncached)} {record.costs.unit}{arrow}"
    axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", va="bottom", backgroundcolor="white")

    def speedup(cost: Any) -> Any:
        return uncached / np.maximum(cost, FLOOR * uncached)

    above = axes.secondary_xaxis("top", functions=(speedup, speedup))
    inside = [tick for tick in SPEEDUPS if left <= uncached / tick <= right]
    while len(inside) > sheet.width / 60:
        inside = inside[::2]
    above.set_xticks(inside)
    above.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    above.xaxis.set_minor_formatter(NullFormatter())
    above.spines["top"].set_visible(False)
    above.set_xlabel("speed-up against uncached")


def _scale_errors(axes: Axes) -> None:
    """Make the errors logarithmic, labelled at 1, 2 and 5 where they span little, at powers of ten where much."""
    if not np.isfinite(axes.dataLim.minposy):  # nothing has an error
        axes.set_ylim(1e-3, 1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    is_short = high / max(low, FLOOR) < 1e3
    subs = (1.0, 2.0, 5.0) if is_short else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _is_drawn(point: Point) -> bool:
    return point.quality[ERROR] > FLOOR


def _as_svg(figure: Figure, name: str, tips: dict[str, str]) -> str:
    """Write a figure out; ids begin with its name, and parts with a tip show it under the mouse."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r'(<svg .*?)width="[^"]*" height="[^"]*" ', r"\1", text[text.index("<svg") :], count=1)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # would rule the page
    for gid, tip in tips.items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(tip)}</title>')
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
