"""Hypothesis strategies for the artifacts: schedules, solver tables, pipelines with the graphs of their forwards.

Everything is drawn small: what is tested are relations between the parts, and no size makes those easier to see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from hypothesis import settings
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.manifest import (
    CONDITIONING,
    STEP_TABLE,
    UNCACHED,
    VAE_DECODER,
    BackendSpec,
    DType,
    EngineSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    Pipeline,
    TensorSpec,
    WeightSpec,
)
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
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

Guidance: TypeAlias = Literal["classifier_free", "none"]

VECTORS: Final = ("shift", "gain", "gate")  # of a branch of a block, in the order of the graphs' inputs
BRANCHES: Final = ("attention", "mlp")


def examples(count: int) -> settings:
    """Return the settings of a property test: so many examples, and no deadline, since the machine may be shared."""
    return settings(max_examples=count, deadline=None)


def finite() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


def text() -> st.SearchStrategy[str]:
    """Draw what UTF-8 can hold: half a surrogate pair is refused."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def digests() -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=64, max_size=64)


def json_values() -> st.SearchStrategy[Any]:
    """Whatever a JSON file can hold, a few levels deep."""
    leaves = st.one_of(st.none(), st.booleans(), st.integers(), finite(), text())
    return st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text(), inner, max_size=3)),
        max_leaves=6,
    )


def made_by() -> st.SearchStrategy[MadeBy]:
    return st.builds(
        MadeBy,
        command=text(),
        versions=st.dictionaries(text(), text(), max_size=2),
        git_revision=st.none() | st.text("0123456789abcdef", min_size=12, max_size=12),
    )


def model_identities() -> st.SearchStrategy[ModelIdentity]:
    side = st.integers(1, 8)
    return st.builds(
        ModelIdentity,
        family=st.sampled_from(["dit", "pixart"]),
        name=text(),
        weights_sha256=digests(),
        latent_shape=st.tuples(st.integers(1, 4), side, side),
    )


