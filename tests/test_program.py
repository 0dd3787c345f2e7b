from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.errors import BundleError, ScheduleError
from hemiola_runtime.graphs import (
    CONDITIONING,
    PRECISIONS,
    STEP_TABLE,
    VAE_DECODER,
    GraphSpec,
    Precision,
    slots_name,
)
from hemiola_runtime.manifest import PROFILE_SYMBOLS, Profile
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.program import (
    SOLVER,
    Launch,
    Placed,
    Program,
    check_alignment,
    lower,
    lower_alone,
    tokens_by_square,
)
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    RESIDUAL,
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
from hemiola_runtime.solver_table import SolverTable
from strategies import (
    BRANCHES,
    TEXT_BRANCHES,
    Lowerable,
    Size,
    examples,
    forwards_of,
    graph_specs,
    lowerables,
    manifest_of,
)

Array = NDArray[np.float64]

WORD: Final = 2  # bytes; the smallest element of a tensor
WORDS: Final = {"float32": 2, "float16": 1, "bfloat16": 1, "int64": 4}
ALIGNMENT: Final = 256  # bytes; what TensorRT asks of every address that is bound


def lowered(parts: Lowerable) -> Program:
    return lower(parts.manifest, parts.schedule, parts.table, parts.batch_size, parts.size)


def overlap(a: Placed, b: Placed) -> bool:
    return a.offset < b.end and b.offset < a.end


def contains(whole: Placed, part: Placed) -> bool:
    return whole.offset <= part.offset and part.end <= whole.end


def names_of(graph: GraphSpec) -> tuple[list[str], list[str]]:
    return [spec.name for spec in graph.inputs], [spec.name for spec in graph.outputs]


def reads_and_writes(launch: Launch, graphs: Mapping[str, GraphSpec]) -> tuple[list[Placed], list[Placed]]:
    inputs, outputs = names_of(graphs[launch.engine])
    return [launch.tensors[name] for name in inputs], [launch.tensors[name] for name in outputs]


def table_names(graphs: Mapping[str, GraphSpec]) -> list[str]:
    return [spec.name for spec in graphs[CONDITIONING].outputs if spec.shape[0] in ("T", STEP_TABLE)]


def step_launches(program: Program) -> list[Launch]:
    return [launch for launch in program.launches if launch.step is not None]


# an example that can be followed by hand

MODEL: Final = ModelIdentity("dit", "tiny", "00" * 32, (4, 8, 8))
SELECTOR: Final = TokenSelector("value_norm", 0.25, 0.0, 1, 0)
PIPELINE: Final = Pipeline(
    model=MODEL,
    guidance="classifier_free",
    num_blocks=4,
    width=32,
    patch_size=2,
    branches=BRANCHES,
    state_rows=2,
    deep_start=2,
    selector=SELECTOR,
    mask=None,
    has_block_counts=False,
    labels={"0": "zero"},
    text=None,
    min_size=(8, 8),
    max_size=(8, 8),
    pixels_per_latent=2,
    image_channels=3,
    tile_size=None,
)
STEPS: Final = (FULL, REUSE, tokens(4), DEEP, tokens(7), tokens(4))
SCHEDULER: Final = SchedulerIdentity("DDIMScheduler", {}, 6, (900.0, 750.0, 600.0, 450.0, 300.0, 150.0))
EXAMPLE: Final = Lowerable(
    manifest=manifest_of(PIPELINE, graph_specs(PIPELINE, has_decoder=True)),
    schedule=Schedule(
        2,
        MODEL,
        SCHEDULER,
        "classifier_free",
        2,
        SELECTOR,
        None,
        STEPS,
        FoundBy("by_hand", {}, 0, MadeBy("", {}, None)),
        {},
    ),
    table=SolverTable(
        1,
        SCHEDULER,
        1.0,
        tuple(0.5 + i for i in range(6)),
        tuple(((i + 0.1, i + 0.2, i + 0.3), (i + 0.4, i + 0.5, i + 0.6)) for i in range(6)),
        0.0,
    ),
    batch_size=3,
    size=(8, 8),
)


SEGMENTED: Final = replace(
    EXAMPLE, manifest=manifest_of(PIPELINE, graph_specs(PIPELINE, has_decoder=True), is_segmented=True)
)


def with_graph(parts: Lowerable, graph: GraphSpec) -> Lowerable:
    """Return the parts with another graph in an engine."""
    engine = replace(parts.manifest.engines[graph.name], graph=graph)
    return replace(parts, manifest=replace(parts.manifest, engines={**parts.manifest.engines, graph.name: engine}))


