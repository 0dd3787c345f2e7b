from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.manifest import CONDITIONING, STEP_TABLE, VAE_DECODER, GraphSpec, Pipeline
from hemiola_runtime.program import SOLVER, Launch, Placed, Program, lower
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    REUSE,
    Forward,
    FoundBy,
    ModelIdentity,
    Schedule,
    SchedulerIdentity,
    TokenSelector,
    tokens,
)
from hemiola_runtime.solver_table import SolverTable
from strategies import Lowerable, examples, graph_specs, lowerables

Array = NDArray[np.float64]

WORD: Final = 4  # bytes; the smallest element of a tensor
ALIGNMENT: Final = 256  # bytes; what TensorRT asks of every address that is bound


def lowered(parts: Lowerable) -> Program:
    return lower(parts.pipeline, parts.graphs, parts.schedule, parts.table, parts.batch_size)


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
    return [spec.name for spec in graphs[CONDITIONING].outputs if spec.shape[0] == STEP_TABLE]


def step_launches(program: Program) -> list[Launch]:
    return [launch for launch in program.launches if launch.step is not None]


# an example that can be followed by hand

MODEL: Final = ModelIdentity("dit", "tiny", "00" * 32, (4, 8, 8))
SELECTOR: Final = TokenSelector("value_norm", 0.25, 0.0, 1, 0)
PIPELINE: Final = Pipeline(
    MODEL, "classifier_free", 4, 32, 16, ("attention", "mlp"), 2, 2, SELECTOR, {"0": "zero"}, image_shape=(16, 16, 3)
)
STEPS: Final = (FULL, REUSE, tokens(4), DEEP, tokens(7), tokens(4))
SCHEDULER: Final = SchedulerIdentity("DDIMScheduler", {}, 6, (900.0, 750.0, 600.0, 450.0, 300.0, 150.0))
EXAMPLE: Final = Lowerable(
    pipeline=PIPELINE,
    graphs=graph_specs(PIPELINE, has_decoder=True),
    schedule=Schedule(
        1,
        MODEL,
        SCHEDULER,
        "classifier_free",
        2,
        SELECTOR,
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
)


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


def test_token_slots_are_numbered_and_shared_by_steps_of_one_count() -> None:
    program = lowered(EXAMPLE)
    slots = [launch.tensors["token_slots"] for launch in program.launches if launch.engine == "tokens"]
    assert [place.shape for place in slots] == [(4,), (7,), (4,)]
    assert slots[0] == slots[2]
    assert constant_at(program, slots[0]) == (0, 1, 2, 3)
    assert constant_at(program, slots[1]) == (0, 1, 2, 3, 4, 5, 6)


def test_a_request_writes_state_labels_and_guidance() -> None:
    program = lowered(EXAMPLE)
    shapes = {name: (place.shape, place.dtype) for name, place in program.inputs.items()}
    assert shapes == {
        "state": ((2, 3, 4, 8, 8), "float32"),
        "labels": ((3,), "int64"),
        "guidance": ((3,), "float32"),
    }


def test_without_guidance_a_request_writes_state_and_labels() -> None:
    pipeline = replace(PIPELINE, guidance="none")
    parts = replace(
        EXAMPLE,
        pipeline=pipeline,
        graphs=graph_specs(pipeline, has_decoder=True),
        schedule=replace(EXAMPLE.schedule, guidance="none"),
    )
    assert set(lowered(parts).inputs) == {"state", "labels"}


def test_the_latents_are_row_0_of_the_last_state() -> None:
    program = lowered(EXAMPLE)
    last = program.launches[-2].tensors["next_state"]
    assert program.latents == Placed(last.offset, (3, 4, 8, 8), "float32")
    assert program.launches[-1].tensors["latents"] == program.latents
    assert program.images == program.launches[-1].tensors["images"]


def test_without_a_decoder_there_are_no_images() -> None:
    graphs = {name: graph for name, graph in EXAMPLE.graphs.items() if name != VAE_DECODER}
    program = lowered(replace(EXAMPLE, graphs=graphs))
    assert program.images is None
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
    graphs = EXAMPLE.graphs | {"full": replace(full, outputs=outputs)}
    with pytest.raises(AssertionError, match=r"step 1: `reuse` reads mlp_cache\.1, which nothing has written"):
        lowered(replace(EXAMPLE, graphs=graphs))


def test_a_placed_tensor_knows_its_size() -> None:
    place = Placed(512, (2, 3), "int64")
    assert (place.num_bytes, place.end) == (2 * 3 * 8, 512 + 48)


# laws of every program


@examples(40)
@given(parts=lowerables())
def test_the_forwards_that_run_are_those_of_the_schedule(parts: Lowerable) -> None:
    launches = step_launches(lowered(parts))
    assert [launch.step for launch in launches] == list(range(len(parts.schedule.steps)))
    assert [Forward(launch.engine) for launch in launches] == [step.forward for step in parts.schedule.steps]


@examples(40)
@given(parts=lowerables())
def test_a_launch_has_a_place_of_the_right_shape_for_each_input_and_output(parts: Lowerable) -> None:
    for launch in lowered(parts).launches:
        graph = parts.graphs[launch.engine]
        step = None if launch.step is None else parts.schedule.steps[launch.step]
        count = 0 if step is None or step.tokens is None else step.tokens
        symbols = parts.pipeline.symbols(parts.batch_size, len(parts.schedule.steps), count)
        specs = (*graph.inputs, *graph.outputs)
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
    reads = [[], *(inputs for inputs, _ in sides), [program.latents, *([program.images] if program.images else [])]]
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


@examples(40)
@given(parts=lowerables())
def test_whole_tensors_are_aligned(parts: Lowerable) -> None:
    program = lowered(parts)
    tables = set(table_names(parts.graphs))
    places = [program.latents, *program.inputs.values(), *(constant.place for constant in program.constants)]
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
            assert len(parts.schedule.steps) * entry.num_bytes == table.num_bytes
            assert entry.offset == table.offset + launch.step * entry.num_bytes


@examples(40)
@given(parts=lowerables())
def test_the_workspace_covers_everything(parts: Lowerable) -> None:
    program = lowered(parts)
    places = [place for launch in program.launches for place in launch.tensors.values()]
    places += [program.latents, *program.inputs.values(), *(constant.place for constant in program.constants)]
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

    symbols = parts.pipeline.symbols(parts.batch_size, num_steps)
    tensors["timesteps"] = np.array(schedule.scheduler.timesteps)
    launch(CONDITIONING, symbols)
    tables = {name: tensors[name].reshape(num_steps, symbols["R"], 1, -1) for name in table_names(graphs)}
    for i, step in enumerate(schedule.steps):
        tensors |= {name: entries[i] for name, entries in tables.items()}
        tensors["coefficients"] = np.array(table.coefficients[i])
        tensors["input_scale"] = np.array(table.input_scale[i])
        if step.tokens is not None:
            tensors["token_slots"] = np.arange(step.tokens, dtype=np.float64)
        launch(step.forward.value, symbols)
    tensors["latents"] = tensors["state"][0]
    if VAE_DECODER in graphs:
        launch(VAE_DECODER, symbols)
    seen.append({name: tensors[name] for name in ("latents", "images") if name in tensors})
    return seen


class Memory:
    """A workspace that holds one number for each word of 4 bytes; an int64 fills two words with the same number."""

    def __init__(self, num_bytes: int) -> None:
        self.words = np.arange(-(num_bytes // WORD), 0, dtype=np.float64)  # nobody writes negative numbers

    def _span(self, place: Placed) -> tuple[slice, int]:
        return slice(place.offset // WORD, place.end // WORD), {"float32": 1, "int64": 2}[place.dtype]

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
    final = {"latents": program.latents} | ({} if program.images is None else {"images": program.images})
    seen.append({name: memory.read(place) for name, place in final.items()})
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
