"""Programs: the launches of a trajectory, by an example that can be followed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hemiola_runtime.program import (
    Placed,
)
from programs import (
    EXAMPLE,
    PIPELINE,
    SCHEDULER,
    SEGMENTED,
    constant_at,
    lowered,
    step_launches,
    with_graph,
)
from strategies import (
    graph_specs,
    manifest_of,
)


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
