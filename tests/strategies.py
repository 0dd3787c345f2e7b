"""Hypothesis strategies for the artifacts: schedules, solver tables, pipelines with the graphs of their forwards.

Everything is drawn small: what is tested are relations between the parts, and no size makes those easier to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from hypothesis import settings
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import (
    CONDITIONING,
    FRONT,
    PRECISIONS,
    STEP_TABLE,
    VAE_DECODER,
    DType,
    GraphSpec,
    Precision,
    TensorSpec,
    WeightSpec,
)
from hemiola_runtime.manifest import BackendSpec, EngineSpec, FileSpec, Manifest, Profile
from hemiola_runtime.pipeline import Pipeline
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
Chains: TypeAlias = dict[str, tuple[str, ...]]  # forward → the engines that make it up

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


def graph_specs(pipeline: Pipeline, *, has_decoder: bool, precision: Precision = "fp32") -> dict[str, GraphSpec]:
    """Describe the graphs that export would write for a pipeline: `conditioning`, its forwards, perhaps a decoder.

    Written by hand from DESIGN §2, so that lowering can be tested without PyTorch; `test_forwards.py` compares it
    with what the modules themselves declare.
    """
    dtype = PRECISIONS[precision]
    conditioning: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]] = (
        (TensorSpec("labels", "int64", ("B",)), TensorSpec("timesteps", "float32", ("T",))),
        tuple(
            TensorSpec(spec.name, spec.dtype, (STEP_TABLE, pipeline.width))
            for spec in _vectors(pipeline, computed={(b, name) for b in _blocks(pipeline) for name in BRANCHES})
        ),
    )
    declared = {CONDITIONING: conditioning}
    declared |= {forward.value: _step_graph(pipeline, forward, dtype) for forward in forwards_of(pipeline)}
    if Forward.DEEP.value in declared:
        declared[FRONT] = _front_graph(pipeline, dtype)
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


def _shallow(pipeline: Pipeline) -> range:
    return range(pipeline.num_blocks if pipeline.deep_start is None else pipeline.deep_start)


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


def _caches(
    pipeline: Pipeline, dtype: DType, blocks: Iterable[int], branches: Iterable[str] = BRANCHES
) -> list[TensorSpec]:
    shape = ("R", pipeline.num_tokens, pipeline.width)
    names = list(branches)
    return [TensorSpec(f"{branch}_cache.{block}", dtype, shape) for block in blocks for branch in names]


def _state(pipeline: Pipeline) -> TensorSpec:
    return _f32("state", (pipeline.state_rows, "B", *pipeline.model.latent_shape))


def _front_graph(pipeline: Pipeline, dtype: DType) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """All vectors of the shallow blocks in; their caches out."""
    blocks = _shallow(pipeline)
    vectors = [f"{branch}_{kind}.{block}" for block in blocks for branch in BRANCHES for kind in VECTORS]
    inputs = [_state(pipeline), _f32("input_scale", ()), *(_f32(name, ("R", 1, pipeline.width)) for name in vectors)]
    return tuple(inputs), _nexts(_caches(pipeline, dtype, blocks))


def _nexts(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, name=f"next_{spec.name}") for spec in specs)


def _step_graph(
    pipeline: Pipeline, forward: Forward, dtype: DType
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    every, shallow = _blocks(pipeline), _shallow(pipeline)
    deep = range(len(shallow), pipeline.num_blocks)
    rows = pipeline.state_rows
    state = _state(pipeline)
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
        Forward.DEEP: _caches(pipeline, dtype, shallow),
        Forward.TOKENS: [TensorSpec("token_slots", "int64", ("K",)), *_caches(pipeline, dtype, every), *selection],
        Forward.REUSE: _caches(pipeline, dtype, every),
    }
    writes: dict[Forward, list[TensorSpec]] = {
        Forward.FULL: [*_caches(pipeline, dtype, every), *selection],
        Forward.DEEP: [*_caches(pipeline, dtype, deep), *selection],
        Forward.TOKENS: [*_caches(pipeline, dtype, deep, ["mlp"]), *selection[1:]],
        Forward.REUSE: [],
    }
    return (*common, *_vectors(pipeline, computed[forward]), *reads[forward]), _nexts([state, *writes[forward]])


def _f32(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    dtype: DType = "float32"
    return TensorSpec(name, dtype, shape)


def chains_of(graphs: Mapping[str, GraphSpec], *, is_segmented: bool) -> Chains:
    """Name the engines that make up each forward; in the segmented layout `full` is `front` followed by `deep`."""
    chains: Chains = {forward.value: (forward.value,) for forward in Forward if forward.value in graphs}
    return chains | {"full": (FRONT, "deep")} if is_segmented else chains


def manifest_of(
    pipeline: Pipeline,
    graphs: Mapping[str, GraphSpec],
    *,
    is_segmented: bool = False,
    precision: Precision = "fp32",
    max_batch_size: int = 4,
    profiles: Mapping[str, tuple[Profile, ...]] | None = None,
) -> Manifest:
    """Describe a bundle of these graphs; those that its layout leaves unused are not in it."""
    unused = "full" if is_segmented else FRONT
    tuned = {} if profiles is None else profiles
    engines = {
        name: EngineSpec(replace(graph, file=f"engines/{graph.file}"), "0" * 64, tuned.get(name, ()))
        for name, graph in graphs.items()
        if name != unused
    }
    schedule_files = {UNCACHED: "schedules/full.json", "fast": "schedules/fast.json"}
    paths = [*(engine.graph.file for engine in engines.values()), *schedule_files.values(), "engines/weights.bin"]
    return Manifest(
        schema=2,
        backend=BackendSpec("onnxruntime", "1.23.0"),
        pipeline=pipeline,
        precision=precision,
        max_batch_size=max_batch_size,
        engines=engines,
        forwards=chains_of(graphs, is_segmented=is_segmented),
        schedules=schedule_files,
        solvers={},
        files={path: FileSpec("0" * 64, 1) for path in paths},
        parity={},
        forward_parity={},
        made_by=MadeBy("", {}, None),
    )


@dataclass(frozen=True, slots=True)
class Lowerable:
    """What `lower` takes: parts that fit together.

    Attributes:
        manifest: of a small pipeline, with all engines that its forwards need.
        schedule: made for the pipeline.
        table: of the schedule's scheduler.
        batch_size: B.
    """

    manifest: Manifest
    schedule: Schedule
    table: SolverTable
    batch_size: int

    @property
    def pipeline(self) -> Pipeline:
        return self.manifest.pipeline

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        return self.manifest.graphs


@st.composite
def lowerables(draw: st.DrawFn) -> Lowerable:
    """Draw a bundle in any layout and precision, a schedule for it, a solver table and a batch size."""
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
    manifest = draw(plain_manifests(pipeline, max_batch_size=3))
    return Lowerable(manifest, schedule, table, draw(st.integers(1, 3)))


@st.composite
def plain_manifests(draw: st.DrawFn, pipeline: Pipeline, max_batch_size: int) -> Manifest:
    """Draw the layout and precision of a bundle, and whether it has a decoder."""
    precision = draw(st.sampled_from(list(PRECISIONS)))
    graphs = graph_specs(pipeline, has_decoder=draw(st.booleans()), precision=precision)
    is_segmented = "deep" in graphs and draw(st.booleans())
    return manifest_of(pipeline, graphs, is_segmented=is_segmented, precision=precision, max_batch_size=max_batch_size)


def profiles() -> st.SearchStrategy[Profile]:
    side = st.lists(st.integers(1, 64), min_size=3, max_size=3).map(sorted).map(tuple)
    return st.builds(Profile, sides=st.dictionaries(st.sampled_from(["B", "K", "T"]), side))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Draw the manifest of a bundle whose parts fit together."""
    plain = draw(plain_manifests(draw(pipelines()), draw(st.integers(1, 64))))
    weights = WeightSpec("weight", draw(st.sampled_from(["float32", "float16", "bfloat16", "int64"])), (2, 3), 256)
    engines = {
        name: EngineSpec(
            replace(
                engine.graph,
                sha256=draw(digests()),
                weights=draw(st.sampled_from([(), (weights,)])),
                activation_bytes_per_row=draw(st.integers(0, 1 << 40)),
            ),
            draw(digests()),
            tuple(draw(st.lists(profiles(), max_size=2))),
        )
        for name, engine in plain.engines.items()
    }
    solver_files = {draw(st.text("0123456789abcdef", min_size=16, max_size=16)): "solvers/DDIM-50.json"}
    return replace(
        plain,
        backend=BackendSpec(
            "onnxruntime",
            draw(st.text("0123456789.", max_size=8)),
            draw(st.none() | text()),
            tuple(draw(st.lists(text(), max_size=2))),
            draw(st.booleans()),
        ),
        engines=engines,
        solvers=solver_files,
        files={
            path: FileSpec(draw(digests()), draw(st.integers(0, 1 << 40)))
            for path in (*plain.files, *solver_files.values())
        },
        parity=draw(st.dictionaries(st.sampled_from(list(plain.schedules)), finite())),
        forward_parity=draw(st.dictionaries(st.sampled_from(list(plain.forwards)), finite())),
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