def with_profiles(parts: Lowerable, engine: str, *profiles: Profile) -> Lowerable:
    """Return the parts with one engine tuned for some sizes."""
    tuned = replace(parts.manifest.engines[engine], profiles=profiles)
    return replace(parts, manifest=replace(parts.manifest, engines={**parts.manifest.engines, engine: tuned}))


def constant_at(program: Program, place: Placed) -> tuple[float, ...]:
    (values,) = [constant.values for constant in program.constants if constant.place == place]
    return values


def test_a_program_is_conditioning_the_steps_of_the_schedule_and_the_decoder() -> None:
    launches = [(launch.engine, launch.step) for launch in lowered(EXAMPLE).launches]
    assert launches == [
        ("conditioning", None),
        ("full", 0),
        ("reuse", 1),
        ("tokens", 2),
        ("deep", 3),
        ("tokens", 4),
        ("tokens", 5),
        ("vae_decoder", None),
    ]


def test_conditioning_is_given_the_timesteps_of_the_schedule() -> None:
    program = lowered(EXAMPLE)
    assert constant_at(program, program.launches[0].tensors["timesteps"]) == SCHEDULER.timesteps


def test_each_step_is_given_its_numbers_of_the_solver_table() -> None:
    program = lowered(EXAMPLE)
    for i, launch in enumerate(step_launches(program)):
        weights = (i + 0.1, i + 0.2, i + 0.3, i + 0.4, i + 0.5, i + 0.6)
        assert constant_at(program, launch.tensors["coefficients"]) == weights
        assert constant_at(program, launch.tensors["input_scale"]) == (0.5 + i,)


def test_token_slots_are_numbered_and_those_of_fewer_tokens_are_the_first_of_them() -> None:
    program = lowered(EXAMPLE)
    slots = [launch.tensors["token_slots"] for launch in program.launches if launch.engine == "tokens"]
    assert [place.shape for place in slots] == [(4,), (7,), (4,)]
    assert len({place.offset for place in slots}) == 1
    assert constant_at(program, slots[1]) == (0, 1, 2, 3, 4, 5, 6)


def test_a_request_writes_state_labels_and_guidance() -> None:
    program = lowered(EXAMPLE)
    shapes = {name: (place.shape, place.dtype) for name, place in program.inputs.items()}
    assert shapes == {
        "state": ((2, 3, 16, 16), "float32"),  # 16 patches of 2 · 2 latents with 4 channels
        "labels": ((3,), "int64"),
        "guidance": ((3,), "float32"),
    }


def test_without_guidance_a_request_writes_state_and_labels() -> None:
    pipeline = replace(PIPELINE, guidance="none")
    parts = replace(
        EXAMPLE,
        manifest=manifest_of(pipeline, graph_specs(pipeline, has_decoder=True)),
        schedule=replace(EXAMPLE.schedule, guidance="none"),
    )
    assert set(lowered(parts).inputs) == {"state", "labels"}


def test_the_latents_are_row_0_of_the_last_state() -> None:
    program = lowered(EXAMPLE)
    last = program.launches[-2].tensors["next_state"]
    assert program.results["latents"] == Placed(last.offset, (3, 16, 16), "float32")
    assert program.results["images"] == program.launches[-1].tensors["images"]
    assert list(program.results) == ["latents", "images"]


def test_the_decoder_reads_the_latents_as_rows_and_columns_of_patches() -> None:
    program = lowered(EXAMPLE)
    read = program.launches[-1].tensors["latents"]
    assert read == Placed(program.results["latents"].offset, (3, 4, 4, 2, 2, 4), "float32")
    assert program.results["images"].shape == (3, 16, 16, 3)


def test_without_a_decoder_there_are_no_images() -> None:
    program = lowered(replace(EXAMPLE, manifest=manifest_of(PIPELINE, graph_specs(PIPELINE, has_decoder=False))))
    assert list(program.results) == ["latents"]
    assert program.launches[-1].engine == "tokens"


def test_a_tensor_that_is_read_and_written_by_one_launch_swaps_between_two_places() -> None:
    places = [launch.tensors["next_state"].offset for launch in step_launches(lowered(EXAMPLE))]
    assert len(set(places)) == 2
    assert places == [places[0], places[1]] * 3


def test_a_cache_that_is_written_but_not_read_stays_in_its_place() -> None:
    launches = step_launches(lowered(EXAMPLE))
    assert launches[3].tensors["next_attention_cache.3"] == launches[0].tensors["next_attention_cache.3"]


