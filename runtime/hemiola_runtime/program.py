"""Lowering: a schedule and the engines of a bundle become a program, a flat list of launches with every place fixed.

Pure functions over descriptions; nothing here loads, allocates or runs. A static schedule needs no decision at run
time, so the loop that runs a program contains none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from hemiola_runtime.errors import BundleError, ScheduleError
from hemiola_runtime.graphs import CONDITIONING, ITEMSIZE, STEP_TABLE, VAE_DECODER, DType, TensorSpec, slots_name
from hemiola_runtime.manifest import PROFILE_SYMBOLS, Manifest
from hemiola_runtime.schedule import Forward, Schedule, Step
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
        step: which model evaluation this is part of; None for conditioning and decoder.
        sizes: the number behind each free symbol of the shapes; K is 0 without selected tokens, and K of one block
            is there only with them.
        tensors: where each input and output of the engine lies.
    """

    engine: str
    step: int | None
    sizes: Mapping[str, int]
    tensors: Mapping[str, Placed]


@dataclass(frozen=True, slots=True)
class Constant:
    """Numbers that stand in the workspace before the first launch and are never overwritten."""

    place: Placed
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """What runs a schedule for one batch size and one size of pictures; or one engine alone.

    Constants lie at the start of the workspace and inputs behind them, so that each is written in one copy.

    Attributes:
        launches: in order.
        constants: written when the program is the first on a workspace, or another has used it since.
        inputs: what every request writes: `state` (row 0 the initial latents, the others zero), what images are drawn
            of, `guidance`.
        results: what is read back: `latents` (B, N, P), and `images` if a decoder runs.
        staged_bytes: of constants and inputs, from the start of the workspace.
        num_bytes: of the workspace.
    """

    launches: tuple[Launch, ...]
    constants: tuple[Constant, ...]
    inputs: Mapping[str, Placed]
    results: Mapping[str, Placed]
    staged_bytes: int
    num_bytes: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches, second places of those that are read and written by one launch included."""
        named = ((name, place) for launch in self.launches for name, place in launch.tensors.items())
        return sum(place.num_bytes for place in {place for name, place in named if "_cache." in name})


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


def check_alignment(program: Program, alignment: int) -> None:
    """Make sure that every tensor lies where a backend can read it.

    Raises:
        BundleError: one does not: an entry of a table that conditioning writes, whose entries follow each other.
    """
    for launch in program.launches:
        for name, place in launch.tensors.items():
            if place.offset % alignment:
                raise BundleError(
                    f"`{launch.engine}` reads {name} {place.offset % alignment} bytes behind a multiple of "
                    f"{alignment}, where its backend wants it: rows times width of the model must be a multiple of "
                    f"{alignment // 4}. Build for another backend"
                )


def lower(
    manifest: Manifest, schedule: Schedule, table: SolverTable, batch_size: int, size: tuple[int, int] | None = None
) -> Program:
    """Lower a schedule for one batch size and one size of pictures.

    An output `next_x` takes the place of `x`. Where the same launch also reads `x`, it goes to a second place and the
    two swap roles, since no backend promises to read and write one tensor in place.

    Args:
        manifest: of the bundle.
        schedule: checked against the pipeline.
        table: of the schedule's scheduler, with the pipeline's number of state rows.
        batch_size: B.
        size: (H, W) in latents, within the pipeline's; None for its default.

    Raises:
        ScheduleError: an engine was not built for the sizes that the schedule asks for.
    """
    return _Lowering(manifest, schedule, table, batch_size, size or manifest.pipeline.size).run()


def lower_alone(manifest: Manifest, engine: str, batch_size: int, size: tuple[int, int] | None = None) -> Program:
    """Lower one engine that runs by itself: its inputs are a request's, its outputs the results."""
    graph = manifest.graphs[engine]
    symbols = manifest.pipeline.symbols(batch_size, 0, size)
    layout = _Layout()
    inputs = {spec.name: layout.place(spec.resolve(symbols), spec.dtype) for spec in graph.inputs}
    staged_bytes = layout.num_bytes
    results = {spec.name: layout.place(spec.resolve(symbols), spec.dtype) for spec in graph.outputs}
    sizes = {symbol: symbols[symbol] for symbol in PROFILE_SYMBOLS}
    launch = Launch(engine, None, sizes, inputs | results)
    return Program((launch,), (), inputs, results, staged_bytes, layout.num_bytes)


