"""The export stage as one function: a model and its schedules become a folder of graphs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from hemiola_export.components import VaeDecoder
from hemiola_export.errors import ExportError
from hemiola_export.forwards import FORWARDS, Conditioning, ForwardConfig, Front
from hemiola_export.model import Model, scheduler_from_identity
from hemiola_export.named_module import NamedModule
from hemiola_export.onnx_graphs import export_graph
from hemiola_export.solver import measure_solver
from hemiola_export.torch_programs import export_program
from hemiola_export.trajectory import Requests, Trajectory
from hemiola_export.weight_file import WeightFile
from hemiola_runtime.artifacts import MadeBy, replacing_folder
from hemiola_runtime.graph_set import GRAPHS_FILE, REFERENCE_FILE, UNCACHED, Graphs, GraphSet, write_graph_set
from hemiola_runtime.graphs import (
    CONDITIONING,
    FRONT,
    ITEMSIZE,
    PRECISIONS,
    VAE_DECODER,
    WEIGHTS_FILE,
    GraphFormat,
    GraphSpec,
    Precision,
)
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.schedule import Forward, Schedule, TokenSelector, write_schedule
from hemiola_runtime.solver_table import SolverTable, write_solver_table

logger = logging.getLogger(__name__)

REFERENCE_SEEDS: Final = (0, 1)
REFERENCE_GUIDANCE: Final = 2.0
Exporter = Callable[..., GraphSpec]
EXPORTERS: Final[Mapping[GraphFormat, Exporter]] = {"onnx": export_graph, "torch": export_program}
TRACED_WITH: Final[Mapping[GraphFormat, tuple[str, ...]]] = {"onnx": ("onnx", "onnxscript"), "torch": ()}

Progress = Callable[[str], None]


def export_pipeline(
    model: Model,
    schedules: Mapping[str, Schedule],
    out: Path,
    *,
    format: GraphFormat = "onnx",  # noqa: A002 - as GraphSet calls it
    precisions: Sequence[Precision] = ("fp32",),
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
        has_reference: draw a few images with every schedule in PyTorch, by which engines are judged.
        progress: told what is being done.

    Raises:
        ExportError: the schedules do not go together, or one of them cannot be exported.
        ScheduleError: one of them was made for another model.
    """
    _check_names(schedules)
    schedules = {**schedules, UNCACHED: next(iter(schedules.values())).uncached()}
    tables = _solver_tables(schedules.values())
    pipeline = _pipeline(model, schedules, max(table.state_rows for table in tables.values()))
    forwards = _forwards(schedules.values())
    for schedule in schedules.values():
        pipeline.check_schedule(schedule, {forward.value for forward in forwards})
    padded = {digest: table.padded(pipeline.state_rows) for digest, table in tables.items()}
    with replacing_folder(out, GRAPHS_FILE) as folder, torch.inference_mode():
        if has_reference:
            _write_reference(model, schedules, tables, folder / REFERENCE_FILE, progress)
        graph_set = GraphSet(
            schema=2,
            pipeline=pipeline,
            format=format,
            precisions={
                precision: _write_graphs(model, pipeline, forwards, EXPORTERS[format], precision, folder, progress)
                for precision in dict.fromkeys(precisions)
            },
            schedules=_write_schedules(schedules, folder),
            solvers=_write_solvers(padded, folder),
            has_reference=has_reference,
            made_by=MadeBy.here("torch", "diffusers", *TRACED_WITH[format]),
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


def _forwards(schedules: Iterable[Schedule]) -> list[Forward]:
    wanted = {forward for schedule in schedules for forward in schedule.counts}
    return [forward for forward in Forward if forward in wanted]


def _pipeline(model: Model, schedules: Mapping[str, Schedule], state_rows: int) -> Pipeline:
    family = model.family
    _, height, width = family.latent_shape
    pixels = (height, width, family.latent_shape[0])
    deep_start: int | None = _common("deep_start", {name: s.deep_start for name, s in schedules.items()})
    if deep_start is not None and deep_start >= len(family.blocks):
        raise ExportError(
            f"deep_start {deep_start} lies behind the last of the model's {len(family.blocks)} blocks, so that none "
            "is deep and `deep` and `tokens` would compute nothing"
        )
    selector: TokenSelector | None = _common("selector", {name: s.selector for name, s in schedules.items()})
    guidance: Literal["classifier_free", "none"] = _common(
        "guidance", {name: schedule.guidance for name, schedule in schedules.items()}
    )
    return Pipeline(
        model=model.identity,
        guidance=guidance,
        num_blocks=len(family.blocks),
        width=family.width,
        num_tokens=family.num_tokens,
        branches=family.branches,
        state_rows=state_rows,
        deep_start=deep_start,
        selector=selector,
        labels=model.labels,
        image_shape=pixels if model.vae is None else VaeDecoder(model.vae, family.latent_shape).image_shape,
    )


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
    forwards: list[Forward],
    exporter: Exporter,
    precision: Precision,
    out: Path,
    progress: Progress,
) -> Graphs:
    """Write all graphs of one precision into a folder of their own."""
    folder = out / precision
    folder.mkdir()
    modules = _modules(model, pipeline, forwards, getattr(torch, PRECISIONS[precision]))
    graphs = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        weights = WeightFile(file)
        for name, module in modules.items():
            progress(f"graph {name} in {precision}")
            graph = exporter(
                module,
                name=name,
                rows_per_image=pipeline.rows_per_image,
                activation_bytes_per_row=_activation_bytes(model, module, precision),
                folder=folder,
                weights=weights,
            )
            graphs[name] = replace(graph, file=f"{precision}/{graph.file}")
    return Graphs(graphs, weights.sha256)