def test_a_forward_that_reads_what_nothing_writes_is_a_fault_of_ours() -> None:
    full = EXAMPLE.graphs["full"]
    outputs = tuple(spec for spec in full.outputs if spec.name != "next_mlp_cache.1")
    with pytest.raises(AssertionError, match=r"step 1: `reuse` reads mlp_cache\.1, which nothing has written"):
        lowered(with_graph(EXAMPLE, replace(full, outputs=outputs)))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int64", 8)])
def test_a_placed_tensor_knows_its_size(dtype: Any, size: int) -> None:
    place = Placed(512, (2, 3), dtype)
    assert (place.num_bytes, place.end) == (2 * 3 * size, 512 + 6 * size)


# engines in a chain


def test_a_forward_of_two_engines_is_two_launches_of_one_step() -> None:
    launches = [(launch.engine, launch.step) for launch in lowered(SEGMENTED).launches]
    assert launches == [
        ("conditioning", None),
        ("front", 0),
        ("deep", 0),
        ("reuse", 1),
        ("tokens", 2),
        ("deep", 3),  # alone: its step takes the shallow blocks from the cache
        ("tokens", 4),
        ("tokens", 5),
        ("vae_decoder", None),
    ]


def test_a_chain_reads_and_writes_the_tensors_of_the_engine_that_it_replaces() -> None:
    full = step_launches(lowered(EXAMPLE))[0]
    front, deep = step_launches(lowered(SEGMENTED))[:2]
    handed_on = {f"{branch}_cache.{block}" for block in (0, 1) for branch in ("attention", "mlp")}
    assert {name: deep.tensors[name] for name in handed_on} == {
        name: front.tensors[f"next_{name}"] for name in handed_on
    }
    chain = {name: place for name, place in {**front.tensors, **deep.tensors}.items() if name not in handed_on}
    described = {name: (place.shape, place.dtype) for name, place in chain.items()}
    assert described == {name: (place.shape, place.dtype) for name, place in full.tensors.items()}


def test_only_the_last_engine_of_a_chain_moves_the_state_on() -> None:
    front, deep, reuse = step_launches(lowered(SEGMENTED))[:3]
    assert front.tensors["state"] == deep.tensors["state"]
    assert "next_state" not in front.tensors
    assert deep.tensors["next_state"] == reuse.tensors["state"] != deep.tensors["state"]


def test_a_chain_costs_no_more_memory_than_one_engine() -> None:
    assert lowered(SEGMENTED).num_bytes == lowered(EXAMPLE).num_bytes
    assert lowered(SEGMENTED).staged_bytes == lowered(EXAMPLE).staged_bytes
    assert lowered(SEGMENTED).inputs == lowered(EXAMPLE).inputs


# forecasts: caches of older full steps

LINE: Final = (1.5, -0.5)
CURVE: Final = (3.0, -3.0, 1.0)
TOKENS_ON_A_LINE: Final = replace(tokens(4), forecast=LINE)


def forecasting(*steps: Step, is_segmented: bool = False, has_residual: bool = False) -> Lowerable:
    """Return the example with other steps, and with graphs that forecast."""
    exported = [*forwards_of(PIPELINE), *([Forward.RESIDUAL] if has_residual else [])]
    graphs = graph_specs(PIPELINE, has_decoder=True, max_order=2, forwards=exported)
    timesteps = tuple(map(float, range(len(steps), 0, -1)))
    scheduler = replace(SCHEDULER, timesteps=timesteps)
    forwards = {step.forward for step in steps}
    table = replace(
        EXAMPLE.table,
        scheduler=scheduler,
        input_scale=EXAMPLE.table.input_scale[:1] * len(steps),
        coefficients=EXAMPLE.table.coefficients[:1] * len(steps),
    )
    schedule = replace(
        EXAMPLE.schedule,
        scheduler=scheduler,
        deep_start=2 if forwards & {Forward.DEEP, Forward.TOKENS} else None,
        selector=SELECTOR if Forward.TOKENS in forwards else None,
        steps=steps,
    )
    manifest = manifest_of(PIPELINE, graphs, is_segmented=is_segmented)
    return replace(EXAMPLE, manifest=manifest, schedule=schedule, table=table)


def reused(*forecast: float) -> Step:
    return replace(REUSE, forecast=forecast)


def writers_of(parts: Lowerable, cache: str) -> dict[int, list[int]]:
    """Tell of every step that reads a cache which steps had written what it reads, the newest first."""
    last_writer: dict[Placed, int] = {}
    found = {}
    for launch in step_launches(lowered(parts)):
        assert launch.step is not None
        ages = [name for name in launch.tensors if name == cache or name.startswith(f"{cache}.")]
        if ages:
            found[launch.step] = [last_writer[launch.tensors[name]] for name in ages]
        if f"next_{cache}" in launch.tensors:
            last_writer[launch.tensors[f"next_{cache}"]] = launch.step
    return found


