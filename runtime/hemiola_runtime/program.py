"""Lowering: a schedule and the engines of a bundle become a program, a flat list of launches with every place fixed.

Pure functions over descriptions; nothing here loads, allocates or runs. A static schedule needs no decision at run
time, so the loop that runs a program contains none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from hemiola_runtime.manifest import (
    CONDITIONING,
    ITEMSIZE,
    STEP_TABLE,
    VAE_DECODER,
    DType,
    GraphSpec,
    Pipeline,
    TensorSpec,
)
from hemiola_runtime.schedule import Forward, Schedule
from hemiola_runtime.solver_table import SolverTable

ALIGNMENT: Final = 256  # of every tensor's address, in bytes, as TensorRT wants it
SOLVER: Final = ("coefficients", "input_scale")  # inputs of every step that come from the solver table


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor at a fixed place of a workspace.

    Attributes:
        offset: bytes from the start of the workspace.
        shape: of the tensor; it is contiguous.
        dtype: of its elements.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def end(self) -> int:
        """The byte behind its last."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of one engine on tensors at fixed places.

    Attributes:
        engine: its name.
        step: which model evaluation this is; None for conditioning and decoder.
        tensors: where each input and output of the engine lies.
    """

    engine: str
    step: int | None
    tensors: Mapping[str, Placed]


@dataclass(frozen=True, slots=True)
class Constant:
    """Numbers that stand in the workspace before the first launch and are never overwritten."""

    place: Placed
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """What runs a schedule for one batch size.

    Attributes:
        launches: in order.
        constants: written once, when the program is bound to a workspace.
        inputs: what every request writes: `state` (row 0 the initial latents, the others zero), `labels`, `guidance`.
        latents: where the final latents are.
        images: where the decoded images are; None without a decoder.
        num_bytes: of the workspace.
    """

    launches: tuple[Launch, ...]
    constants: tuple[Constant, ...]
    inputs: Mapping[str, Placed]
    latents: Placed
    images: Placed | None
    num_bytes: int


class _Layout:
    """Hands out places one behind the other."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def place(self, shape: tuple[int, ...], dtype: DType) -> Placed:
        placed = Placed(self.num_bytes, shape, dtype)
        self.num_bytes = _aligned(placed.end)
        return placed


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def lower(
    pipeline: Pipeline, graphs: Mapping[str, GraphSpec], schedule: Schedule, table: SolverTable, batch_size: int
) -> Program:
    """Lower a schedule for one batch size.

    An output `next_x` takes the place of `x`. Where the same launch also reads `x`, it goes to a second place and the
    two swap roles, since no backend promises to read and write one tensor in place.

    Args:
        pipeline: of the bundle.
        graphs: descriptions of the engines, by name.
        schedule: checked against the pipeline.
        table: of the schedule's scheduler, with the pipeline's number of state rows.
        batch_size: B.
    """
    return _Lowering(pipeline, graphs, schedule, table, batch_size).run()


class _Lowering:
    """The state of one lowering: which tensor lies where by now."""

    def __init__(
        self,
        pipeline: Pipeline,
        graphs: Mapping[str, GraphSpec],
        schedule: Schedule,
        table: SolverTable,
        batch_size: int,
    ) -> None:
        self.graphs = graphs
        self.schedule = schedule
        self.table = table
        self.layout = _Layout()
        self.symbols = pipeline.symbols(batch_size, len(schedule.steps))
        self.current: dict[str, Placed] = {}  # where each tensor is now
        self.spare: dict[str, Placed] = {}  # its second place, if it is ever read and written by one launch
        self.constants: list[Constant] = []
        self.slots: dict[int, Placed] = {}

    def run(self) -> Program:
        launches = [self._conditioning()]
        first_step = {spec.name: spec for spec in self.graphs[Forward.FULL.value].inputs}
        tables = [spec.name for spec in self.graphs[CONDITIONING].outputs if spec.shape[0] == STEP_TABLE]
        per_step = {name: self._entries(first_step[name]) for name in tables}
        per_step |= {name: self._solver_places(first_step[name]) for name in SOLVER}
        inputs = {"labels": launches[0].tensors["labels"]}
        for name in sorted(first_step.keys() - per_step.keys()):  # what else the first step reads is the request's
            inputs[name] = self.current[name] = self._place(first_step[name])
        for i, step in enumerate(self.schedule.steps):
            given = {name: per_step[name][i] for name in self._reads(step.forward.value) if name in per_step}
            if step.tokens is not None:
                given["token_slots"] = self._token_slots(step.tokens)
            launches.append(self._launch(step.forward.value, i, given))
        state = self.current["state"]
        latents = Placed(state.offset, state.shape[1:], state.dtype)
        images = None
        if VAE_DECODER in self.graphs:
            launches.append(self._launch(VAE_DECODER, None, {"latents": latents}))
            images = launches[-1].tensors["images"]
        return Program(
            tuple(launches), tuple(self.constants), inputs, latents, images, max(self.layout.num_bytes, ALIGNMENT)
        )

    def _reads(self, engine: str) -> list[str]:
        return [spec.name for spec in self.graphs[engine].inputs]

    def _place(self, spec: TensorSpec) -> Placed:
        return self.layout.place(spec.resolve(self.symbols), spec.dtype)

    def _conditioning(self) -> Launch:
        timesteps = tuple(self.schedule.scheduler.timesteps)
        given = {spec.name: self._place(spec) for spec in self.graphs[CONDITIONING].inputs}
        self.constants.append(Constant(given["timesteps"], timesteps))
        return self._launch(CONDITIONING, None, given)

    def _entries(self, spec: TensorSpec) -> list[Placed]:
        """Return where each step's entry lies in a table that conditioning wrote, one behind the other."""
        entry = Placed(self.current[spec.name].offset, spec.resolve(self.symbols), spec.dtype)
        return [replace(entry, offset=entry.offset + i * entry.num_bytes) for i in range(len(self.schedule.steps))]

    def _solver_places(self, spec: TensorSpec) -> list[Placed]:
        """Place each step's numbers of the solver table, as constants."""
        places = [self._place(spec) for _ in self.schedule.steps]
        for i, place in enumerate(places):
            if spec.name == "input_scale":
                values: tuple[float, ...] = (self.table.input_scale[i],)
            else:
                values = tuple(weight for row in self.table.coefficients[i] for weight in row)
            self.constants.append(Constant(place, values))
        return places

    def _token_slots(self, count: int) -> Placed:
        if count not in self.slots:
            self.slots[count] = self.layout.place((count,), "int64")
            self.constants.append(Constant(self.slots[count], tuple(range(count))))
        return self.slots[count]

    def _launch(self, engine: str, step: int | None, given: Mapping[str, Placed]) -> Launch:
        graph = self.graphs[engine]
        tensors = dict(given)
        reads = self._reads(engine)
        for spec in graph.inputs:
            if spec.name not in tensors:
                assert spec.name in self.current, (
                    f"step {step}: `{engine}` reads {spec.name}, which nothing has written"
                )
                tensors[spec.name] = self.current[spec.name]
        following = {}
        for spec in graph.outputs:
            name = spec.name.removeprefix("next_")
            if name in reads:
                following[name] = self.spare.pop(name) if name in self.spare else self._place(spec)
                self.spare[name] = self.current[name]
            else:
                following[name] = self.current[name] if name in self.current else self._place(spec)
            tensors[spec.name] = following[name]
        self.current |= following
        return Launch(engine, step, {spec.name: tensors[spec.name] for spec in (*graph.inputs, *graph.outputs)})