class _Lowering:
    """The state of one lowering: which tensor lies where by now."""

    def __init__(
        self, manifest: Manifest, schedule: Schedule, table: SolverTable, batch_size: int, size: tuple[int, int]
    ) -> None:
        self.manifest = manifest
        self.graphs = manifest.graphs
        self.schedule = schedule
        self.table = table
        self.size = size
        self.layout = _Layout()
        self.symbols = manifest.pipeline.symbols(batch_size, len(schedule.steps), size)
        self.current: dict[str, Placed] = {}  # where each tensor is now
        self.history = {  # caches of full steps before the last, which forecasts read
            spec.name: spec
            for kind in schedule.kinds
            for engine in manifest.forwards[kind]
            for spec in self.graphs[engine].inputs
            if "_cache." in spec.name and spec.name.count(".") == 2
        }
        self.spare: dict[str, Placed] = {}  # its second place, if it is ever read and written by one launch
        self.constants: list[Constant] = []

    def run(self) -> Program:
        conditioning = self.graphs[CONDITIONING]
        conditions = {spec.name for spec in conditioning.outputs}
        tables = {spec.name for spec in conditioning.outputs if spec.shape[0] in ("T", STEP_TABLE)}
        per_step_specs, request_specs = self._first_step(tables, conditions)
        fixed = self._fixed_conditions()
        per_step = {name: self._solver_places(per_step_specs[name]) for name in SOLVER}
        selections, forecasts = self._selections(), self._forecasts()
        asked = {spec.name: self._place(spec) for spec in conditioning.inputs if spec.name not in fixed}
        inputs = asked | {name: self._place(spec) for name, spec in sorted(request_specs.items())}
        staged_bytes = self.layout.num_bytes
        self.current = {name: place for name, place in inputs.items() if name in request_specs}

        launches = [self._launch(CONDITIONING, None, fixed | asked)]
        per_step |= {name: self._entries(per_step_specs[name]) for name in sorted(tables)}
        for i, step in enumerate(self.schedule.steps):
            given = {name: places[i] for name, places in per_step.items()}
            counts = self.manifest.pipeline.selected_tokens(step, self.size)
            given |= selections.get(step, {}) | forecasts.get(step.forecast, {})
            if step.forward is Forward.FULL:
                self._age_caches()
            launches += [self._launch(engine, i, given, counts) for engine in self.manifest.forwards[step.kind]]
        state = self.current["state"]
        results = {"latents": Placed(state.offset, state.shape[1:], state.dtype)}
        if VAE_DECODER in self.graphs and not self.manifest.pipeline.is_tiled(self.size):
            spec = self._input(VAE_DECODER, "latents")
            latents = Placed(state.offset, spec.resolve(self.symbols), state.dtype)
            launches.append(self._launch(VAE_DECODER, None, {"latents": latents}))
            results["images"] = launches[-1].tensors["images"]
        return Program(tuple(launches), tuple(self.constants), inputs, results, staged_bytes, self.layout.num_bytes)

    def _first_step(
        self, tables: set[str], conditions: set[str]
    ) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Sort what the first step reads: what is new at every step, and what only a request can give."""
        per_step: dict[str, TensorSpec] = {}
        request: dict[str, TensorSpec] = {}
        written: set[str] = set()
        for engine in self.manifest.forwards[self.schedule.steps[0].kind]:
            for spec in self.graphs[engine].inputs:
                if spec.name in tables or spec.name in SOLVER:
                    per_step[spec.name] = spec
                elif spec.name not in written and spec.name not in conditions:
                    request[spec.name] = spec
            written |= {spec.name.removeprefix("next_") for spec in self.graphs[engine].outputs}
        return per_step, request

    def _input(self, engine: str, name: str) -> TensorSpec:
        return next(spec for spec in self.graphs[engine].inputs if spec.name == name)

    def _place(self, spec: TensorSpec) -> Placed:
        return self.layout.place(spec.resolve(self.symbols), spec.dtype)

    def _constant(self, spec: TensorSpec, values: tuple[float, ...]) -> Placed:
        place = self._place(spec)
        self.constants.append(Constant(place, values))
        return place

    def _fixed_conditions(self) -> dict[str, Placed]:
        """Place what conditioning reads that no request changes: timesteps, and where tokens lie in a picture."""
        rows, columns = self.manifest.pipeline.grid_of(self.size)
        height, width, _ = self.manifest.pipeline.image_shape(self.size)
        values = {
            "timesteps": self.schedule.scheduler.timesteps,
            "token_places": tuple(
                side for i in range(rows) for j in range(columns) for side in (i / rows, j / columns)
            ),
            "picture_size": (height, width),
        }
        specs = [spec for spec in self.graphs[CONDITIONING].inputs if spec.name in values]
        return {spec.name: self._constant(spec, values[spec.name]) for spec in specs}

    def _entries(self, spec: TensorSpec) -> list[Placed]:
        """Return where each step's entry lies in a table that conditioning wrote, one behind the other."""
        table, num_steps = self.current[spec.name], len(self.schedule.steps)
        entry = Placed(table.offset, spec.resolve(self.symbols), spec.dtype)
        return [replace(entry, offset=entry.offset + i * table.num_bytes // num_steps) for i in range(num_steps)]

    def _solver_places(self, spec: TensorSpec) -> list[Placed]:
        """Place each step's numbers of the solver table, as constants."""
        if spec.name == "input_scale":
            return [self._constant(spec, (scale,)) for scale in self.table.input_scale]
        return [self._constant(spec, tuple(w for row in rows for w in row)) for rows in self.table.coefficients]

    def _selections(self) -> dict[Step, dict[str, Placed]]:
        """Place what `tokens` reads to select so many tokens: inputs whose lengths are the counts."""
        pipeline = self.manifest.pipeline
        counts = {s: pipeline.selected_tokens(s, self.size) for s in self.schedule.steps if s.tokens is not None}
        if not counts or pipeline.selector is None:
            return {}
        squares = {}
        if pipeline.selector.has_squares:
            order = tuple(map(float, tokens_by_square(pipeline.grid_of(self.size), pipeline.selector.spatial_size)))
            squares["token_squares"] = self._constant(TensorSpec("token_squares", "int64", (len(order),)), order)
        most = max(count for by_symbol in counts.values() for count in by_symbol.values())
        slots = self._constant(TensorSpec("token_slots", "int64", (most,)), tuple(range(most)))  # all begin alike
        return {
            step: squares | {slots_name(symbol): replace(slots, shape=(count,)) for symbol, count in by_symbol.items()}
            for step, by_symbol in counts.items()
        }

    def _forecasts(self) -> dict[tuple[float, ...], dict[str, Placed]]:
        """Place the weights of every forecast."""
        distinct = dict.fromkeys(step.forecast for step in self.schedule.steps if step.forecast)
        specs = {weights: TensorSpec("forecast", "float32", (len(weights),)) for weights in distinct}
        return {weights: {"forecast": self._constant(spec, weights)} for weights, spec in specs.items()}

    def _age_caches(self) -> None:
        """Before a full step: what was a cache becomes the one of a full step before, as forecasts read it.

        The place of the oldest, or a new one, becomes that of the newest, which nothing reads any more.
        """
        for name in [name for name in self.current if "_cache." in name and f"{name}.1" in self.history]:
            older = (f"{name}.{age}" for age in range(1, self.schedule.order + 1))
            line = [name, *(known for known in older if known in self.history)]
            places = [self.current[known] for known in line if known in self.current]
            oldest = places.pop() if len(places) == len(line) else self._place(self.history[line[1]])
            self.current |= dict(zip(line, [oldest, *places], strict=False))

    def _launch(
        self, engine: str, step: int | None, given: Mapping[str, Placed], counts: Mapping[str, int] | None = None
    ) -> Launch:
        graph = self.graphs[engine]
        sizes = {symbol: self.symbols[symbol] for symbol in PROFILE_SYMBOLS} | dict(counts or {})
        self._check_profiles(engine, sizes)
        tensors: dict[str, Placed] = {}
        for spec in graph.inputs:
            assert spec.name in given or spec.name in self.current, (
                f"step {step}: `{engine}` reads {spec.name}, which nothing has written"
            )
            tensors[spec.name] = given[spec.name] if spec.name in given else self.current[spec.name]
        following = {}
        for spec in graph.outputs:
            name = spec.name.removeprefix("next_")
            if name in tensors:
                following[name] = self.spare.pop(name) if name in self.spare else self._place(spec)
                self.spare[name] = self.current[name]
            else:
                following[name] = self.current[name] if name in self.current else self._place(spec)
            tensors[spec.name] = following[name]
        self.current |= following
        return Launch(engine, step, sizes, tensors)

    def _check_profiles(self, engine: str, sizes: Mapping[str, int]) -> None:
        profiles = self.manifest.engines[engine].profiles
        if not profiles or any(profile.covers(sizes) for profile in profiles):
            return
        asked = ", ".join(f"{symbol} = {sizes[symbol]}" for symbol in profiles[0].sides)
        built = "; ".join(
            ", ".join(f"{symbol} = {least} … {most}" for symbol, (least, _, most) in profile.sides.items())
            for profile in profiles
        )
        raise ScheduleError(
            f"the schedule runs `{engine}` with {asked}, but the engine was built for {built} "
            "(B images, K selected tokens, T model evaluations, N tokens). Export with this schedule among the others, "
            "and build again"
        )


def tokens_by_square(grid: tuple[int, int], size: int) -> list[int]:
    """Return the tokens of a grid (rows, columns), row by row, in the order of squares of some size."""
    rows, columns = grid
    return [
        (top + i) * columns + left + j
        for top in range(0, rows, size)
        for left in range(0, columns, size)
        for i in range(size)
        for j in range(size)
    ]