@pytest.mark.parametrize("is_segmented", [False, True], ids=["separate", "segmented"])
@pytest.mark.parametrize(
    ("steps", "of_attention", "of_mlp"),
    [
        ((FULL, FULL, reused(*LINE)), {2: [1, 0]}, {2: [1, 0]}),
        ((FULL, FULL, FULL, reused(*LINE)), {3: [2, 1]}, {3: [2, 1]}),
        ((FULL, FULL, REUSE, FULL, reused(*CURVE)), {2: [1], 4: [3, 1, 0]}, {2: [1], 4: [3, 1, 0]}),
        (
            (FULL, FULL, reused(*LINE), FULL, reused(*CURVE), FULL, FULL, reused(*CURVE)),
            {2: [1, 0], 4: [3, 1, 0], 7: [6, 5, 3]},
            {2: [1, 0], 4: [3, 1, 0], 7: [6, 5, 3]},
        ),
        # what `tokens` and `deep` compute goes into the newest cache, and grows old with it
        (
            (FULL, FULL, TOKENS_ON_A_LINE, reused(*LINE), FULL, reused(*LINE)),
            {2: [1, 0], 3: [1, 0], 5: [4, 1]},
            {2: [1, 0], 3: [2, 0], 5: [4, 2]},
        ),
        ((FULL, tokens(4), FULL, reused(*LINE)), {1: [0], 3: [2, 0]}, {1: [0], 3: [2, 1]}),
        (
            (FULL, FULL, replace(DEEP, forecast=LINE), FULL, reused(*LINE)),
            {2: [0], 4: [3, 2]},
            {2: [0], 4: [3, 2]},
        ),
    ],
    ids=lambda value: "".join(step.symbol for step in value) if isinstance(value, tuple) else "",
)
def test_a_forecast_reads_what_the_last_full_steps_left(
    steps: tuple[Step, ...], of_attention: dict[int, list[int]], of_mlp: dict[int, list[int]], is_segmented: bool
) -> None:
    parts = forecasting(*steps, is_segmented=is_segmented)
    found = writers_of(parts, "attention_cache.3"), writers_of(parts, "mlp_cache.3")
    in_chain = {i for i, step in enumerate(steps) if step == FULL}  # `deep` behind `front` reads no deep cache
    assert [{i: w for i, w in of_steps.items() if i not in in_chain} for of_steps in found] == [of_attention, of_mlp]


@pytest.mark.parametrize(
    ("steps", "num_places"),
    [
        ((FULL, FULL, REUSE), 8),  # two branches of four blocks
        ((FULL, FULL, reused(*LINE)), 2 * 8),
        ((FULL, FULL, FULL, reused(*LINE), FULL, reused(*LINE)), 2 * 8),
        ((FULL, FULL, FULL, reused(*CURVE)), 3 * 8),
        ((FULL, FULL, TOKENS_ON_A_LINE), 2 * 8 + 2),  # the deep MLPs are read and written by one launch
        ((FULL, FULL, TOKENS_ON_A_LINE, FULL, TOKENS_ON_A_LINE, FULL), 2 * 8 + 2),
        ((FULL, FULL, replace(DEEP, forecast=LINE)), 2 * 8),  # which reads none that it computes but the older
    ],
)
def test_a_forecast_takes_a_place_for_each_full_step_that_it_looks_back_on(
    steps: tuple[Step, ...], num_places: int
) -> None:
    assert lowered(forecasting(*steps)).cache_bytes == num_places * 6 * 16 * 32 * 4  # (R, N, D) in float32


def test_each_cache_is_kept_for_as_many_full_steps_as_its_own_forecasts_look_back_on() -> None:
    residual = replace(RESIDUAL, forecast=CURVE)
    parts = forecasting(FULL, FULL, FULL, reused(*LINE), residual, has_residual=True)
    assert writers_of(parts, "residual_cache.all") == {4: [2, 1, 0]}
    assert writers_of(parts, "mlp_cache.3") == {3: [2, 1]}
    assert lowered(parts).cache_bytes == (2 * 8 + 3) * 6 * 16 * 32 * 4


def test_the_weights_of_a_forecast_are_constants_shared_by_steps_of_the_same() -> None:
    program = lowered(forecasting(FULL, FULL, reused(*LINE), reused(2.0, -1.0), FULL, reused(*LINE)))
    places = {launch.step: launch.tensors["forecast"] for launch in program.launches if "forecast" in launch.tensors}
    weights = {step: constant_at(program, place) for step, place in places.items()}
    assert weights == {2: LINE, 3: (2.0, -1.0), 5: LINE}
    assert places[2] == places[5]
    assert places[2].shape == (2,)


