from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_engines.profiles import MAX_TOKEN_BUCKETS, profiles_of, token_buckets
from hemiola_runtime.graphs import GraphSpec, TensorSpec
from hemiola_runtime.manifest import Profile, read_manifest
from hemiola_runtime.pipeline import TextSpec
from hemiola_runtime.program import lower
from hemiola_runtime.schedule import FULL, REUSE, Schedule, read_schedule, tokens
from strategies import Lowerable, Size, examples, lowerables, schedules, sizes_of

GOLDEN: Final = Path(__file__).parent / "golden"
SCHEDULE: Final = read_schedule(GOLDEN / "schedule.json")
BY_BLOCK: Final = read_manifest(GOLDEN).pipeline  # 8 × 8 latents in 16 patches, a count for its one deep block, 3
ONE_SIZE: Final = replace(BY_BLOCK, has_block_counts=False)
SIZES: Final = replace(ONE_SIZE, labels={}, text=TextSpec(5), min_size=(4, 4), max_size=(12, 16), tile_size=10)
B: Final = TensorSpec("state", "float32", (1, "B", 16, 16))
R: Final = TensorSpec("mlp_cache.0", "float32", ("R", 16, 32))
K: Final = TensorSpec("token_slots", "int64", ("K",))
T: Final = TensorSpec("timesteps", "float32", ("T",))
FIXED: Final = TensorSpec("input_scale", "float32", ())
N: Final = TensorSpec("positions", "float32", ("N", 32))
GRID: Final = TensorSpec("latents", "float32", ("B", "rows", "columns", 2, 2, 4))


def graph_of(*inputs: TensorSpec, name: str = "tokens") -> GraphSpec:
    return GraphSpec(name, "graph.onnx", "0" * 64, inputs, (TensorSpec("x", "float32", ("B", "K")),), (), 0)


def schedule_of(num_steps: int, *counts: int) -> Schedule:
    """Make a schedule of so many steps, some of them with these token counts."""
    steps = (FULL, *map(tokens, counts), *[REUSE] * (num_steps - 1 - len(counts)))
    identity = replace(SCHEDULE.scheduler, timesteps=tuple(map(float, range(num_steps))))
    return replace(SCHEDULE, scheduler=identity, steps=steps)


@pytest.mark.parametrize(
    ("counts", "buckets"),
    [
        ([], []),
        ([7], [(7, 7, 7)]),
        ([64, 16, 32], [(16, 16, 16), (32, 32, 32), (64, 64, 64)]),
        ([4, 4, 4, 9], [(4, 4, 4), (9, 9, 9)]),
        ([1, 2, 3, 4], [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4)]),
        ([1, 2, 3, 4, 5], [(1, 2, 2), (3, 4, 4), (5, 5, 5)]),  # two to a bucket
        ([8, 7, 6, 5, 4, 3, 2, 1], [(1, 2, 2), (3, 4, 4), (5, 6, 6), (7, 8, 8)]),
        ([10, 20, 30, 40, 50, 60, 70, 80, 90], [(10, 30, 30), (40, 60, 60), (70, 90, 90)]),  # three
    ],
)
def test_token_counts_are_cut_into_a_few_buckets_tuned_for_their_largest(
    counts: list[int], buckets: list[tuple[int, int, int]]
) -> None:
    assert token_buckets([{"K": count} for count in counts]) == [{"K": bucket} for bucket in buckets]


@examples(100)
@given(counts=st.lists(st.integers(1, 300)))
def test_every_token_count_lies_in_exactly_one_of_the_few_buckets(counts: list[int]) -> None:
    buckets = [bucket["K"] for bucket in token_buckets([{"K": count} for count in counts])]
    assert len(buckets) <= MAX_TOKEN_BUCKETS
    assert all(sum(least <= count <= most for least, _, most in buckets) == 1 for count in counts)
    assert {most for _, _, most in buckets} <= set(counts)


def test_counts_of_several_blocks_are_cut_together() -> None:
    """Five steps are two to a bucket, those that compute the fewest tokens first."""
    steps = [{"K": 2 * n, "K.mlp.2": n, "K.mlp.3": 2 * n} for n in (5, 1, 4, 2, 3)]
    assert token_buckets(steps) == [
        {"K": (2, 4, 4), "K.mlp.2": (1, 2, 2), "K.mlp.3": (2, 4, 4)},
        {"K": (6, 8, 8), "K.mlp.2": (3, 4, 4), "K.mlp.3": (6, 8, 8)},
        {"K": (10, 10, 10), "K.mlp.2": (5, 5, 5), "K.mlp.3": (10, 10, 10)},
    ]


