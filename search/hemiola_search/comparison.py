"""What a record says: strategies side by side at each budget, and which ideas paid on this model. Pure functions.

Two errors are told apart where their bootstrap intervals do not overlap. All schedules are judged on the same images,
so that this is stricter than it has to be: what is said to be better is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from hemiola_runtime.graph_set import UNCACHED
from hemiola_search.appearance import FIGURES, LOOKS, amount, interval_text, look_of, significant
from hemiola_search.errors import SearchError
from hemiola_search.record import Point, SearchRecord

ERROR: Final = "relative_l2"
FEWER_STEPS: Final = "fewer_steps"
UNIFORM: Final = "uniform"
PROCACHE: Final = "procache"
FORECASTS: Final = "forecasts"
COMPONENTS: Final = {  # letters of each
    "selective tokens": "S",
    "deep blocks": "D",
    "masks": "M",
    "residuals of the whole model": "R¹²³⁴",
    FORECASTS: "1234¹²³⁴",
}
PLAIN: Final = frozenset("FCR")  # letters of schedules that repeat caches as they are
USUAL: Final = ("selective tokens", "masks", FORECASTS)  # told of even where they were not tried
TOLERANCE: Final = 1e-6  # of costs against limits, both as they were written


class Verdict(Enum):
    """How an error compares with another."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "not told apart"
    SAME = "the same"


@dataclass(frozen=True, slots=True)
class Row:
    """The best schedule of a strategy for a budget, beside what it has to beat.

    Attributes:
        point: its figures on held-out images.
        searched: on the images of the search; None for the uncached run.
        speedup: cost of the uncached run, divided by its own.
        of_procache: its error, divided by that of ProCache's best; None without such.
        of_uniform: likewise, of the uniform period.
        verdict: its error against the uniform period's; None without such, and for itself.
        same_as: strategies before it that found the same schedule.
        is_chosen: whether it is the schedule that was found.
    """

    point: Point
    searched: Point | None
    speedup: float
    of_procache: float | None
    of_uniform: float | None
    verdict: Verdict | None
    same_as: tuple[str, ...]
    is_chosen: bool

    @property
    def error(self) -> float:
        """Relative L2 of the final latents on held-out images."""
        return self.point.quality[ERROR]


@dataclass(frozen=True, slots=True)
class Component:
    """Whether an idea paid at a budget: the best schedule with it against the best without.

    Attributes:
        name: of the idea.
        best_with: the best schedule with it on the images of the search; None if none was tried.
        best_without: the best without; for forecasts, the best that repeats caches as they are.
        plain: the best that repeats caches as they are, on the same images; None where it was not drawn there.
        verdict: None where there is nothing to compare.
    """

    name: str
    best_with: Point | None
    best_without: Point | None
    plain: Point | None
    verdict: Verdict | None


def first_budget(record: SearchRecord) -> str:
    """Return the budget that the chosen schedule was searched for.

    Raises:
        SearchError: the record has none.
    """
    if not record.limits:
        raise SearchError("the record names no budget; `hemiola search` writes valid records")
    return next(iter(record.limits))


def figures_of(record: SearchRecord) -> list[str]:
    """Return which figures were taken beside the error, in the order of tables."""
    return [name for name in FIGURES if any(name in point.quality for point in record.held_out)]


def has_figure(point: Point, name: str) -> bool:
    """Tell whether a figure says something of a schedule: the PSNR of what does not differ is a ceiling."""
    return name in point.quality and not (name == "psnr" and point.quality[ERROR] == 0)


def uncached_point(record: SearchRecord) -> Point:
    """Return the figures of the uncached run.

    Raises:
        SearchError: the record has none.
    """
    for point in record.held_out:
        if point.strategy == UNCACHED:
            return point
    raise SearchError("the record holds no uncached run to compare with; `hemiola search` writes valid records")


def chosen_point(record: SearchRecord) -> Point:
    """Return the held-out figures of the schedule that was found.

    Raises:
        SearchError: the record has none.
    """
    for point in record.held_out:
        if point.key == record.chosen and point.budget == first_budget(record):
            return point
    raise SearchError("the record holds no held-out figures of the schedule that it chose; search again")