def test_without_forecasts_every_full_step_writes_to_the_same_places() -> None:
    launches = step_launches(lowered(forecasting(FULL, FULL, FULL, REUSE)))
    assert len({launch.tensors["next_mlp_cache.3"] for launch in launches[:3]}) == 1


# token counts of each block

OF_BLOCKS: Final = tokens(((3, 7),))  # of the MLPs of blocks 2 and 3


def with_block_counts(parts: Lowerable, *steps: Step) -> Lowerable:
    """Return the parts with graphs that take a count for each block, and with these steps behind the first."""
    pipeline = replace(parts.pipeline, has_block_counts=True)
    others = parts.schedule.steps[1 + len(steps) :]
    return replace(
        parts,
        manifest=manifest_of(pipeline, graph_specs(pipeline, has_decoder=True, reads_size=True)),
        schedule=replace(parts.schedule, steps=(FULL, *steps, *others)),
    )


def test_each_block_reads_slots_for_its_own_count() -> None:
    program = lowered(with_block_counts(EXAMPLE, OF_BLOCKS))
    of_blocks, of_all = [launch for launch in program.launches if launch.engine == "tokens"][:2]
    assert of_blocks.sizes.items() >= {"K": 7, "K.mlp.2": 3, "K.mlp.3": 7}.items()
    assert of_all.sizes.items() >= {"K": 4, "K.mlp.2": 4, "K.mlp.3": 4}.items()  # one count stands for all
    shapes = [of_blocks.tensors[f"token_slots{block}"].shape for block in ("", ".mlp.2", ".mlp.3")]
    assert shapes == [(7,), (3,), (7,)]


def test_the_counts_of_blocks_keep_their_shares_at_every_size() -> None:
    step = tokens(((4,), (7,)))  # of cross-attention and MLP of block 1, of 16 tokens
    for size, counts in (((8, 8), (4, 7)), ((4, 8), (2, 4)), ((12, 16), (12, 21))):
        parts = with_block_counts(text_example(size=size), step)
        launch = next(launch for launch in lowered(parts).launches if launch.engine == "tokens")
        found = [launch.sizes[symbol] for symbol in ("K", "K.cross.1", "K.mlp.1")]
        assert found == [counts[1], *counts]


def test_counts_of_blocks_are_covered_by_a_profile_or_refused() -> None:
    parts = with_block_counts(EXAMPLE, OF_BLOCKS)
    covered = Profile({"K": (4, 7, 7), "K.mlp.2": (3, 4, 7), "K.mlp.3": (4, 7, 7)})
    assert lowered(with_profiles(parts, "tokens", covered)) == lowered(parts)
    with pytest.raises(ScheduleError, match=r"`tokens` with K\.mlp\.2 = 3, but the engine was built for K\.mlp\.2 = 4"):
        lowered(with_profiles(parts, "tokens", Profile({"K.mlp.2": (4, 4, 7)})))


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

TEXT_MODEL: Final = replace(MODEL, family="pixart")
TEXT_SELECTOR: Final = TokenSelector("cross_attention_entropy", 0.25, 0.6, 2, 0)
TEXT_PIPELINE: Final = replace(
    PIPELINE,
    model=TEXT_MODEL,
    num_blocks=2,
    width=48,
    branches=TEXT_BRANCHES,
    deep_start=1,
    selector=TEXT_SELECTOR,
    labels={},
    text=TextSpec(num_tokens=5),
    min_size=(4, 4),
    max_size=(12, 16),
    tile_size=8,
)


def text_example(pipeline: Pipeline = TEXT_PIPELINE, size: Size = (8, 8)) -> Lowerable:
    graphs = graph_specs(pipeline, has_decoder=True, reads_size=True)
    schedule = replace(EXAMPLE.schedule, model=TEXT_MODEL, deep_start=1, selector=pipeline.selector)
    return replace(EXAMPLE, manifest=manifest_of(pipeline, graphs), schedule=schedule, size=size)


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


# laws of every program


@examples(40)
@given(parts=lowerables())
def test_a_program_of_the_largest_size_takes_the_most_memory(parts: Lowerable) -> None:
    pipeline = parts.pipeline
    whole = [pipeline.max_size, pipeline.tile_of(pipeline.max_size)]  # what is tiled has no pictures in its workspace
    sizes = [size for size in whole if all(map(int.__le__, parts.size, size))]
    largest = max(lowered(replace(parts, size=size)).num_bytes for size in sizes)
    assert lowered(parts).num_bytes <= largest


