"""Optimization profiles: the sizes that engines are tuned for, from what the schedules of an export ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Final

from hemiola_runtime.graphs import VAE_DECODER, GraphSpec
from hemiola_runtime.manifest import Profile
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.schedule import Schedule

MAX_TOKEN_BUCKETS: Final = 4  # a profile adds up to a fifth to the build time of an engine, and to its tuning data

Range = tuple[int, int, int]  # smallest, likeliest, largest


def profiles_of(
    graph: GraphSpec, pipeline: Pipeline, schedules: Iterable[Schedule], max_batch_size: int
) -> tuple[Profile, ...]:
    """Choose the profiles of one engine.

    One image alone has a profile of its own, since that is where latency is felt; more images share one that is tuned
    for the largest batch. Every token count of the schedules has its own as long as they are few. Where pictures differ
    in size, every profile takes all sizes and is tuned for the default one.
    """
    sides = {side for spec in graph.inputs for side in spec.shape}
    every = list(schedules)
    sizes: tuple[tuple[int, int], ...] = (pipeline.min_size, pipeline.size, pipeline.max_size)
    if graph.name == VAE_DECODER:
        sizes = tuple(pipeline.tile_of(size) for size in sizes)
    choices: dict[str, list[Range]] = {}
    if sides & {"B", "R"}:
        choices["B"] = [(1, 1, 1)] if max_batch_size == 1 else [(1, 1, 1), (2, max_batch_size, max_batch_size)]
    if "T" in sides:
        lengths = [len(schedule.steps) for schedule in every]
        choices["T"] = [(min(lengths), max(lengths), max(lengths))]
    grids = [pipeline.grid_of(size) for size in sizes]
    of_size = {
        "N": [rows * columns for rows, columns in grids],
        "rows": [rows for rows, _ in grids],
        "columns": [columns for _, columns in grids],
    }
    choices |= {name: [(least, likely, most)] for name, (least, likely, most) in of_size.items() if name in sides}
    combined = [dict(zip(choices, combination, strict=True)) for combination in product(*choices.values())]
    steps = dict.fromkeys(step for schedule in every for step in schedule.steps if step.kind == graph.name)
    buckets: list[dict[str, Range]] = [{}]
    if "K" in sides:
        counts = [[pipeline.selected_tokens(step, size) for step in steps] for size in sizes]
        buckets = token_buckets(counts[1]) if pipeline.has_one_size else [_range_of_sizes(counts)]
    return tuple(Profile(by_symbol | bucket) for by_symbol in combined for bucket in buckets)


def token_buckets(counts: Iterable[Mapping[str, int]]) -> list[dict[str, Range]]:
    """Cut the token counts of steps, by symbol, into a few groups of neighbours; each is tuned for its largest.

    Returns:
        At most MAX_TOKEN_BUCKETS ranges, by symbol, that hold the counts of every step.
    """
    distinct = {tuple(by_symbol.values()): by_symbol for by_symbol in counts}
    ordered = sorted(distinct.values(), key=lambda by_symbol: sum(by_symbol.values()))
    size = -(-len(ordered) // MAX_TOKEN_BUCKETS)
    return [_range(ordered[i : i + size]) for i in range(0, len(ordered), size)] if ordered else []


def _range(counts: Sequence[Mapping[str, int]]) -> dict[str, Range]:
    """Return the range that holds the counts of some steps, by symbol, tuned for the largest."""
    values = {symbol: [by_symbol[symbol] for by_symbol in counts] for symbol in counts[0]}
    return {symbol: (min(of_steps), max(of_steps), max(of_steps)) for symbol, of_steps in values.items()}


def _range_of_sizes(counts: Sequence[Sequence[Mapping[str, int]]]) -> dict[str, Range]:
    """Return the range that holds the counts of the smallest, the default and the largest size, tuned for the default.

    Every size has counts of its own.
    """
    least, likely, most = map(_range, counts)
    return {symbol: (least[symbol][0], likely[symbol][2], most[symbol][2]) for symbol in likely}