def strategies_of(record: SearchRecord) -> list[str]:
    """Return the strategies with held-out figures, in the order in which they are listed everywhere."""
    found = dict.fromkeys(point.strategy for point in record.held_out if point.strategy != UNCACHED)
    order = list(LOOKS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def rows_of(record: SearchRecord, budget: str) -> list[Row]:
    """Return every strategy's best for a budget, the smallest held-out error first."""
    points = [point for point in record.held_out if point.budget == budget]
    searched = {(p.strategy, p.key): p for p in record.points if p.images == "searched" and p.budget == budget}
    by_strategy = {point.strategy: point for point in points}
    uniform, procache = by_strategy.get(UNIFORM), by_strategy.get(PROCACHE)
    is_first, uncached = budget == first_budget(record), uncached_point(record)
    rows = [
        Row(
            point=point,
            searched=searched.get((point.strategy, point.key)),
            speedup=uncached.cost / point.cost,
            of_procache=None if procache is None else _ratio(point, procache),
            of_uniform=None if uniform is None else _ratio(point, uniform),
            verdict=None if uniform is None or point is uniform else verdict_of(point, uniform),
            same_as=tuple(other.strategy for other in points[:i] if other.key == point.key),
            is_chosen=is_first and point.key == record.chosen,
        )
        for i, point in enumerate(points)
    ]
    return sorted(rows, key=lambda row: row.error)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both cost and error, the cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.quality[ERROR])):
        if not front or point.quality[ERROR] < front[-1].quality[ERROR]:
            front.append(point)
    return front


def verdict_of(point: Point, other: Point) -> Verdict:
    """Compare two errors: by intervals where both have them, else by means alone."""
    if point.key == other.key:
        return Verdict.SAME
    if ERROR in point.intervals and ERROR in other.intervals:
        (low, high), (other_low, other_high) = point.intervals[ERROR], other.intervals[ERROR]
        if low <= other_high and other_low <= high:
            return Verdict.UNCLEAR
    return Verdict.BETTER if point.quality[ERROR] < other.quality[ERROR] else Verdict.WORSE


def components_of(record: SearchRecord, budget: str) -> list[Component]:
    """Compare, for every idea, the best schedule with it and the best without, among all that were tried.

    Schedules are chosen by the images of the search. They are compared on held-out images where both were drawn there.
    Fewer steps, which cache nothing, are not among them.
    """
    limit = record.limits[budget] * (1 + TOLERANCE)
    tried = [
        point
        for point in record.points
        if point.images == "searched"
        and point.budget == budget
        and point.strategy not in (UNCACHED, FEWER_STEPS)
        and point.cost <= limit
    ]
    held_out = {point.key: point for point in record.held_out if point.budget == budget}
    repeating = _best(point for point in tried if set(point.rhythm) <= PLAIN)
    components = []
    for name, letters in COMPONENTS.items():
        has_it = [point for point in tried if set(letters) & set(point.rhythm)]
        others = [point for point in tried if _is_without(point, name, letters)]
        if not has_it and name not in USUAL:
            continue
        best_with, best_without, plain, verdict = _best(has_it), _best(others), repeating, None
        if best_with is not None and best_without is not None:
            if best_with.key in held_out and best_without.key in held_out:
                best_with, best_without = held_out[best_with.key], held_out[best_without.key]
                plain = None if plain is None else held_out.get(plain.key)
            verdict = verdict_of(best_with, best_without)
        components.append(Component(name, best_with, best_without, plain, verdict))
    return components


def findings_of(record: SearchRecord, budget: str) -> list[str]:
    """Say in sentences what was best at a budget, what was no better than even spacing, and which ideas paid."""
    rows = rows_of(record, budget)
    found = _standing(record, rows) if rows else []
    worse = [_name(row.point) for row in rows if row.verdict is Verdict.WORSE]
    if worse:
        found.append(f"Worse than a uniform period at this cost: {_listed(worse)}.")
    return found + [_sentence(record, component) for component in components_of(record, budget)]


def described(point: Point) -> str:
    """Name a schedule by its strategy and what tells it from the strategy's others."""
    return _name(point) if point.strategy == UNCACHED else f"{_name(point)} “{point.name}”"