def scheduler_identities(num_evaluations: int | None = None) -> st.SearchStrategy[SchedulerIdentity]:
    """Describe a scheduler of so many model evaluations, or of 1 to 12."""
    least, most = (1, 12) if num_evaluations is None else (num_evaluations, num_evaluations)
    return st.builds(
        SchedulerIdentity,
        class_name=st.sampled_from(["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]),
        config=st.dictionaries(text(), json_values(), max_size=3),
        num_inference_steps=st.integers(1, 50),
        timesteps=st.lists(finite(), min_size=least, max_size=most).map(tuple),
    )


def selectors() -> st.SearchStrategy[TokenSelector]:
    weight = st.floats(0, 4)
    return st.builds(
        TokenSelector,
        score=st.sampled_from(["attention", "value_norm", "output_norm", "random"]),
        staleness_weight=weight,
        spatial_bonus=weight,
        spatial_size=st.integers(1, 4),
        seed=st.integers(0, 2**32),
    )


def steps(max_tokens: int) -> st.SearchStrategy[Step]:
    return st.sampled_from([FULL, DEEP, REUSE]) | st.integers(1, max_tokens).map(tokens)


@st.composite
def schedules(draw: st.DrawFn, *, num_blocks: int = 4, num_tokens: int = 16, max_steps: int = 12) -> Schedule:
    """Draw any valid schedule for a model of so many blocks and tokens."""
    following = draw(st.lists(steps(num_tokens), max_size=max_steps - 1))
    kinds = {step.forward for step in following}
    is_deep = bool(kinds & {Forward.DEEP, Forward.TOKENS})
    return Schedule(
        schema=1,
        model=draw(model_identities()),
        scheduler=draw(scheduler_identities(1 + len(following))),
        guidance=draw(st.sampled_from(["classifier_free", "none"])),
        deep_start=draw(st.integers(0, num_blocks)) if is_deep else None,
        selector=draw(selectors()) if Forward.TOKENS in kinds else None,
        steps=(FULL, *following),
        found_by=FoundBy(
            strategy=draw(text()),
            arguments=draw(st.dictionaries(text(), json_values(), max_size=2)),
            seed=draw(st.integers(0, 2**32)),
            made_by=draw(made_by()),
        ),
        measured=draw(st.dictionaries(text(), finite(), max_size=2)),
    )


@st.composite
def solver_tables(
    draw: st.DrawFn, *, scheduler: SchedulerIdentity | None = None, state_rows: int | None = None
) -> SolverTable:
    """Draw a table of arbitrary numbers, of a given scheduler and a given number of state rows, or of any."""
    identity = draw(scheduler_identities()) if scheduler is None else scheduler
    rows = draw(st.integers(1, 3)) if state_rows is None else state_rows
    count = len(identity.timesteps)
    row = st.lists(finite(), min_size=rows + 1, max_size=rows + 1).map(tuple)
    matrix = st.lists(row, min_size=rows, max_size=rows).map(tuple)
    return SolverTable(
        schema=1,
        scheduler=identity,
        init_noise_sigma=draw(finite()),
        input_scale=tuple(draw(st.lists(finite(), min_size=count, max_size=count))),
        coefficients=tuple(draw(st.lists(matrix, min_size=count, max_size=count))),
        residual=draw(finite()),
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Draw a small pipeline; `deep_start` and `selector` are given or not as schedules without them would have it."""
    num_blocks = draw(st.integers(1, 3))
    deep_start = draw(st.none() | st.integers(0, num_blocks))
    model = draw(model_identities())
    _, height, width = model.latent_shape
    return Pipeline(
        model=model,
        guidance=draw(st.sampled_from(["classifier_free", "none"])),
        num_blocks=num_blocks,
        width=draw(st.sampled_from([1, 3, 16, 64])),
        num_tokens=draw(st.integers(1, 6)),
        branches=BRANCHES,
        state_rows=draw(st.integers(1, 3)),
        deep_start=deep_start,
        selector=None if deep_start is None else draw(st.none() | selectors()),
        labels={str(i): name for i, name in enumerate(draw(st.lists(text(), min_size=1, max_size=3)))},
        image_shape=(height, width, draw(st.sampled_from([1, 3]))),
    )


def graph_specs(pipeline: Pipeline, *, has_decoder: bool) -> dict[str, GraphSpec]:
    """Describe the graphs that export would write for a pipeline: `conditioning`, its forwards, perhaps a decoder.

    Written by hand from DESIGN §2, so that lowering can be tested without PyTorch; `test_forwards.py` compares it
    with what the modules themselves declare.
    """
    conditioning: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = (
        (TensorSpec("labels", "int64", ("B",)), TensorSpec("timesteps", "float32", ("T",))),
        tuple(
            TensorSpec(spec.name, spec.dtype, (STEP_TABLE, pipeline.width))
            for spec in _vectors(pipeline, computed={(b, name) for b in _blocks(pipeline) for name in BRANCHES})
        ),
    )
    declared = {CONDITIONING: conditioning}
    declared |= {forward.value: _step_graph(pipeline, forward) for forward in forwards_of(pipeline)}
    if has_decoder:
        latents = TensorSpec("latents", "float32", ("B", *pipeline.model.latent_shape))
        declared[VAE_DECODER] = ((latents,), (TensorSpec("images", "float32", ("B", *pipeline.image_shape)),))
    return {
        name: GraphSpec(name, f"{name}.onnx", "0" * 64, inputs, outputs, (), 1024)
        for name, (inputs, outputs) in declared.items()
    }


def forwards_of(pipeline: Pipeline) -> list[Forward]:
    """Return the forwards that can be exported with the pipeline's `deep_start` and selector."""
    return [
        forward
        for forward in Forward
        if (forward is not Forward.DEEP or pipeline.deep_start is not None)
        and (forward is not Forward.TOKENS or pipeline.selector is not None)
    ]


def _blocks(pipeline: Pipeline) -> range:
    return range(pipeline.num_blocks)


def _vectors(pipeline: Pipeline, computed: set[tuple[int, str]]) -> list[TensorSpec]:
    """Gates of all branches, shift and gain of those that are computed, and the head's two."""
    names = [
        f"{branch}_{kind}.{block}"
        for block in _blocks(pipeline)
        for branch in BRANCHES
        for kind in VECTORS
        if kind == "gate" or (block, branch) in computed
    ]
    return [TensorSpec(name, "float32", ("R", 1, pipeline.width)) for name in (*names, "head_shift", "head_gain")]


def _caches(pipeline: Pipeline, blocks: Iterable[int], branches: Iterable[str] = BRANCHES) -> list[TensorSpec]:
    shape = ("R", pipeline.num_tokens, pipeline.width)
    names = list(branches)
    return [TensorSpec(f"{branch}_cache.{block}", "float32", shape) for block in blocks for branch in names]


def _step_graph(pipeline: Pipeline, forward: Forward) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    every = _blocks(pipeline)
    start = pipeline.num_blocks if pipeline.deep_start is None else pipeline.deep_start
    shallow, deep = range(start), range(start, pipeline.num_blocks)
    rows = pipeline.state_rows
    state = TensorSpec("state", "float32", (rows, "B", *pipeline.model.latent_shape))
    common = [state, _f32("coefficients", (rows, rows + 1)), _f32("input_scale", ())]
    if pipeline.guidance == "classifier_free":
        common.append(_f32("guidance", ("B",)))
    shape = (len(deep), "B", pipeline.num_tokens)
    selection = [] if pipeline.selector is None else [_f32("scores", shape), _f32("staleness", shape)]
    everything = {(block, branch) for block in every for branch in BRANCHES}
    computed: dict[Forward, set[tuple[int, str]]] = {
        Forward.FULL: everything,
        Forward.DEEP: {(block, branch) for block, branch in everything if block in deep},
        Forward.TOKENS: {(block, branch) for block, branch in everything if block in deep and branch == "mlp"},
        Forward.REUSE: set(),
    }
    reads: dict[Forward, list[TensorSpec]] = {
        Forward.FULL: [],
        Forward.DEEP: _caches(pipeline, shallow),
        Forward.TOKENS: [TensorSpec("token_slots", "int64", ("K",)), *_caches(pipeline, every), *selection],
        Forward.REUSE: _caches(pipeline, every),
    }
    writes: dict[Forward, list[TensorSpec]] = {
        Forward.FULL: [*_caches(pipeline, every), *selection],
        Forward.DEEP: [*_caches(pipeline, deep), *selection],
        Forward.TOKENS: [*_caches(pipeline, deep, ["mlp"]), *selection[1:]],
        Forward.REUSE: [],
    }
    outputs = tuple(TensorSpec(f"next_{s.name}", s.dtype, s.shape) for s in (state, *writes[forward]))
    return (*common, *_vectors(pipeline, computed[forward]), *reads[forward]), outputs


def _f32(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    dtype: DType = "float32"
    return TensorSpec(name, dtype, shape)


@dataclass(frozen=True, slots=True)
class Lowerable:
    """What `lower` takes: parts that fit together.

    Attributes:
        pipeline: small.
        graphs: all that its forwards need.
        schedule: made for the pipeline.
        table: of the schedule's scheduler.
        batch_size: B.
    """

    pipeline: Pipeline
    graphs: dict[str, GraphSpec]
    schedule: Schedule
    table: SolverTable
    batch_size: int


@st.composite
def lowerables(draw: st.DrawFn) -> Lowerable:
    """Draw a pipeline, a schedule for it, a solver table and a batch size."""
    pipeline = draw(pipelines())
    choices = {
        Forward.FULL: st.just(FULL),
        Forward.DEEP: st.just(DEEP),
        Forward.TOKENS: st.integers(1, pipeline.num_tokens).map(tokens),
        Forward.REUSE: st.just(REUSE),
    }
    step = st.one_of([choices[forward] for forward in forwards_of(pipeline)])
    following = draw(st.lists(step, max_size=8))
    kinds = {step.forward for step in following}
    scheduler = SchedulerIdentity(
        "DDIMScheduler", {}, 1 + len(following), tuple(float(t) for t in range(len(following), -1, -1))
    )
    schedule = Schedule(
        schema=1,
        model=pipeline.model,
        scheduler=scheduler,
        guidance=pipeline.guidance,
        deep_start=pipeline.deep_start if kinds & {Forward.DEEP, Forward.TOKENS} else None,
        selector=pipeline.selector if Forward.TOKENS in kinds else None,
        steps=(FULL, *following),
        found_by=FoundBy("drawn", {}, 0, MadeBy("", {}, None)),
        measured={},
    )
    rows = pipeline.state_rows
    count = len(schedule.steps)
    weights = [  # every number another, so that one in the wrong place is seen
        tuple(tuple(float(1000 * i + 10 * r + c) for c in range(rows + 1)) for r in range(rows)) for i in range(count)
    ]
    table = SolverTable(1, scheduler, 1.0, tuple(0.5 + i for i in range(count)), tuple(weights), 0.0)
    return Lowerable(
        pipeline, graph_specs(pipeline, has_decoder=draw(st.booleans())), schedule, table, draw(st.integers(1, 3))
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Draw the manifest of a bundle whose parts fit together."""
    pipeline = draw(pipelines())
    graphs = graph_specs(pipeline, has_decoder=draw(st.booleans()))
    weights = WeightSpec("weight", draw(st.sampled_from(["float32", "int64"])), (2, 3), 256)
    engines = {
        name: EngineSpec(
            GraphSpec(
                graph.name,
                f"engines/{graph.file}",
                draw(digests()),
                graph.inputs,
                graph.outputs,
                draw(st.sampled_from([(), (weights,)])),
                draw(st.integers(0, 1 << 40)),
            ),
            draw(digests()),
        )
        for name, graph in graphs.items()
    }
    schedule_files = {UNCACHED: "schedules/full.json", "fast": "schedules/fast.json"}
    solver_files = {draw(st.text("0123456789abcdef", min_size=16, max_size=16)): "solvers/DDIM-50.json"}
    paths = [
        *(engine.graph.file for engine in engines.values()),
        *schedule_files.values(),
        *solver_files.values(),
        "engines/weights.bin",
    ]
    return Manifest(
        schema=1,
        backend=BackendSpec("onnxruntime", draw(st.text("0123456789.", max_size=8))),
        pipeline=pipeline,
        precision="fp32",
        max_batch_size=draw(st.integers(1, 64)),
        engines=engines,
        schedules=schedule_files,
        solvers=solver_files,
        files={path: FileSpec(draw(digests()), draw(st.integers(0, 1 << 40))) for path in paths},
        parity=draw(st.dictionaries(st.sampled_from(list(schedule_files)), finite())),
        made_by=draw(made_by()),
    )


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """Draw a copy of parsed JSON in which one to three places were replaced, removed, doubled or added to."""
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        data = _mutated_once(draw, data)
    return data


def _mutated_once(draw: st.DrawFn, data: Any) -> Any:
    if isinstance(data, dict) and data and draw(st.integers(0, 9)):  # mostly go deeper
        key = draw(st.sampled_from(list(data)))
        deed = draw(st.sampled_from(["descend", "descend", "descend", "remove", "rename", "add"]))
        if deed == "descend":
            return data | {key: _mutated_once(draw, data[key])}
        if deed == "add":
            return data | {draw(text()): draw(json_values())}
        rest = {k: v for k, v in data.items() if k != key}
        return rest if deed == "remove" else rest | {draw(text()): data[key]}
    if isinstance(data, list) and data and draw(st.integers(0, 9)):
        i = draw(st.integers(0, len(data) - 1))
        deed = draw(st.sampled_from(["descend", "descend", "descend", "remove", "double"]))
        middle = {"descend": [_mutated_once(draw, data[i])], "remove": [], "double": [data[i], data[i]]}[deed]
        return [*data[:i], *middle, *data[i + 1 :]]
    return draw(json_values())
