"""Hypothesis strategies for the artifacts: schedules, solver tables, pipelines with the graphs of their forwards.

Everything is drawn small: what is tested are relations between the parts, and no size makes those easier to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from hypothesis import settings
from hypothesis import strategies as st

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.graph_set import TOKENIZER_FILE, UNCACHED
from hemiola_runtime.graphs import (
    CONDITIONING,
    FRONT,
    PRECISIONS,
    STEP_TABLE,
    TEXT_ENCODER,
    VAE_DECODER,
    DType,
    GraphSpec,
    Precision,
    TensorSpec,
    WeightSpec,
    slots_name,
)
from hemiola_runtime.manifest import PROFILE_SYMBOLS, BackendSpec, EngineSpec, FileSpec, Manifest, Profile
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.schedule import (
    FULL,
    KINDS,
    Forward,
    FoundBy,
    ModelIdentity,
    Schedule,
    SchedulerIdentity,
    Step,
    TokenSelector,
)
from hemiola_runtime.solver_table import SolverTable

Guidance: TypeAlias = Literal["classifier_free", "none"]
Chains: TypeAlias = dict[str, tuple[str, ...]]  # forward → the engines that make it up
Specs: TypeAlias = tuple[TensorSpec, ...]
Size: TypeAlias = tuple[int, int]  # (H, W) of latents

VECTORS: Final = ("shift", "gain", "gate")  # of a branch of a block, in the order of the graphs' inputs
BRANCHES: Final = ("attention", "mlp")  # those with a gate, and all there are where images are drawn of labels
TEXT_BRANCHES: Final = ("attention", "cross", "mlp")
MAX_ORDER: Final = 2  # of the forecasts that are drawn: one history, and one behind another
TABLE_WIDTH: Final = 64  # where images are drawn of prompts, entries of tables are padded to multiples of it


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


def selectors(*, max_spatial_size: int = 4) -> st.SearchStrategy[TokenSelector]:
    weight = st.floats(0, 4)
    return st.builds(
        TokenSelector,
        score=st.sampled_from(["attention", "value_norm", "output_norm", "cross_attention_entropy", "random"]),
        staleness_weight=weight,
        spatial_bonus=weight,
        spatial_size=st.integers(1, max_spatial_size),
        seed=st.integers(0, 2**32),
    )


def masks(num_branches: int, num_blocks: int) -> st.SearchStrategy[tuple[str, ...]]:
    """Draw what `masked` computes: one branch of one block at least."""
    of_branch = st.text("x.", min_size=num_blocks, max_size=num_blocks)
    drawn = st.lists(of_branch, min_size=num_branches, max_size=num_branches)
    return drawn.filter(lambda mask: "x" in "".join(mask)).map(tuple)


def block_counts(num_tokens: int, num_branches: int, num_blocks: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """Draw a token count for each branch of each deep block."""
    of_branch = st.lists(st.integers(1, num_tokens), min_size=num_blocks, max_size=num_blocks).map(tuple)
    return st.lists(of_branch, min_size=num_branches, max_size=num_branches).map(tuple)


def forecasts(max_order: int) -> st.SearchStrategy[tuple[float, ...]]:
    """Draw the weights of a forecast that looks back on so many full steps before the last; or none."""
    weight = st.floats(-4, 4)
    weights = st.lists(weight, min_size=1, max_size=max_order)
    return st.just(()) | st.tuples(st.floats(0.5, 4), weights).map(lambda drawn: (drawn[0], *drawn[1]))


@st.composite
def steps(
    draw: st.DrawFn, forwards: Sequence[Forward], counts: st.SearchStrategy[Any], max_steps: int
) -> tuple[Step, ...]:
    """Draw the steps of a schedule, the first of which is `full`, with token counts and forecasts."""
    drawn = [FULL]
    for _ in range(max_steps - draw(st.integers(1, max_steps))):
        forward = draw(st.sampled_from([Forward.FULL, *forwards]))  # twice: forecasts look back on several
        order = 0 if forward is Forward.FULL else min(MAX_ORDER, drawn.count(FULL) - 1)
        forecast = draw(forecasts(order)) if order else ()
        drawn.append(Step(forward, draw(counts) if forward is Forward.TOKENS else None, forecast))
    return tuple(drawn)


@st.composite
def schedules(
    draw: st.DrawFn,
    *,
    num_blocks: int = 4,
    num_tokens: int = 16,
    max_steps: int = 12,
    deep_start: int | None = None,
) -> Schedule:
    """Draw any valid schedule for a model of so many blocks and tokens, two branches a block; deep from some block."""
    first = draw(st.integers(0, num_blocks)) if deep_start is None else deep_start
    counts: st.SearchStrategy[Any] = st.integers(1, num_tokens)
    if first < num_blocks:
        counts |= block_counts(num_tokens, 1, num_blocks - first)
    drawn = draw(steps(list(Forward), counts, max_steps))
    kinds = {step.forward for step in drawn}
    is_deep = bool(kinds & {Forward.DEEP, Forward.TOKENS})
    return Schedule(
        schema=2,
        model=draw(model_identities()),
        scheduler=draw(scheduler_identities(len(drawn))),
        guidance=draw(st.sampled_from(["classifier_free", "none"])),
        deep_start=first if is_deep else None,
        selector=draw(selectors()) if Forward.TOKENS in kinds else None,
        mask=draw(masks(2, num_blocks)) if Forward.MASKED in kinds else None,
        steps=drawn,
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
    """Draw a small pipeline, of labels and one size or of prompts and several.

    `deep_start`, `selector` and `mask` are given or not as schedules without them would have it.
    """
    num_blocks = draw(st.integers(1, 3))
    richest = draw(st.sampled_from(["tokens of each block", "tokens", "deep", "reuse"]))
    deep_start = None if richest == "reuse" else draw(st.integers(0, num_blocks))
    selector = draw(selectors(max_spatial_size=2)) if richest.startswith("tokens") else None
    width = draw(st.sampled_from([1, 3, 16, 64]))
    patch_size = draw(st.integers(1, 2))
    text_spec = draw(st.none() | st.builds(TextSpec, num_tokens=st.integers(1, 3)))
    unit = side_unit(patch_size, selector)
    side = st.integers(1, 3).map(lambda count: unit * count)
    ranges = side.map(lambda n: [n] * 3) if text_spec is None else st.lists(side, min_size=3, max_size=3).map(sorted)
    (least_h, height, most_h), (least_w, across, most_w) = draw(ranges), draw(ranges)
    model = draw(model_identities())
    tiles = st.integers(1, max(most_h, most_w) // patch_size).map(lambda count: patch_size * count)
    names = [] if text_spec is not None else draw(st.lists(text(), min_size=1, max_size=3))
    branches = BRANCHES if text_spec is None else TEXT_BRANCHES
    return Pipeline(
        model=replace(
            model,
            family="dit" if text_spec is None else "pixart",
            latent_shape=(model.latent_shape[0], height, across),
        ),
        guidance=draw(st.sampled_from(["classifier_free", "none"])),
        num_blocks=num_blocks,
        width=width,
        patch_size=patch_size,
        branches=branches,
        state_rows=draw(st.integers(1, 3)),
        deep_start=deep_start,
        selector=selector,
        mask=draw(st.none() | masks(len(branches), num_blocks)),
        has_block_counts=richest == "tokens of each block",
        labels={str(i): name for i, name in enumerate(names)},
        text=text_spec,
        min_size=(least_h, least_w),
        max_size=(most_h, most_w),
        pixels_per_latent=draw(st.integers(1, 2)),
        image_channels=draw(st.sampled_from([1, 3])),
        tile_size=draw(st.none() | tiles),
        guidance_scale=draw(finite()),
    )


def side_unit(patch_size: int, selector: TokenSelector | None) -> int:
    """Return what divides both sides of all pictures, in latents: a patch, or a square of them."""
    return patch_size * (selector.spatial_size if selector is not None and selector.has_squares else 1)


def sizes_of(pipeline: Pipeline) -> st.SearchStrategy[Size]:
    """Draw a size of the pictures that a pipeline can draw."""
    unit = side_unit(pipeline.patch_size, pipeline.selector)

    def side(least: int, most: int) -> st.SearchStrategy[int]:
        return st.integers(least // unit, most // unit).map(lambda count: unit * count)

    heights, widths = zip(pipeline.min_size, pipeline.max_size, strict=True)
    return st.tuples(side(*heights), side(*widths))


def graph_specs(
    pipeline: Pipeline,
    *,
    has_decoder: bool,
    precision: Precision = "fp32",
    num_heads: int = 1,
    reads_size: bool = False,
    max_order: int = 0,
    forwards: Sequence[Forward] | None = None,
) -> dict[str, GraphSpec]:
    """Describe the graphs that export would write for a pipeline: `conditioning`, its steps, perhaps a decoder.

    Steps are of some forwards, None for `forwards_of` the pipeline, with forecasts of order `max_order` at most. Of a
    pipeline that draws prompts also the text encoder; `reads_size` is whether it is conditioned on the size of
    pictures. Written by hand from DESIGN §2, so that lowering can be tested without PyTorch; `test_forwards.py`
    compares it with what the modules themselves declare.
    """
    exported = forwards_of(pipeline) if forwards is None else list(forwards)
    graphs = _Declarations(pipeline, PRECISIONS[precision], num_heads, exported)
    declared: dict[str, tuple[Specs, Specs]] = {CONDITIONING: graphs.conditioning(reads_size=reads_size)}
    for forward in exported:
        declared[forward.value] = graphs.step(forward, 0)
        for order in range(1, 1 if forward is Forward.FULL else max_order + 1):
            declared[f"{forward.value}_{order}"] = graphs.step(forward, order)
    if Forward.DEEP.value in declared:
        declared[FRONT] = graphs.front()
    if pipeline.text is not None:
        declared[TEXT_ENCODER] = graphs.text_encoder(pipeline.text)
    if has_decoder:
        declared[VAE_DECODER] = graphs.decoder()
    return {
        name: GraphSpec(name, f"{name}.onnx", "0" * 64, inputs, outputs, (), 1024)
        for name, (inputs, outputs) in declared.items()
    }


def forwards_of(pipeline: Pipeline) -> list[Forward]:
    """Return the forwards that can be exported with the pipeline's `deep_start`, selector and mask; not `residual`."""
    return [
        forward
        for forward in Forward
        if (forward is not Forward.DEEP or pipeline.deep_start is not None)
        and (forward is not Forward.TOKENS or pipeline.selector is not None)
        and (forward is not Forward.MASKED or pipeline.mask is not None)
        and forward is not Forward.RESIDUAL
    ]


