"""Show what an artifact is: a schedule, exported graphs, a bundle with its memory plan, a record of a search."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola_runtime.errors import RequestError

if TYPE_CHECKING:
    from hemiola_runtime.manifest import GraphSpec, Pipeline
    from hemiola_runtime.schedule import Schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="schedule file, graphs folder or bundle")


def run(options: argparse.Namespace) -> int:
    """Inspect."""
    from hemiola_runtime.manifest import GRAPHS_FILE, MANIFEST_FILE

    path: Path = options.path
    if (path / MANIFEST_FILE).is_file():
        lines = _bundle(path)
    elif (path / GRAPHS_FILE).is_file():
        lines = _graphs(path)
    elif path.is_file():
        lines = _file(path)
    else:
        raise RequestError(f"{path} is neither a schedule file, nor a folder with {GRAPHS_FILE} or {MANIFEST_FILE}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _file(path: Path) -> list[str]:
    from hemiola_runtime.schedule import read_schedule

    try:
        is_record = "points" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        is_record = False
    if not is_record:
        return _schedule(read_schedule(path))
    from hemiola_search.record import read_record

    record = read_record(path)
    lines = [f"search of {record.model}, {record.sampler}, guidance {record.guidance_scale:g}: {record.chosen}"]
    for point in record.points:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in point.quality.items())
        lines.append(f"  {point.images:9} {point.strategy} {point.name}: {figures}")
    return lines


def _schedule(schedule: Schedule) -> list[str]:
    segments = ", ".join(f"{length}×{count}" for length, count in schedule.segments())
    lines = [
        f"schedule for {schedule.model.name} ({schedule.model.family}), {schedule.scheduler.label}",
        f"  {schedule.rhythm}",
        f"  {schedule.summary}; segments (length × count) {segments}",
        f"  found by {schedule.found_by.strategy} {schedule.found_by.arguments.get('name', '')}".rstrip(),
    ]
    if schedule.selector is not None:
        counts = sorted({step.tokens for step in schedule.steps if step.tokens is not None})
        lines.append(f"  tokens {counts} by {schedule.selector.score} in blocks from {schedule.deep_start}")
    lines += [f"  {name} {value:.4g}" for name, value in schedule.measured.items()]
    return lines


def _pipeline(pipeline: Pipeline) -> list[str]:
    model = pipeline.model
    return [
        f"  {model.name} ({model.family}): {pipeline.num_blocks} blocks, width {pipeline.width}, "
        f"{pipeline.num_tokens} tokens, latents {'×'.join(map(str, model.latent_shape))}, "
        f"{len(pipeline.labels)} classes",
        f"  guidance {pipeline.guidance}; solver state of {pipeline.state_rows} rows; "
        f"images {'×'.join(map(str, pipeline.image_shape))}",
    ]


def _engines(graphs: list[GraphSpec]) -> list[str]:
    from hemiola_runtime.artifacts import in_words

    lines = [f"  {'engine':14}{'inputs':>8}{'outputs':>9}{'weights':>11}"]
    for graph in graphs:
        weights = in_words(sum(weight.num_bytes for weight in graph.weights))
        lines.append(f"  {graph.name:14}{len(graph.inputs):8}{len(graph.outputs):9}{weights:>11}")
    return lines


def _graphs(path: Path) -> list[str]:
    from hemiola_runtime.artifacts import in_words
    from hemiola_runtime.manifest import WEIGHTS_FILE, read_graph_set

    graphs = read_graph_set(path)
    shared = in_words((path / WEIGHTS_FILE).stat().st_size)
    return [
        f"graphs in {graphs.precision}",
        *_pipeline(graphs.pipeline),
        *_engines(list(graphs.graphs.values())),
        f"  one weight file for all of them: {shared}",
        f"  schedules {', '.join(graphs.schedules)}",
    ]


def _bundle(path: Path) -> list[str]:
    from hemiola_runtime.sampler import Sampler

    with Sampler.open(path) as sampler:
        manifest = sampler.manifest
        lines = [
            f"bundle for {manifest.backend.name} {manifest.backend.version}, {manifest.precision}, "
            f"up to {manifest.max_batch_size} images at once",
            *_pipeline(manifest.pipeline),
            *_engines([engine.graph for engine in manifest.engines.values()]),
            f"  memory of a sampler: {sampler.memory_plan}",
        ]
        for name, schedule in sampler.schedules.items():
            parity = manifest.parity.get(name)
            differs = "" if parity is None else f"; differs from PyTorch by {parity:.1e}"
            lines += [f"  {name}: {schedule.scheduler.label}, {schedule.summary}{differs}", f"    {schedule.rhythm}"]
    names = list(manifest.pipeline.labels.items())
    shown = ", ".join(f"{label} {name}" for label, name in names[:12])
    lines.append(f"  labels: {shown}{', …' if len(names) > 12 else ''}")
    return lines
