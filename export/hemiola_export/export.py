"""The export stage as one function: a model and its schedules become a folder of graphs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from hemiola_export.components import VaeDecoder
from hemiola_export.conditioning import Conditioning, ForwardConfig, GraphModule
from hemiola_export.errors import ExportError
from hemiola_export.forwards import FORWARDS, Front
from hemiola_export.model import Model, scheduler_from_identity
from hemiola_export.named_module import NamedModule
from hemiola_export.onnx_graphs import export_graph
from hemiola_export.reference_images import write_reference
from hemiola_export.sizes import Sizes
from hemiola_export.solver import measure_solver
from hemiola_export.torch_programs import export_program
from hemiola_export.weight_file import WeightFile
from hemiola_runtime.artifacts import MadeBy, replacing_folder
from hemiola_runtime.graph_set import (
    GRAPHS_FILE,
    REFERENCE_FILE,
    TOKENIZER_FILE,
    UNCACHED,
    Graphs,
    GraphSet,
    write_graph_set,
)
from hemiola_runtime.graphs import (
    CONDITIONING,
    FRONT,
    ITEMSIZE,
    PRECISIONS,
    TEXT_ENCODER,
    VAE_DECODER,
    WEIGHTS_FILE,
    GraphFormat,
    GraphSpec,
    Precision,
)
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.schedule import (
    DEEP,
    Forward,
    Schedule,
    Step,
    TokenSelector,
    keeps_layers,
    keeps_residual,
    write_schedule,
)
from hemiola_runtime.solver_table import SolverTable, write_solver_table

logger = logging.getLogger(__name__)

Exporter = Callable[..., GraphSpec]
EXPORTERS: Final[Mapping[GraphFormat, Exporter]] = {"onnx": export_graph, "torch": export_program}
TRACED_WITH: Final[Mapping[GraphFormat, tuple[str, ...]]] = {"onnx": ("onnx", "onnxscript"), "torch": ()}
DIT_GUIDANCE: Final = 4.0  # the defaults of diffusers' DiTPipeline and PixArtAlphaPipeline
PIXART_GUIDANCE: Final = 4.5

Progress = Callable[[str], None]


def export_pipeline(
    model: Model,
    schedules: Mapping[str, Schedule],
    out: Path,
    *,
    format: GraphFormat = "onnx",  # noqa: A002 - as GraphSet calls it
    precisions: Sequence[Precision] = ("fp32",),
    sizes: Sizes | None = None,
    has_reference: bool = True,
    progress: Progress = lambda _: None,
) -> GraphSet:
    """Write the graphs that some schedules of one model need, with all that a bundle takes from export.

    Args:
        model: from `load_model`.
        schedules: by name; the first is the one that runs by default. The uncached schedule is added as `full`.
        out: a folder, replaced as a whole when everything is written.
        format: of the graphs: ONNX, or PyTorch's exported programs, from which its own compiler builds.
        precisions: of matrix products, weights and caches; every graph is written in each.
        sizes: of the pictures that can be drawn; None for the one that the model is configured for.
        has_reference: draw a few images with every schedule in PyTorch, by which engines are judged.
        progress: told what is being done.

    Raises:
        ExportError: the schedules do not go together, or one of them cannot be exported.
        ScheduleError: one of them was made for another model.
    """
    _check_names(schedules)
    schedules = {**schedules, UNCACHED: next(iter(schedules.values())).uncached()}
    tables = _solver_tables(schedules.values())
    pipeline = _pipeline(model, schedules, max(table.state_rows for table in tables.values()), sizes or Sizes())
    kinds = _kinds(schedules.values())
    for schedule in schedules.values():
        pipeline.check_schedule(schedule, set(kinds))
    text_libraries = () if model.text is None else ("transformers", "tokenizers")
    if format == "torch" and not pipeline.has_one_size:
        raise ExportError(
            "graphs of the format torch are for one size of pictures; leave --min-size and --max-size out"
        )
    padded = {digest: table.padded(pipeline.state_rows) for digest, table in tables.items()}
    with replacing_folder(out, GRAPHS_FILE) as folder, torch.inference_mode():
        if has_reference:
            write_reference(model, schedules, tables, folder / REFERENCE_FILE, progress)
        if model.text is not None:
            (folder / TOKENIZER_FILE).write_bytes(model.text.tokenizer.json)
        graph_set = GraphSet(
            schema=4,
            pipeline=pipeline,
            format=format,
            precisions={
                precision: _write_graphs(model, pipeline, kinds, EXPORTERS[format], precision, folder, progress)
                for precision in dict.fromkeys(precisions)
            },
            schedules=_write_schedules(schedules, folder),
            solvers=_write_solvers(padded, folder),
            has_reference=has_reference,
            made_by=MadeBy.here("torch", "diffusers", *TRACED_WITH[format], *text_libraries),
        )
        write_graph_set(graph_set, folder)
    logger.info("wrote %s: %s", out, ", ".join(next(iter(graph_set.precisions.values())).graphs))
    return graph_set


def _check_names(schedules: Mapping[str, Schedule]) -> None:
    for name in schedules:
        if name == UNCACHED:
            raise ExportError(f"`{UNCACHED}` is the name of the uncached schedule; give this one another")
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ExportError(f"{name!r} is no name for a schedule: letters, digits, _, - and . make one")


def _solver_tables(schedules: Iterable[Schedule]) -> dict[str, SolverTable]:
    identities = {schedule.scheduler.digest: schedule.scheduler for schedule in schedules}
    return {
        digest: measure_solver(scheduler_from_identity(identity), identity.num_inference_steps)
        for digest, identity in identities.items()
    }


def _kinds(schedules: Iterable[Schedule]) -> dict[str, Step]:
    """Return one step of every kind that some schedule has, in a fixed order."""
    wanted = {step.kind: step for schedule in schedules for step in schedule.steps}
    return dict(sorted(wanted.items(), key=lambda item: (list(Forward).index(item[1].forward), item[1].order)))


def _pipeline(model: Model, schedules: Mapping[str, Schedule], state_rows: int, sizes: Sizes) -> Pipeline:
    family = model.family
    deep_start: int | None = _common("deep_start", {name: s.deep_start for name, s in schedules.items()})
    if deep_start is not None and deep_start >= len(family.blocks):
        raise ExportError(
            f"deep_start {deep_start} lies behind the last of the model's {len(family.blocks)} blocks, so that none "
            "is deep and `deep` and `tokens` would compute nothing"
        )
    selector: TokenSelector | None = _common("selector", {name: s.selector for name, s in schedules.items()})
    mask: tuple[str, ...] | None = _common("mask", {name: s.mask for name, s in schedules.items()})
    guidance: Literal["classifier_free", "none"] = _common(
        "guidance", {name: schedule.guidance for name, schedule in schedules.items()}
    )
    min_size, max_size = sizes.in_latents(model, selector)
    if model.vae is None and sizes.tile is not None:
        raise ExportError("the model draws pixels and has no VAE that could decode in tiles; leave --tile-size out")
    return Pipeline(
        model=model.identity,
        guidance=guidance,
        num_blocks=len(family.blocks),
        width=family.width,
        patch_size=family.patch_size,
        branches=family.branches,
        state_rows=state_rows,
        deep_start=deep_start,
        selector=selector,
        mask=mask,
        has_block_counts=any(schedule.has_block_counts for schedule in schedules.values()),
        labels=model.labels,
        text=None if model.text is None else TextSpec(model.text.tokenizer.num_tokens),
        min_size=min_size,
        max_size=max_size,
        pixels_per_latent=model.pixels_per_latent,
        image_channels=family.latent_shape[0] if model.vae is None else model.vae.config.out_channels,
        tile_size=None if model.vae is None else sizes.tile_in_latents(model, max_size),
        guidance_scale=_guidance_scale(model, next(iter(schedules.values()))),
    )


def _guidance_scale(model: Model, schedule: Schedule) -> float:
    """Return the scale that a schedule was searched with; for one that was not searched, the default of diffusers."""
    found = schedule.found_by.arguments.get("guidance_scale")
    if isinstance(found, int | float) and found:
        return float(found)
    return DIT_GUIDANCE if model.text is None else PIXART_GUIDANCE


def _common(what: str, by_schedule: dict[str, Any]) -> Any:
    """Return the one value, other than None, that all schedules agree on; None if none has any."""
    found = {name: value for name, value in by_schedule.items() if value is not None}
    first = next(iter(found.items()), None)
    for name, value in found.items():
        if first is not None and value != first[1]:
            raise ExportError(
                f"the schedules {first[0]} and {name} cannot share one bundle: {what} is {first[1]} in the one and "
                f"{value} in the other. Export them into two"
            )
    return None if first is None else first[1]


def _write_graphs(
    model: Model,
    pipeline: Pipeline,
    kinds: Mapping[str, Step],
    exporter: Exporter,
    precision: Precision,
    out: Path,
    progress: Progress,
) -> Graphs:
    """Write all graphs of one precision into a folder of their own."""
    folder = out / precision
    folder.mkdir()
    modules = _modules(model, pipeline, kinds, getattr(torch, PRECISIONS[precision]))
    graphs = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightFile(file)
        for name, module in modules.items():
            progress(f"graph {name} in {precision}")
            graph = exporter(
                module,
                name=name,
                rows_per_image=pipeline.rows_per_image,
                activation_bytes_per_row=_activation_bytes(model, pipeline, module, precision),
                folder=folder,
                weights=weights,
            )
            graphs[name] = replace(graph, file=f"{precision}/{graph.file}")
    return Graphs(graphs, weights.sha256)


def _modules(model: Model, pipeline: Pipeline, kinds: Mapping[str, Step], dtype: torch.dtype) -> dict[str, NamedModule]:
    family = model.family if dtype == model.family.compute_dtype else model.family.lowered(dtype)
    is_guided = pipeline.guidance == "classifier_free"
    num_tokens = pipeline.num_tokens if pipeline.has_one_size else "N"
    config = ForwardConfig(
        is_guided,
        pipeline.state_rows,
        pipeline.deep_start,
        pipeline.selector,
        num_tokens,
        pipeline.mask,
        pipeline.has_block_counts,
        keeps_layers(kinds),
        keeps_residual(kinds),
    )
    modules: dict[str, NamedModule] = {}
    if model.text is not None:
        modules[TEXT_ENCODER] = model.text.graph(family.width, dtype)
    modules[CONDITIONING] = Conditioning(family, config)
    modules |= {kind: FORWARDS[step.forward](family, config, step.order) for kind, step in kinds.items()}
    if DEEP.kind in kinds and pipeline.deep_start:
        modules[FRONT] = Front(family, config)
    if model.vae is not None:
        size = pipeline.tile_of(pipeline.size)
        modules[VAE_DECODER] = VaeDecoder(model.vae, family.patch_size, size if pipeline.has_one_size else None, dtype)
    return modules


def _activation_bytes(model: Model, pipeline: Pipeline, module: NamedModule, precision: Precision) -> int:
    """Estimate what a graph keeps alive for one row: a block's tokens, queries, keys, values, softmax map and MLP."""
    itemsize = ITEMSIZE[PRECISIONS[precision]]
    family = model.family
    if isinstance(module, VaeDecoder):
        height, width, _ = pipeline.image_shape(pipeline.tile_of(pipeline.max_size))
        first: int = model.vae.config.block_out_channels[0]  # type: ignore[union-attr]
        return 3 * itemsize * height * width * first
    if model.text is not None and pipeline.text is not None and not isinstance(module, GraphModule):
        config = model.text.encoder.config
        num_tokens, hidden = pipeline.text.num_tokens, 4 * config.d_model + 3 * config.d_ff
        scores: int = 2 * config.num_heads * num_tokens
        return int(4 * num_tokens * (hidden + scores))
    num_tokens = pipeline.tokens_of(pipeline.max_size)
    return itemsize * (12 * num_tokens * family.width + 2 * family.num_heads * num_tokens**2)


def _write_schedules(schedules: Mapping[str, Schedule], folder: Path) -> dict[str, str]:
    files = {name: f"schedules/{name}.json" for name in schedules}
    for name, file in files.items():
        write_schedule(schedules[name], folder / file)
    return files


def _write_solvers(tables: Mapping[str, SolverTable], folder: Path) -> dict[str, str]:
    files = {digest: f"solvers/{table.scheduler.label}-{digest[:6]}.json" for digest, table in tables.items()}
    for digest, file in files.items():
        write_solver_table(tables[digest], folder / file)
    return files