def costs_text(record: SearchRecord) -> str:
    """Say which costs were measured, and which estimated."""
    costs = record.costs
    if costs.unit == "GFLOP":
        return (
            "Costs are GFLOP per image by the FLOPs model: nothing was measured for this search, and forecasts and "
            "sums of caches count nothing."
        )
    text = f"Costs are milliseconds per image, measured: {costs.measured}."
    if not costs.estimated:
        return text
    return f"{text} Not measured, but estimated from the full step by its share of FLOPs: {', '.join(costs.estimated)}."


def budget_text(record: SearchRecord, budget: str) -> str:
    """Write a budget with its limit, as in `Budget of 17 full: at most 11.36 GFLOP per image`."""
    return f"Budget of {budget}: at most {amount(record.limits[budget])} {record.costs.unit} per image"


def error_text(point: Point) -> str:
    """Write an error with its interval, as in `0.0108 (0.00965–0.0121)`."""
    text = significant(point.quality[ERROR])
    return f"{text} ({interval_text(point.intervals[ERROR])})" if ERROR in point.intervals else text


def _standing(record: SearchRecord, rows: Sequence[Row]) -> list[str]:
    best = rows[0]
    by_strategy = {row.point.strategy: row.point for row in rows}
    compared = []
    for strategy in (UNIFORM, FEWER_STEPS):
        if (other := by_strategy.get(strategy)) is not None and other.key != best.point.key:
            is_clear = verdict_of(best.point, other) is not Verdict.UNCLEAR
            doubt = "" if is_clear else ", though their intervals overlap"
            compared.append(f"{_ratio(best.point, other):.2f} times that of {_name(other)}{doubt}")
    error = error_text(best.point)
    text = f"The smallest error on held-out images is that of {described(best.point)}: {error}"
    found = [text + (f", which is {' and '.join(compared)}." if compared else ".")]
    if best.point.strategy == FEWER_STEPS:
        found.append("Caching does not pay at this budget: fewer steps, all of them computed, land closer.")
    chosen = next((row for row in rows if row.is_chosen), None)
    if chosen is not None and chosen.point.key != best.point.key:
        told = verdict_of(chosen.point, best.point)
        rest = (
            "worse than the best, beyond their intervals" if told is Verdict.WORSE else "not told apart from the best"
        )
        found.append(
            f"The schedule that was chosen, {described(chosen.point)}, was the best on the images of the search; on "
            f"held-out images it has {error_text(chosen.point)}, {rest}."
        )
    return found


def _sentence(record: SearchRecord, component: Component) -> str:
    name, best_with, best_without = component.name.capitalize(), component.best_with, component.best_without
    if best_with is None:
        return f"{name}: no schedule with them was tried."
    if best_without is None or component.verdict is None:
        return f"{name}: no schedule without them was tried."
    said = {Verdict.BETTER: "pay", Verdict.WORSE: "do not pay"}.get(component.verdict, "make no clear difference")
    is_held_out = best_with.images == best_without.images == "held_out"
    number, kind = (
        (record.num_held_out, "held-out images") if is_held_out else (record.num_images, "images searched on")
    )
    without = "by repeating caches" if component.name == FORECASTS else "without"
    text = (
        f"{name} {said}: at best {error_text(best_with)} with them ({described(best_with)}), "
        f"{error_text(best_without)} {without} ({described(best_without)}), on the {number} {kind}."
    )
    if component.plain is None or component.plain.key == best_without.key:
        return text
    return f"{text} Repeating caches alone gives {error_text(component.plain)}."


def _is_without(point: Point, name: str, letters: str) -> bool:
    # The letter of a step that refreshes tokens or blocks does not say whether its other features are forecast.
    return set(point.rhythm) <= PLAIN if name == FORECASTS else not set(letters) & set(point.rhythm)


def _best(points: Iterable[Point]) -> Point | None:
    return min(points, key=lambda point: point.quality[ERROR], default=None)


def _ratio(point: Point, other: Point) -> float:
    return point.quality[ERROR] / other.quality[ERROR] if other.quality[ERROR] else float("inf")


def _name(point: Point) -> str:
    return look_of(point.strategy).name


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
