"""What holds for every program, and programs against what they stand for."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from hemiola_runtime.errors import BundleError
from hemiola_runtime.graphs import CONDITIONING, VAE_DECODER, slots_name
from hemiola_runtime.manifest import PROFILE_SYMBOLS
from hemiola_runtime.program import (
    SOLVER,
    Placed,
    check_alignment,
)
from hemiola_runtime.schedule import (
    Forward,
)
from programs import (
    ALIGNMENT,
    EXAMPLE,
    WORD,
    WORDS,
    contains,
    lowered,
    names_of,
    overlap,
    reads_and_writes,
    step_launches,
    table_names,
)
from strategies import (
    Lowerable,
    examples,
    lowerables,
)

Array = NDArray[np.float64]


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