class _Declarations:
    """What the graphs of a pipeline read and write, in the order in which they do."""

    def __init__(self, pipeline: Pipeline, dtype: DType, num_heads: int, forwards: Sequence[Forward]) -> None:
        self.pipeline = pipeline
        self.keeps_layers = bool(set(forwards) - {Forward.FULL, Forward.RESIDUAL})
        self.keeps_residual = Forward.RESIDUAL in forwards
        self.dtype = dtype
        self.num_heads = num_heads
        self.every = range(pipeline.num_blocks)
        self.shallow = range(pipeline.num_blocks if pipeline.deep_start is None else pipeline.deep_start)
        self.deep = range(len(self.shallow), pipeline.num_blocks)
        self.is_one_size = pipeline.has_one_size
        self.num_tokens: int | str = pipeline.num_tokens if self.is_one_size else "N"
        patch = pipeline.patch_size**2 * pipeline.model.latent_shape[0]
        self.state = _f32("state", (pipeline.state_rows, "B", self.num_tokens, patch))

    def conditioning(self, *, reads_size: bool) -> tuple[Specs, Specs]:
        """Labels or prompts in, with all that does not change; a table for each vector out, positions, contexts."""
        width, text = self.pipeline.width, self.pipeline.text
        given: Specs = (TensorSpec("labels", "int64", ("B",)),)
        entry: tuple[str, int] = (STEP_TABLE, width)
        if text is not None:
            prompts = ("B", self.pipeline.rows_per_image, text.num_tokens)
            given = (_f32("text_embeddings", (*prompts, width)), _f32("text_mask", prompts))
            given += (_f32("token_places", (self.num_tokens, 2)),)
            given += (_f32("picture_size", (2,)),) if reads_size else ()
            entry = ("T", -(-width // TABLE_WIDTH) * TABLE_WIDTH)
        computed = {(block, branch) for block in self.every for branch in self.pipeline.branches}
        tables = tuple(_f32(spec.name, entry) for spec in self._vectors(self.every, computed, has_head=True))
        return (*given, _f32("timesteps", ("T",))), (*tables, *self._positions(), *self._contexts(computed))

    def front(self) -> tuple[Specs, Specs]:
        """All vectors of the shallow blocks in; their caches out."""
        computed = {(block, branch) for block in self.shallow for branch in self.pipeline.branches}
        vectors = self._vectors(self.shallow, computed, has_head=False)
        inputs = (self.state, _f32("input_scale", ()), *vectors, *self._positions(), *self._contexts(computed))
        return inputs, _nexts(self._caches("shallow"))

    def step(self, forward: Forward, order: int) -> tuple[Specs, Specs]:
        pipeline = self.pipeline
        rows = pipeline.state_rows
        common = [self.state, _f32("coefficients", (rows, rows + 1)), _f32("input_scale", ())]
        if pipeline.guidance == "classifier_free":
            common.append(_f32("guidance", ("B",)))
        if order:
            common.append(_f32("forecast", (order + 1,)))
        selection = self._selection()
        shallow, deep = self._caches("shallow"), self._caches("deep")
        read_shallow, read_deep = _with_older(shallow, order), _with_older(deep, order)
        tokens = ("R", self.num_tokens, pipeline.width)
        residual = [_f32("residual_cache.all", tokens)] if self.keeps_residual else []
        older_residual = _with_older(residual, order)[len(residual) :]  # to correct what is computed
        everything = {(block, branch) for block in self.every for branch in pipeline.branches}
        computed: dict[Forward, set[tuple[int, str]]] = {
            Forward.FULL: everything,
            Forward.DEEP: {(block, branch) for block, branch in everything if block in self.deep},
            Forward.MASKED: {(block, branch) for block, branch in everything if self._is_in_mask(block, branch)},
            Forward.TOKENS: {(b, branch) for b, branch in everything if b in self.deep and branch != "attention"},
            Forward.REUSE: set(),
            Forward.RESIDUAL: set(),
        }
        masked = {f"{branch}_cache.{block}" for block, branch in computed[Forward.MASKED]}
        reads: dict[Forward, list[TensorSpec]] = {
            Forward.FULL: [],
            Forward.DEEP: [*read_shallow, *_with_older([*deep, *residual], order)[len(deep) + len(residual) :]],
            Forward.MASKED: [s for s in (*read_shallow, *read_deep, *older_residual) if s.name not in masked],
            Forward.TOKENS: [
                *(*self._slots(), *self._squares(), *read_shallow, *read_deep, *older_residual, *selection)
            ],
            Forward.REUSE: [*read_shallow, *read_deep],
            Forward.RESIDUAL: [*residual, *older_residual],
        }
        recomputed = [spec for spec in deep if not spec.name.startswith("attention_cache.")]
        writes: dict[Forward, list[TensorSpec]] = {
            Forward.FULL: [*([*shallow, *deep] if self.keeps_layers else []), *residual, *selection],
            Forward.DEEP: [*deep, *residual, *selection],
            Forward.MASKED: [*(spec for spec in (*shallow, *deep) if spec.name in masked), *residual],
            Forward.TOKENS: [*recomputed, *residual, *selection[1:]],
            Forward.REUSE: [],
            Forward.RESIDUAL: [],
        }
        summed = range(0) if forward is Forward.RESIDUAL else self.every
        vectors = self._vectors(summed, computed[forward], has_head=True)
        conditions = (*vectors, *self._positions(), *self._contexts(computed[forward]))
        return (*common, *conditions, *reads[forward]), _nexts([self.state, *writes[forward]])

    def text_encoder(self, text: TextSpec) -> tuple[Specs, Specs]:
        """One prompt at a time."""
        prompt = (1, text.num_tokens)
        return (
            (TensorSpec("token_ids", "int64", prompt), _f32("text_mask", prompt)),
            (_f32("text_embeddings", (*prompt, self.pipeline.width)),),
        )

    def decoder(self) -> tuple[Specs, Specs]:
        """Latents of whole pictures or of tiles in, in patches; pictures out."""
        pipeline, size = self.pipeline, self.pipeline.tile_of(self.pipeline.size)
        grid: tuple[int | str, ...] = pipeline.grid_of(size) if self.is_one_size else ("rows", "columns")
        sides: tuple[int | str, ...] = pipeline.image_shape(size)[:2] if self.is_one_size else ("height", "width")
        patch = (pipeline.patch_size, pipeline.patch_size, pipeline.model.latent_shape[0])
        return (_f32("latents", ("B", *grid, *patch)),), (_f32("images", ("B", *sides, pipeline.image_channels)),)

    def _vectors(self, blocks: range, computed: set[tuple[int, str]], *, has_head: bool) -> list[TensorSpec]:
        """Gates of all branches that have one, shift and gain of those that are computed, and the head's two."""
        names = [
            f"{branch}_{kind}.{block}"
            for block in blocks
            for branch in BRANCHES
            for kind in VECTORS
            if kind == "gate" or (block, branch) in computed
        ]
        rows: int | str = "R" if self.pipeline.text is None else 1
        heads = ("head_shift", "head_gain") if has_head else ()
        return [_f32(name, (rows, 1, self.pipeline.width)) for name in (*names, *heads)]

    def _positions(self) -> Specs:
        return () if self.pipeline.text is None else (_f32("positions", (self.num_tokens, self.pipeline.width)),)

    def _contexts(self, computed: set[tuple[int, str]]) -> Specs:
        """What cross-attention reads of the prompt, where it is computed."""
        blocks = sorted(block for block, branch in computed if branch == "cross")
        if self.pipeline.text is None or not blocks:
            return ()
        tokens = self.pipeline.text.num_tokens
        heads = ("R", self.num_heads, tokens, self.pipeline.width // self.num_heads)
        of_blocks = [TensorSpec(f"text_{kind}.{i}", self.dtype, heads) for i in blocks for kind in ("keys", "values")]
        return (*of_blocks, TensorSpec("text_bias", self.dtype, ("R", 1, 1, tokens)))

    def _caches(self, part: Literal["shallow", "deep"]) -> list[TensorSpec]:
        """One for each branch of a block; but one sum for those without a gate, where none of its rows is replaced."""
        blocks = self.shallow if part == "shallow" else self.deep
        is_summed = self.pipeline.mask is None and (part == "shallow" or self.pipeline.selector is None)
        branches = [branch for branch in self.pipeline.branches if branch in BRANCHES or not is_summed]
        shape = ("R", self.num_tokens, self.pipeline.width)
        specs = [TensorSpec(f"{branch}_cache.{block}", self.dtype, shape) for block in blocks for branch in branches]
        sums = [branch for branch in self.pipeline.branches if branch not in branches and blocks]
        return [*specs, *(_f32(f"{branch}_cache.{part}", shape) for branch in sums)]

    def _is_in_mask(self, block: int, branch: str) -> bool:
        mask = self.pipeline.mask
        return mask is not None and mask[self.pipeline.branches.index(branch)][block] == "x"

    def _selection(self) -> list[TensorSpec]:
        """Scores of the deep blocks, and staleness: of each branch where each has counts of its own."""
        if self.pipeline.selector is None:
            return []
        num_choosing = len(self.pipeline.branches) - 1 if self.pipeline.has_block_counts else 1
        sides = ("B", self.num_tokens)
        return [
            _f32("scores", (len(self.deep), *sides)),
            _f32("staleness", (num_choosing * len(self.deep), *sides)),
        ]

    def _slots(self) -> Specs:
        symbols = ["K"]
        if self.pipeline.has_block_counts:
            symbols += [f"K.{branch}.{block}" for branch in self.pipeline.branches[1:] for block in self.deep]
        return tuple(TensorSpec(slots_name(symbol), "int64", (symbol,)) for symbol in symbols)

    def _squares(self) -> Specs:
        has_squares = self.pipeline.selector is not None and self.pipeline.selector.has_squares
        return (TensorSpec("token_squares", "int64", (self.num_tokens,)),) if has_squares else ()


def _nexts(specs: Iterable[TensorSpec]) -> Specs:
    return tuple(replace(spec, name=f"next_{spec.name}") for spec in specs)


def _with_older(caches: list[TensorSpec], order: int) -> list[TensorSpec]:
    """Add what each cache was at so many full steps before the last."""
    older = [replace(spec, name=f"{spec.name}.{age}") for age in range(1, order + 1) for spec in caches]
    return [*caches, *older]


def _f32(name: str, shape: tuple[int | str, ...]) -> TensorSpec:
    dtype: DType = "float32"
    return TensorSpec(name, dtype, shape)


def chains_of(graphs: Mapping[str, GraphSpec], *, is_segmented: bool) -> Chains:
    """Name the engines that make up each kind of step; in the segmented layout `full` is `front` and then `deep`."""
    chains: Chains = {kind: (kind,) for kind in KINDS if kind in graphs}
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
    paths += [] if pipeline.text is None else [TOKENIZER_FILE]
    return Manifest(
        schema=4,
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
        size: (H, W) of the latents.
    """

    manifest: Manifest
    schedule: Schedule
    table: SolverTable
    batch_size: int
    size: Size

    @property
    def pipeline(self) -> Pipeline:
        return self.manifest.pipeline

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        return self.manifest.graphs


@st.composite
def lowerables(draw: st.DrawFn) -> Lowerable:
    """Draw a bundle in any layout and precision, a schedule for it, a solver table, a batch size and a size."""
    pipeline = draw(pipelines())
    counts: st.SearchStrategy[Any] = st.integers(1, pipeline.num_tokens)
    num_deep = pipeline.num_blocks - (pipeline.deep_start or 0)
    if pipeline.has_block_counts and num_deep:
        counts |= block_counts(pipeline.num_tokens, len(pipeline.branches) - 1, num_deep)
    manifest = draw(plain_manifests(pipeline, max_batch_size=3))
    forwards = [forward for forward in Forward if forward.value in manifest.forwards]
    drawn = draw(steps(forwards, counts, 9))
    kinds = {step.forward for step in drawn}
    timesteps = tuple(map(float, reversed(range(len(drawn)))))
    scheduler = SchedulerIdentity("DDIMScheduler", {}, len(drawn), timesteps)
    schedule = Schedule(
        schema=2,
        model=pipeline.model,
        scheduler=scheduler,
        guidance=pipeline.guidance,
        deep_start=pipeline.deep_start if kinds & {Forward.DEEP, Forward.TOKENS} else None,
        selector=pipeline.selector if Forward.TOKENS in kinds else None,
        mask=pipeline.mask if Forward.MASKED in kinds else None,
        steps=drawn,
        found_by=FoundBy("drawn", {}, 0, MadeBy("", {}, None)),
        measured={},
    )
    rows = pipeline.state_rows
    count = len(schedule.steps)
    weights = [  # every number another, so that one in the wrong place is seen
        tuple(tuple(float(1000 * i + 10 * r + c) for c in range(rows + 1)) for r in range(rows)) for i in range(count)
    ]
    table = SolverTable(1, scheduler, 1.0, tuple(0.5 + i for i in range(count)), tuple(weights), 0.0)
    return Lowerable(manifest, schedule, table, draw(st.integers(1, 3)), draw(sizes_of(pipeline)))


@st.composite
def plain_manifests(draw: st.DrawFn, pipeline: Pipeline, max_batch_size: int) -> Manifest:
    """Draw the layout and precision of a bundle, whether it has a decoder, and whether it is conditioned on sizes."""
    precision = draw(st.sampled_from(list(PRECISIONS)))
    has_decoder = pipeline.tile_size is not None or draw(st.booleans())
    every = forwards_of(pipeline)
    forwards = draw(st.sampled_from([every, [*every, Forward.RESIDUAL], [Forward.FULL, Forward.RESIDUAL]]))
    graphs = graph_specs(
        pipeline,
        has_decoder=has_decoder,
        precision=precision,
        reads_size=draw(st.booleans()),
        max_order=MAX_ORDER,
        forwards=forwards,
    )
    is_segmented = "deep" in graphs and draw(st.booleans())
    return manifest_of(pipeline, graphs, is_segmented=is_segmented, precision=precision, max_batch_size=max_batch_size)


def profiles() -> st.SearchStrategy[Profile]:
    side = st.lists(st.integers(1, 64), min_size=3, max_size=3).map(sorted).map(tuple)
    return st.builds(Profile, sides=st.dictionaries(st.sampled_from([*PROFILE_SYMBOLS, "K.mlp.3"]), side))


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
