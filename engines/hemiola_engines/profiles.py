"""Optimization profiles: the sizes that engines are tuned for, from what the schedules of an export ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    if "K" in sides:
        steps = {step for schedule in every for step in schedule.steps if step.tokens}
        counts = [{pipeline.selected_tokens(step, size) for step in steps} for size in sizes]
        if pipeline.has_one_size:
            choices["K"] = token_buckets(counts[1])
        else:  # every size has counts of its own
            choices["K"] = [(min(counts[0]), max(counts[1]), max(counts[2]))]
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
    return tuple(Profile(dict(zip(choices, combination, strict=True))) for combination in product(*choices.values()))


def token_buckets(counts: Iterable[int]) -> list[Range]:
    """Cut token counts into at most MAX_TOKEN_BUCKETS ranges that hold them all, each tuned for its largest."""
    ordered = sorted(set(counts))
    size = -(-len(ordered) // MAX_TOKEN_BUCKETS)
    groups: Sequence[list[int]] = [ordered[i : i + size] for i in range(0, len(ordered), size)] if ordered else []
    return [(group[0], group[-1], group[-1]) for group in groups]
