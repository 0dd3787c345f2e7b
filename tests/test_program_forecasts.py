"""Programs whose steps forecast, and those whose blocks have token counts of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.manifest import Profile
from hemiola_runtime.program import (
    Placed,
)
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    RESIDUAL,
    REUSE,
    Forward,
    Step,
    tokens,
)
from programs import (
    EXAMPLE,
    PIPELINE,
    SCHEDULER,
    SELECTOR,
    constant_at,
    lowered,
    step_launches,
    text_example,
    with_profiles,
)
from strategies import (
    Lowerable,
    forwards_of,
    graph_specs,
    manifest_of,
)

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