@examples(50)
@given(counts=st.lists(st.tuples(*[st.integers(1, 300)] * 3)))
def test_every_step_of_several_counts_lies_in_one_of_the_few_buckets(counts: list[tuple[int, int, int]]) -> None:
    steps = [dict(zip(("K", "K.mlp.2", "K.mlp.3"), of_step, strict=True)) for of_step in counts]
    buckets = [Profile(bucket) for bucket in token_buckets(steps)]
    assert len(buckets) <= MAX_TOKEN_BUCKETS
    assert [step for step in steps if not any(bucket.covers(step) for bucket in buckets)] == []


ALONE: Final = (1, 1, 1)


@pytest.mark.parametrize(
    ("inputs", "max_batch_size", "sides"),
    [
        ((FIXED,), 8, [{}]),
        ((B,), 1, [{"B": ALONE}]),
        ((B, FIXED), 2, [{"B": ALONE}, {"B": (2, 2, 2)}]),
        ((B, R), 8, [{"B": ALONE}, {"B": (2, 8, 8)}]),
        ((R,), 8, [{"B": ALONE}, {"B": (2, 8, 8)}]),  # rows are images, too
        ((T,), 8, [{"T": (6, 9, 9)}]),
        ((B, T), 4, [{"B": ALONE, "T": (6, 9, 9)}, {"B": (2, 4, 4), "T": (6, 9, 9)}]),
        ((B, K), 1, [{"B": ALONE, "K": (4, 4, 4)}, {"B": ALONE, "K": (12, 12, 12)}]),
        (
            (R, K),
            4,
            [
                {"B": ALONE, "K": (4, 4, 4)},
                {"B": ALONE, "K": (12, 12, 12)},
                {"B": (2, 4, 4), "K": (4, 4, 4)},
                {"B": (2, 4, 4), "K": (12, 12, 12)},
            ],
        ),
    ],
)
def test_an_engine_has_a_profile_for_each_way_in_which_it_is_asked(
    inputs: tuple[TensorSpec, ...],
    max_batch_size: int,
    sides: list[dict[str, tuple[int, int, int]]],
) -> None:
    asked = [schedule_of(6, 4, 4), schedule_of(9, 12, 4)]
    assert profiles_of(graph_of(*inputs), ONE_SIZE, asked, max_batch_size) == tuple(map(Profile, sides))


@pytest.mark.parametrize(
    ("name", "inputs", "sides"),
    [
        ("full", (N,), {"N": (4, 16, 48)}),  # 2 · 2, 4 · 4 and 6 · 8 patches
        ("tokens", (N, K), {"N": (4, 16, 48), "K": (1, 12, 36)}),  # of 4 and 12: a quarter to three times as many
        ("tokens", (K,), {"K": (1, 12, 36)}),
        ("other", (GRID,), {"B": ALONE, "rows": (2, 4, 6), "columns": (2, 4, 8)}),
        ("vae_decoder", (GRID,), {"B": ALONE, "rows": (2, 4, 5), "columns": (2, 4, 5)}),  # of tiles at most
    ],
)
def test_where_pictures_differ_in_size_a_profile_takes_all_and_is_tuned_for_the_default(
    name: str, inputs: tuple[TensorSpec, ...], sides: dict[str, tuple[int, int, int]]
) -> None:
    asked = [schedule_of(6, 4, 4), schedule_of(9, 12, 4)]
    assert profiles_of(graph_of(*inputs, name=name), SIZES, asked, 1) == (Profile(sides),)


OF_BLOCK: Final = TensorSpec("token_slots.mlp.3", "int64", ("K.mlp.3",))


