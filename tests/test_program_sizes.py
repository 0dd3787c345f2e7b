"""Programs of several batch sizes and pictures, and the profiles that must cover them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final

import pytest

from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.graphs import PRECISIONS, Precision
from hemiola_runtime.manifest import Profile
from hemiola_runtime.program import (
    Placed,
    Program,
    check_alignment,
    lower,
    lower_alone,
    tokens_by_square,
)
from hemiola_runtime.schedule import (
    FULL,
    tokens,
)
from programs import (
    ALIGNMENT,
    EXAMPLE,
    PIPELINE,
    SEGMENTED,
    TEXT_PIPELINE,
    TEXT_SELECTOR,
    constant_at,
    lowered,
    step_launches,
    text_example,
    with_profiles,
)
from strategies import (
    Lowerable,
    Size,
    graph_specs,
    manifest_of,
)

# sizes and the profiles that must cover them


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_launch_tells_the_number_behind_each_symbol(batch_size: int) -> None:
    launches = lowered(replace(SEGMENTED, batch_size=batch_size)).launches
    of_all = {"B": batch_size, "T": 6, "N": 16, "rows": 4, "columns": 4}
    selected = [0, 0, 0, 0, 4, 0, 7, 4, 0]
    assert [launch.sizes for launch in launches] == [of_all | {"K": count} for count in selected]


def test_a_larger_batch_takes_more_memory_and_has_the_same_launches() -> None:
    programs = [lowered(replace(EXAMPLE, batch_size=size)) for size in (1, 2, 3)]
    assert [program.num_bytes for program in programs] == sorted({program.num_bytes for program in programs})
    launches = [[(launch.engine, launch.step) for launch in program.launches] for program in programs]
    assert launches == [launches[0]] * 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_caches_take_half_the_memory_and_the_state_all_of_it(precision: Precision) -> None:
    graphs = graph_specs(PIPELINE, has_decoder=True, precision=precision)
    half = lowered(replace(EXAMPLE, manifest=manifest_of(PIPELINE, graphs, precision=precision)))
    whole = lowered(EXAMPLE)
    # 4 blocks · 2 branches of (R, N, D) = (6, 16, 32), and a second place for the MLPs of blocks 2 and 3
    assert whole.num_bytes - half.num_bytes == (4 * 2 + 2) * 6 * 16 * 32 * 2
    assert (whole.cache_bytes, half.cache_bytes) == (10 * 6 * 16 * 32 * 4, 10 * 6 * 16 * 32 * 2)
    cache = half.launches[1].tensors["next_mlp_cache.0"]
    assert (cache.dtype, cache.num_bytes) == (PRECISIONS[precision], 6 * 16 * 32 * 2)
    assert half.inputs["state"].dtype == half.results["latents"].dtype == "float32"


COVERED: Final = Profile({"B": (1, 2, 3), "K": (4, 4, 7)})


@pytest.mark.parametrize(
    "profiles",
    [
        (),  # of a backend that takes all sizes alike
        (COVERED,),
        (Profile({"B": (3, 3, 3), "K": (4, 4, 4)}), Profile({"B": (3, 3, 3), "K": (7, 7, 7)})),  # each step its own
        (Profile({}),),
    ],
)
def test_an_engine_runs_the_sizes_that_one_of_its_profiles_covers(profiles: tuple[Profile, ...]) -> None:
    parts = with_profiles(EXAMPLE, "tokens", *profiles)
    assert lowered(parts).launches == lowered(EXAMPLE).launches


REFUSED: list[tuple[str, tuple[Profile, ...], str]] = [
    (
        "tokens",
        (Profile({"B": (1, 1, 2), "K": (4, 7, 7)}),),
        "`tokens` with B = 3, K = 4, but the engine was built for B = 1 … 2, K = 4 … 7 (B images",
    ),
    ("tokens", (Profile({"B": (1, 1, 4), "K": (4, 4, 6)}),), "`tokens` with B = 3, K = 7, but"),  # the step of 7
    (
        "tokens",
        (Profile({"B": (1, 1, 2), "K": (1, 7, 9)}), Profile({"B": (1, 3, 3), "K": (8, 8, 8)})),
        "B = 1 … 2, K = 1 … 9; B = 1 … 3, K = 8 … 8 (B images",
    ),  # neither covers both
    ("conditioning", (Profile({"B": (1, 1, 3), "T": (8, 8, 8)}),), "`conditioning` with B = 3, T = 6, but the engine"),
    ("deep", (Profile({"B": (4, 4, 4)}),), "`deep` with B = 3, but the engine was built for B = 4 … 4 (B images"),
    ("vae_decoder", (Profile({"B": (1, 1, 1)}),), "`vae_decoder` with B = 3, but"),
]


@pytest.mark.parametrize(("engine", "profiles", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
@pytest.mark.parametrize("parts", [EXAMPLE, SEGMENTED], ids=["separate", "segmented"])
def test_a_schedule_of_sizes_that_an_engine_was_not_built_for_is_refused_with_both(
    parts: Lowerable, engine: str, profiles: tuple[Profile, ...], message: str
) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        lowered(with_profiles(parts, engine, *profiles))
    assert "Export with this schedule among the others, and build again" in str(caught.value)


# pictures of prompts, of several sizes


def fixed_at(program: Program, engine: str, name: str) -> tuple[float, ...]:
    """Return the constant that the first launch of an engine reads under a name."""
    launch = next(launch for launch in program.launches if launch.engine == engine)
    return constant_at(program, launch.tensors[name])


def test_without_a_size_a_program_is_one_of_the_default_size() -> None:
    parts = text_example()
    assert lower(parts.manifest, parts.schedule, parts.table, 3) == lowered(parts)
    assert lower(parts.manifest, parts.schedule, parts.table, 3) != lowered(replace(parts, size=(8, 4)))


def test_a_request_of_prompts_writes_embeddings_and_their_mask() -> None:
    program = lowered(text_example(size=(4, 8)))
    shapes = {name: (place.shape, place.dtype) for name, place in program.inputs.items()}
    assert shapes == {
        "text_embeddings": ((3, 2, 5, 48), "float32"),  # of two prompts an image
        "text_mask": ((3, 2, 5), "float32"),
        "guidance": ((3,), "float32"),
        "state": ((2, 3, 8, 16), "float32"),
    }


def test_tokens_lie_at_their_share_of_a_pictures_sides() -> None:
    program = lowered(text_example(size=(4, 8)))
    places = fixed_at(program, "conditioning", "token_places")
    assert places == (0, 0, 0, 0.25, 0, 0.5, 0, 0.75, 0.5, 0, 0.5, 0.25, 0.5, 0.5, 0.5, 0.75)  # 2 rows, 4 columns


def test_a_pictures_size_is_given_in_pixels_height_first() -> None:
    assert fixed_at(lowered(text_example(size=(4, 8))), "conditioning", "picture_size") == (8, 16)


@pytest.mark.parametrize(
    ("grid", "size", "order"),
    [
        ((2, 4), 2, [0, 1, 4, 5, 2, 3, 6, 7]),
        ((4, 2), 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        ((2, 3), 1, [0, 1, 2, 3, 4, 5]),
        ((3, 3), 3, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((3, 6), 3, [0, 1, 2, 6, 7, 8, 12, 13, 14, 3, 4, 5, 9, 10, 11, 15, 16, 17]),
    ],
)
def test_tokens_are_ordered_by_the_squares_they_lie_in(grid: tuple[int, int], size: int, order: list[int]) -> None:
    assert tokens_by_square(grid, size) == order


def test_tokens_reads_the_squares_of_its_own_grid() -> None:
    assert fixed_at(lowered(text_example(size=(4, 8))), "tokens", "token_squares") == (0, 1, 4, 5, 2, 3, 6, 7)


@pytest.mark.parametrize("without", [{"spatial_bonus": 0.0}, {"spatial_size": 1}])
def test_without_squares_none_are_placed(without: dict[str, Any]) -> None:
    pipeline = replace(TEXT_PIPELINE, selector=replace(TEXT_SELECTOR, **without))
    program, usual = lowered(text_example(pipeline)), lowered(text_example())
    assert not any("token_squares" in launch.tensors for launch in program.launches)
    assert len(program.constants) == len(usual.constants) - 1


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ((8, 8), [4, 7, 4]),
        ((4, 8), [2, 4, 2]),  # half as many tokens: 3.5 of 7, to the even one
        ((4, 4), [1, 2, 1]),  # a quarter: 1.75
        ((12, 16), [12, 21, 12]),  # three times as many
    ],
)
def test_the_share_of_tokens_that_are_selected_is_the_same_at_every_size(size: Size, counts: list[int]) -> None:
    launches = [launch for launch in lowered(text_example(size=size)).launches if launch.engine == "tokens"]
    assert [launch.sizes["K"] for launch in launches] == counts
    assert [launch.tensors["token_slots"].shape for launch in launches] == [(count,) for count in counts]


def test_one_token_at_least_is_selected() -> None:
    assert TEXT_PIPELINE.selected_tokens(tokens(1), (4, 4)) == {"K": 1}  # a quarter of one is none
    assert TEXT_PIPELINE.selected_tokens(FULL, (4, 4)) == {"K": 0}


@pytest.mark.parametrize(
    ("size", "latents", "images"),
    [
        ((8, 8), (3, 4, 4, 2, 2, 4), (3, 16, 16, 3)),
        ((4, 8), (3, 2, 4, 2, 2, 4), (3, 8, 16, 3)),
        ((8, 4), (3, 4, 2, 2, 2, 4), (3, 16, 8, 3)),
    ],
)
def test_pictures_not_larger_than_a_tile_are_decoded_as_a_part_of_the_program(
    size: Size, latents: tuple[int, ...], images: tuple[int, ...]
) -> None:
    program = lowered(text_example(size=size))
    last = program.launches[-1]
    assert (last.engine, last.tensors["latents"].shape) == ("vae_decoder", latents)
    assert program.results["images"] == last.tensors["images"]
    assert program.results["images"].shape == images


@pytest.mark.parametrize("size", [(12, 16), (12, 4), (4, 12)])
def test_larger_pictures_are_left_as_latents(size: Size) -> None:
    program = lowered(text_example(size=size))
    assert "vae_decoder" not in {launch.engine for launch in program.launches}
    assert {name: place.shape for name, place in program.results.items()} == {
        "latents": (3, size[0] * size[1] // 4, 16)
    }


def test_the_entries_of_a_padded_table_are_as_far_apart_as_it_is_wide() -> None:
    program = lowered(text_example())
    table = program.launches[0].tensors["mlp_gate.1"]
    assert table.shape == (6, 64)  # one row a step for all images; 48 numbers and 16 of padding
    entries = [launch.tensors["mlp_gate.1"] for launch in step_launches(program)]
    assert entries == [Placed(table.offset + 256 * i, (1, 1, 48), "float32") for i in range(6)]
    check_alignment(program, ALIGNMENT)


def test_what_conditioning_computes_once_is_read_at_every_step() -> None:
    program = lowered(text_example())
    written = {name: program.launches[0].tensors[name] for name in ("positions", "text_bias", "text_keys.1")}
    full, reuse, tokens_, deep = step_launches(program)[:4]
    for launch in (full, tokens_, deep):
        assert {name: launch.tensors[name] for name in written} == written
    assert reuse.tensors["positions"] == written["positions"]


def test_caches_are_counted_with_their_second_places() -> None:
    one = 6 * 16 * 32 * 4  # (R, N, D) in float32
    assert lowered(EXAMPLE).cache_bytes == (4 * 2 + 2) * one  # two branches, and the deep MLPs again
    one = 6 * 16 * 48 * 4
    assert lowered(text_example()).cache_bytes == (2 * 3 + 2) * one  # three branches, and two of the deep block again
    assert lowered(replace(text_example(), size=(4, 8))).cache_bytes == (2 * 3 + 2) * one // 2
    uncached = replace(EXAMPLE, schedule=replace(EXAMPLE.schedule, steps=(FULL,) * 6, deep_start=None, selector=None))
    assert lowered(uncached).cache_bytes == 4 * 2 * 6 * 16 * 32 * 4  # that nobody reads, but `full` writes


@pytest.mark.parametrize(
    ("engine", "sides", "message"),
    [
        ("full", {"B": (1, 3, 3), "N": (4, 16, 48)}, None),
        ("full", {"B": (1, 3, 3), "N": (16, 16, 48)}, "`full` with B = 3, N = 8, but the engine was built for B = 1"),
        ("vae_decoder", {"B": (1, 3, 3), "rows": (2, 4, 4), "columns": (2, 4, 4)}, None),
        ("vae_decoder", {"rows": (3, 4, 4), "columns": (2, 4, 4)}, "`vae_decoder` with rows = 2, columns = 4, but"),
        ("vae_decoder", {"rows": (2, 4, 4), "columns": (2, 3, 3)}, "rows = 2 … 4, columns = 2 … 3 (B images"),
    ],
)
def test_sizes_of_pictures_are_covered_by_a_profile_or_refused(
    engine: str, sides: dict[str, tuple[int, int, int]], message: str | None
) -> None:
    parts = with_profiles(text_example(size=(4, 8)), engine, Profile(sides))
    if message is None:
        assert lowered(parts) == lowered(text_example(size=(4, 8)))
    else:
        with pytest.raises(ScheduleError, match=re.escape(message)):
            lowered(parts)


def test_an_engine_alone_is_one_launch_from_its_inputs_to_its_outputs() -> None:
    program = lower_alone(text_example().manifest, "text_encoder", 1)
    assert program.inputs == {"token_ids": Placed(0, (1, 5), "int64"), "text_mask": Placed(256, (1, 5), "float32")}
    assert program.results == {"text_embeddings": Placed(512, (1, 5, 48), "float32")}
    assert (program.staged_bytes, program.num_bytes) == (512, 512 + 1024)  # 5 · 48 · 4 = 960
    (launch,) = program.launches
    assert (launch.engine, launch.step) == ("text_encoder", None)
    assert launch.tensors == {**program.inputs, **program.results}
    assert program.constants == ()


def test_a_decoder_alone_takes_tiles_of_any_size() -> None:
    program = lower_alone(text_example().manifest, "vae_decoder", 2, (4, 8))
    assert program.inputs["latents"].shape == (2, 2, 4, 2, 2, 4)
    assert program.results["images"].shape == (2, 8, 16, 3)
    assert {symbol: program.launches[0].sizes[symbol] for symbol in ("B", "rows", "columns", "K")} == {
        "B": 2,
        "rows": 2,
        "columns": 4,
        "K": 0,
    }