@examples(40)
@given(parts=lowerables())
def test_a_program_is_aligned_where_the_entries_of_its_tables_are(parts: Lowerable) -> None:
    entry_bytes = 4 * parts.batch_size * parts.manifest.pipeline.rows_per_image * parts.manifest.pipeline.width
    program = lowered(parts)
    check_alignment(program, 4)  # an element of a table
    is_padded = parts.pipeline.text is not None  # its entries are
    if is_padded or entry_bytes % ALIGNMENT == 0 or len(parts.schedule.steps) == 1:
        check_alignment(program, ALIGNMENT)
    else:
        with pytest.raises(BundleError, match=r"behind a multiple of 256, .* must be a multiple of 64"):
            check_alignment(program, ALIGNMENT)


@examples(40)
@given(parts=lowerables())
def test_the_forwards_that_run_are_those_of_the_schedule(parts: Lowerable) -> None:
    chains = [parts.manifest.forwards[step.kind] for step in parts.schedule.steps]
    ran = [(launch.step, launch.engine) for launch in step_launches(lowered(parts))]
    assert ran == [(i, engine) for i, chain in enumerate(chains) for engine in chain]


@examples(40)
@given(parts=lowerables())
def test_a_launch_has_a_place_of_the_right_shape_for_each_input_and_output(parts: Lowerable) -> None:
    for launch in lowered(parts).launches:
        graph = parts.graphs[launch.engine]
        step = None if launch.step is None else parts.schedule.steps[launch.step]
        counts = {"K": 0} if step is None else parts.pipeline.selected_tokens(step, parts.size)
        symbols = parts.pipeline.symbols(parts.batch_size, len(parts.schedule.steps), parts.size) | counts
        specs = (*graph.inputs, *graph.outputs)
        assert launch.sizes == {symbol: symbols[symbol] for symbol in (*PROFILE_SYMBOLS, *counts)}
        assert list(launch.tensors) == [spec.name for spec in specs]
        found = [(place.shape, place.dtype) for place in launch.tensors.values()]
        assert found == [(spec.resolve(symbols), spec.dtype) for spec in specs]


@examples(40)
@given(parts=lowerables())
def test_no_launch_reads_what_was_not_written(parts: Lowerable) -> None:
    program = lowered(parts)
    written = [*program.inputs.values(), *(constant.place for constant in program.constants)]
    for launch in program.launches:
        reads, writes = reads_and_writes(launch, parts.graphs)
        assert [read for read in reads if not any(contains(place, read) for place in written)] == []
        written += writes


@examples(40)
@given(parts=lowerables())
def test_the_inputs_and_outputs_of_a_launch_do_not_overlap(parts: Lowerable) -> None:
    for launch in lowered(parts).launches:
        reads, writes = reads_and_writes(launch, parts.graphs)
        assert not any(overlap(read, write) for read in reads for write in writes)
        assert not any(overlap(a, b) for i, a in enumerate(writes) for b in writes[:i])


@examples(40)
@given(parts=lowerables())
def test_nothing_is_overwritten_before_it_was_read_for_the_last_time(parts: Lowerable) -> None:
    """Between the launch that writes a tensor and one that reads it, none writes there: what is alive lies apart."""
    program = lowered(parts)
    sides = [reads_and_writes(launch, parts.graphs) for launch in program.launches]
    before = [*program.inputs.values(), *(constant.place for constant in program.constants)]
    writes = [before, *(outputs for _, outputs in sides)]  # writes[i + 1] are those of launch i
    reads = [[], *(inputs for inputs, _ in sides), [*program.results.values()]]
    for reader, places in enumerate(reads):
        for place in places:
            writers = [i for i in range(reader) if any(contains(made, place) for made in writes[i])]
            between = [made for i in range(writers[-1] + 1, reader) for made in writes[i]]
            assert not any(overlap(made, place) for made in between)


@examples(40)
@given(parts=lowerables())
def test_constants_are_never_overwritten_and_lie_apart(parts: Lowerable) -> None:
    program = lowered(parts)
    constants = [constant.place for constant in program.constants]
    written = [place for launch in program.launches for place in reads_and_writes(launch, parts.graphs)[1]]
    others = [*written, *program.inputs.values()]
    assert not any(overlap(constant, place) for constant in constants for place in others)
    assert not any(overlap(a, b) for i, a in enumerate(constants) for b in constants[:i])
    sizes = [int(np.prod(place.shape, dtype=int)) for place in constants]
    assert [len(constant.values) for constant in program.constants] == sizes