def test_counts_of_blocks_have_sides_of_their_own() -> None:
    asked = [
        replace(SCHEDULE, steps=tuple(tokens(((n,),)) if i == 2 else step for i, step in enumerate(SCHEDULE.steps)))
        for n in (4, 12)
    ]
    sides = [{"B": ALONE, "K": (n, n, n), "K.mlp.3": (n, n, n)} for n in (4, 12)]
    assert profiles_of(graph_of(B, K, OF_BLOCK), BY_BLOCK, asked, 1) == tuple(map(Profile, sides))
    of_sizes = replace(SIZES, has_block_counts=True)
    (profile,) = profiles_of(graph_of(K, OF_BLOCK), of_sizes, asked, 1)
    assert profile == Profile({"K": (1, 12, 36), "K.mlp.3": (1, 12, 36)})


@pytest.mark.parametrize(("name", "count"), [("tokens", 4), ("tokens_1", 12)])
def test_an_engine_is_tuned_for_the_steps_that_it_does(name: str, count: int) -> None:
    steps = (FULL, tokens(4), FULL, replace(tokens(12), forecast=(2.0, -1.0)), REUSE, REUSE)
    asked = replace(schedule_of(6, 4), steps=steps)
    assert profiles_of(graph_of(K, name=name), ONE_SIZE, [asked], 1) == (Profile({"K": (count, count, count)}),)


def test_sizes_multiply_no_profiles() -> None:
    profiles = profiles_of(graph_of(B, N, K), SIZES, [schedule_of(6, 4, 12)], 8)
    of_size = {"K": (1, 12, 36), "N": (4, 16, 48)}
    assert profiles == (Profile({"B": ALONE, **of_size}), Profile({"B": (2, 8, 8), **of_size}))


@examples(60)
@given(schedule=schedules(deep_start=3), size=sizes_of(SIZES))
def test_every_size_of_every_schedule_is_covered(schedule: Schedule, size: Size) -> None:
    pipeline = replace(SIZES, has_block_counts=True)
    rows, columns = pipeline.grid_of(size)
    of_size = {"B": 1, "N": rows * columns, "rows": rows, "columns": columns}
    for kind in schedule.kinds:
        steps = [step for step in schedule.steps if step.kind == kind]
        counts = [K, OF_BLOCK] if steps[0].tokens is not None else []
        (profile,) = profiles_of(graph_of(N, GRID, *counts, name=kind), pipeline, [schedule], 1)
        asked = [of_size | pipeline.selected_tokens(step, size) for step in steps]
        assert [sizes for sizes in asked if not profile.covers(sizes)] == []


@examples(40)
@given(asked=st.lists(schedules(deep_start=3), min_size=1, max_size=4), max_batch_size=st.integers(1, 9))
def test_whatever_the_schedules_ask_for_is_covered(asked: list[Schedule], max_batch_size: int) -> None:
    for kind in {kind for schedule in asked for kind in schedule.kinds}:
        steps = [(s, len(schedule.steps)) for schedule in asked for s in schedule.steps if s.kind == kind]
        graph = graph_of(B, R, T, *([K, OF_BLOCK] if steps[0][0].tokens is not None else []), name=kind)
        profiles = profiles_of(graph, BY_BLOCK, asked, max_batch_size)
        sizes = [
            {"B": images, "T": num_steps} | BY_BLOCK.selected_tokens(step, BY_BLOCK.size)
            for step, num_steps in steps
            for images in range(1, max_batch_size + 1)
        ]
        assert [s for s in sizes if not any(profile.covers(s) for profile in profiles)] == []
        assert not any(profile.covers(sizes[0] | {"B": max_batch_size + 1}) for profile in profiles)


@examples(20)
@given(parts=lowerables())
def test_a_schedule_of_the_export_lowers_for_every_batch_size_of_its_bundle(parts: Lowerable) -> None:
    asked = [parts.schedule, parts.schedule.uncached()]
    largest = parts.manifest.max_batch_size
    engines = {
        name: replace(engine, profiles=profiles_of(engine.graph, parts.pipeline, asked, largest))
        for name, engine in parts.manifest.engines.items()
        if "K" not in {side for spec in engine.graph.inputs for side in spec.shape} or name in _used(parts)
    }
    tuned = replace(parts.manifest, engines={**parts.manifest.engines, **engines})
    for batch_size in range(1, largest + 1):
        program = lower(tuned, parts.schedule, parts.table, batch_size, parts.size)
        assert program == lower(parts.manifest, parts.schedule, parts.table, batch_size, parts.size)


def _used(parts: Lowerable) -> set[str]:
    return {engine for step in parts.schedule.steps for engine in parts.manifest.forwards[step.kind]}
