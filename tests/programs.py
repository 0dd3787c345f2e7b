"""Programs for the tests that look at launches and places: an example, and what it reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.graphs import CONDITIONING, STEP_TABLE, GraphSpec
from hemiola_runtime.manifest import Profile
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.program import (
    Launch,
    Placed,
    Program,
    lower,
)
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    REUSE,
    FoundBy,
    ModelIdentity,
    Schedule,
    SchedulerIdentity,
    TokenSelector,
    tokens,
)
from hemiola_runtime.solver_table import SolverTable
from strategies import (
    BRANCHES,
    TEXT_BRANCHES,
    Lowerable,
    Size,
    graph_specs,
    manifest_of,
)

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