def end_of(place: Placed) -> int:
    """Return where the next tensor begins."""
    return -(-place.end // ALIGNMENT) * ALIGNMENT


@examples(40)
@given(parts=lowerables())
def test_constants_and_then_inputs_lie_one_behind_the_other_from_the_start(parts: Lowerable) -> None:
    program = lowered(parts)
    staged = [*(constant.place for constant in program.constants), *program.inputs.values()]
    assert [place.offset for place in staged] == [0, *map(end_of, staged[:-1])]
    assert program.staged_bytes == end_of(staged[-1])


@examples(40)
@given(parts=lowerables())
def test_of_what_is_staged_launches_overwrite_the_first_state_alone(parts: Lowerable) -> None:
    """What engines write lies behind the staged bytes, but that the state goes back and forth between two places."""
    program = lowered(parts)
    written = [place for launch in program.launches for place in reads_and_writes(launch, parts.graphs)[1]]
    first_state = program.inputs["state"]
    assert all(place.offset >= program.staged_bytes or place == first_state for place in written if place.num_bytes)


@examples(40)
@given(parts=lowerables())
def test_whole_tensors_are_aligned(parts: Lowerable) -> None:
    program = lowered(parts)
    tables = set(table_names(parts.graphs))
    places = [*program.results.values(), *program.inputs.values()]
    places += [constant.place for constant in program.constants]
    for launch in program.launches:
        is_step = launch.step is not None
        places += [place for name, place in launch.tensors.items() if not (is_step and name in tables)]
    assert [place for place in places if place.offset % ALIGNMENT] == []


@examples(40)
@given(parts=lowerables())
def test_a_steps_vectors_are_its_entry_in_the_table_that_conditioning_wrote(parts: Lowerable) -> None:
    program = lowered(parts)
    tables = {name: program.launches[0].tensors[name] for name in table_names(parts.graphs)}
    for launch in step_launches(program):
        assert launch.step is not None
        for name in tables.keys() & launch.tensors.keys():
            table, entry = tables[name], launch.tensors[name]
            assert contains(table, entry)
            stride = table.num_bytes // len(parts.schedule.steps)
            assert entry.offset == table.offset + launch.step * stride
            assert entry.num_bytes <= stride < entry.num_bytes + ALIGNMENT


@examples(40)
@given(parts=lowerables())
def test_the_workspace_covers_everything(parts: Lowerable) -> None:
    program = lowered(parts)
    places = [place for launch in program.launches for place in launch.tensors.values()]
    places += [*program.results.values(), *program.inputs.values()]
    places += [constant.place for constant in program.constants]
    assert min(place.offset for place in places) >= 0
    assert max(place.end for place in places) <= program.num_bytes
    assert program.num_bytes % ALIGNMENT == 0


# a program against what it stands for: named tensors, where an output `next_x` replaces `x`


def made_up(engine: str, output: str, shape: tuple[int, ...], inputs: Mapping[str, Array]) -> Array:
    """Stand for an engine: numbers that depend on every number of every input, on their names, and on their place."""
    digest = zlib.crc32(f"{engine} {output}".encode())
    for name in sorted(inputs):
        digest = zlib.crc32(np.ascontiguousarray(inputs[name]).tobytes(), zlib.crc32(name.encode(), digest))
    return digest + np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape)


def one_full_step_older(tensors: Mapping[str, Array], order: int) -> dict[str, Array]:
    """Return caches by the names under which forecasts read them once another full step has run."""
    caches = [name for name in tensors if "_cache." in name and name.count(".") == 1]
    lines = [[name, *(f"{name}.{age}" for age in range(1, order + 1))] for name in caches]
    return {new: tensors[old] for line in lines for old, new in pairwise(line) if old in tensors}