def _modules(model: Model, pipeline: Pipeline, forwards: list[Forward], dtype: torch.dtype) -> dict[str, NamedModule]:
    family = model.family if dtype == model.family.compute_dtype else model.family.lowered(dtype)
    is_guided = pipeline.guidance == "classifier_free"
    config = ForwardConfig(is_guided, pipeline.state_rows, pipeline.deep_start, pipeline.selector)
    modules: dict[str, NamedModule] = {CONDITIONING: Conditioning(family, config)}
    modules |= {forward.value: FORWARDS[forward](family, config) for forward in forwards}
    if Forward.DEEP in forwards and pipeline.deep_start:
        modules[FRONT] = Front(family, config)
    if model.vae is not None:
        modules[VAE_DECODER] = VaeDecoder(model.vae, family.latent_shape, dtype)
    return modules


def _activation_bytes(model: Model, module: NamedModule, precision: Precision) -> int:
    """Estimate what a graph keeps alive for one row: a block's tokens, queries, keys, values, softmax map and MLP."""
    itemsize = ITEMSIZE[PRECISIONS[precision]]
    if isinstance(module, VaeDecoder):
        height, width, _ = module.image_shape
        first: int = model.vae.config.block_out_channels[0]  # type: ignore[union-attr]
        return 3 * itemsize * height * width * first
    family = model.family
    tokens = family.num_tokens * family.width
    return itemsize * (12 * tokens + 2 * family.num_heads * family.num_tokens**2)


def _write_reference(
    model: Model, schedules: Mapping[str, Schedule], tables: Mapping[str, SolverTable], path: Path, progress: Progress
) -> None:
    """Draw a few images with every schedule in PyTorch, by which engines are judged on whatever machine they run."""
    classes = model.family.num_classes
    labels = np.array([7 * seed % classes for seed in REFERENCE_SEEDS], dtype=np.int64)
    noise = noise_from_seeds(REFERENCE_SEEDS, model.family.latent_shape)
    guidance = np.full(len(labels), REFERENCE_GUIDANCE, dtype=np.float32)
    requests = Requests(torch.from_numpy(labels), torch.from_numpy(noise), torch.from_numpy(guidance))
    drawn = {}
    for name, schedule in schedules.items():
        progress(f"reference images of {name}")
        drawn[f"latents.{name}"] = trajectory(model, schedule, tables[schedule.scheduler.digest]).run(requests).numpy()
    np.savez(path, allow_pickle=False, labels=labels, seeds=np.array(REFERENCE_SEEDS), guidance=guidance, **drawn)


def trajectory(model: Model, schedule: Schedule, table: SolverTable) -> Trajectory:
    """Return what runs a schedule in PyTorch."""
    is_guided = schedule.guidance == "classifier_free"
    return Trajectory(model.family, table, schedule.steps, is_guided, schedule.deep_start, schedule.selector)


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