def run_on_names(parts: Lowerable, given_by_request: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Run a schedule on a dictionary of tensors; returns what each launch reads."""
    schedule, table, graphs = parts.schedule, parts.table, parts.graphs
    num_steps = len(schedule.steps)
    tensors = dict(given_by_request)
    seen = []

    def launch(engine: str, symbols: dict[str, int]) -> None:
        inputs = {spec.name: tensors[spec.name] for spec in graphs[engine].inputs}
        seen.append(inputs)
        outputs = {s.name: made_up(engine, s.name, s.resolve(symbols), inputs) for s in graphs[engine].outputs}
        tensors.update({name.removeprefix("next_"): array for name, array in outputs.items()})

    pipeline = parts.pipeline
    symbols = pipeline.symbols(parts.batch_size, num_steps, parts.size)
    rows, columns = (side // pipeline.patch_size for side in parts.size)
    down, across = np.meshgrid(np.arange(rows) / rows, np.arange(columns) / columns, indexing="ij")
    tensors["timesteps"] = np.array(schedule.scheduler.timesteps)
    tensors["token_places"] = np.stack([down.ravel(), across.ravel()], axis=-1)
    tensors["picture_size"] = np.array(parts.size, dtype=np.float64) * pipeline.pixels_per_latent
    if pipeline.selector is not None and pipeline.selector.has_squares:
        side = pipeline.selector.spatial_size
        numbers = np.arange(rows * columns, dtype=np.float64).reshape(rows // side, side, columns // side, side)
        tensors["token_squares"] = numbers.swapaxes(1, 2).ravel()
    launch(CONDITIONING, symbols)
    width = pipeline.width
    entry_rows = symbols["R"] if pipeline.text is None else 1
    tables = {name: tensors[name].reshape(num_steps, entry_rows, 1, -1)[..., :width] for name in table_names(graphs)}
    for i, step in enumerate(schedule.steps):
        tensors |= {name: entries[i] for name, entries in tables.items()}
        tensors["coefficients"] = np.array(table.coefficients[i])
        tensors["input_scale"] = np.array(table.input_scale[i])
        tensors["forecast"] = np.array(step.forecast)
        for symbol, count in pipeline.selected_tokens(step, parts.size).items():
            tensors[slots_name(symbol)] = np.arange(count, dtype=np.float64)
        if step.forward is Forward.FULL:
            tensors |= one_full_step_older(tensors, schedule.order)
        for engine in parts.manifest.forwards[step.kind]:
            launch(engine, symbols)
    latents = tensors["state"][0]  # (B, N, P)
    is_decoded_whole = pipeline.tile_size is None or max(parts.size) <= pipeline.tile_size
    if VAE_DECODER in graphs and is_decoded_whole:
        patch = (pipeline.patch_size, pipeline.patch_size, pipeline.model.latent_shape[0])
        tensors["latents"] = latents.reshape(-1, rows, columns, *patch)
        launch(VAE_DECODER, symbols)
    seen.append({"latents": latents} | {name: tensors[name] for name in ("images",) if name in tensors})
    return seen


class Memory:
    """A workspace that holds one number for each word of 2 bytes; an int64 fills four words with the same number."""

    def __init__(self, num_bytes: int) -> None:
        self.words = np.arange(-(num_bytes // WORD), 0, dtype=np.float64)  # nobody writes negative numbers

    def _span(self, place: Placed) -> tuple[slice, int]:
        return slice(place.offset // WORD, place.end // WORD), WORDS[place.dtype]

    def write(self, place: Placed, values: Array) -> None:
        span, repeats = self._span(place)
        self.words[span] = np.repeat(np.broadcast_to(values, place.shape).ravel(), repeats)

    def read(self, place: Placed) -> Array:
        span, repeats = self._span(place)
        return self.words[span].copy()[::repeats].reshape(place.shape)


def run_on_places(parts: Lowerable, given_by_request: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Run a program on memory, knowing nothing but its places; returns what each launch reads."""
    program = lowered(parts)
    memory = Memory(program.num_bytes)
    for constant in program.constants:
        memory.write(constant.place, np.array(constant.values, dtype=np.float64).reshape(constant.place.shape))
    for name, place in program.inputs.items():
        memory.write(place, given_by_request[name])
    seen = []
    for launch in program.launches:
        reads, writes = names_of(parts.graphs[launch.engine])
        inputs = {name: memory.read(launch.tensors[name]) for name in reads}
        seen.append(inputs)
        for name in writes:
            place = launch.tensors[name]
            memory.write(place, made_up(launch.engine, name, place.shape, inputs))
    seen.append({name: memory.read(place) for name, place in program.results.items()})
    return seen


@examples(60)
@given(parts=lowerables())
def test_a_program_reads_at_its_places_what_the_schedule_reads_by_name(parts: Lowerable) -> None:
    places = lowered(parts).inputs
    request = {name: made_up("request", name, place.shape, {}) for name, place in places.items()}
    by_name, by_place = run_on_names(parts, request), run_on_places(parts, request)
    assert len(by_name) == len(by_place)
    for expected, found in zip(by_name, by_place, strict=True):
        assert expected.keys() == found.keys()
        assert [name for name in expected if not np.array_equal(expected[name], found[name])] == []


def test_the_solver_inputs_are_those_of_the_graphs() -> None:
    names = [spec.name for spec in EXAMPLE.graphs["full"].inputs]
    assert [name for name in names if name in SOLVER] == list(SOLVER)
