"""Show what an artifact is: a schedule, exported graphs, a bundle with its memory plan, a record of a search."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hemiola_runtime.errors import RequestError

if TYPE_CHECKING:
    from hemiola_runtime.graphs import GraphSpec
    from hemiola_runtime.manifest import Manifest
    from hemiola_runtime.pipeline import Pipeline
    from hemiola_runtime.schedule import Schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="schedule file, graphs folder or bundle")


def run(options: argparse.Namespace) -> int:
    """Inspect."""
    from hemiola_runtime.graph_set import GRAPHS_FILE
    from hemiola_runtime.manifest import MANIFEST_FILE

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
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    keys = set(content) if isinstance(content, dict) else {"steps"}  # of what is not JSON, the reader says why
    if not keys & {"steps", "points"}:
        raise RequestError(f"{path} is neither a schedule nor a record of a search. Of a bundle, name the folder")
    if "steps" in keys:
        return _schedule(read_schedule(path))
    from hemiola_search.markdown import record_lines
    from hemiola_search.record import read_record

    return record_lines(read_record(path))


def _schedule(schedule: Schedule) -> list[str]:
    segments = ", ".join(f"{length}×{count}" for length, count in schedule.segments())
    lines = [
        f"schedule for {schedule.model.name} ({schedule.model.family}), {schedule.scheduler.label}",
        f"  {schedule.rhythm}",
        f"  {schedule.summary}; segments (length × count) {segments}",
        f"  found by {schedule.found_by.strategy} {schedule.found_by.arguments.get('name', '')}".rstrip(),
    ]
    if schedule.selector is not None:
        counts = sorted({count for step in schedule.steps for count in step.counts})
        each = f"{counts[0]} … {counts[-1]}, a count for each block," if schedule.has_block_counts else f"{counts}"
        lines.append(f"  tokens {each} by {schedule.selector.score} in blocks from {schedule.deep_start}")
    if schedule.mask is not None:
        lines.append(f"  masked computes, of each branch, the blocks {' '.join(schedule.mask)}")
    if schedule.order:
        orders = ", ".join(str(order) for order in sorted({step.order for step in schedule.steps} - {0}))
        lines.append(f"  forecasts of order {orders}, from caches of up to {schedule.order + 1} full steps")
    lines += [f"  {name} {value:.4g}" for name, value in schedule.measured.items()]
    return lines


def _pipeline(pipeline: Pipeline) -> list[str]:
    model = pipeline.model
    subjects = f"{len(pipeline.labels)} classes"
    if pipeline.text is not None:
        subjects = f"prompts of up to {pipeline.text.num_tokens} tokens"
    images = "×".join(map(str, pipeline.image_shape(pipeline.size)))
    if not pipeline.has_one_size:
        least, most = (
            "×".join(map(str, pipeline.image_shape(size)[:2])) for size in (pipeline.min_size, pipeline.max_size)
        )
        images += f", from {least} to {most}"
    if pipeline.tile_size is not None:
        images += f", decoded in tiles of {pipeline.tile_size * pipeline.pixels_per_latent} pixels where larger"
    return [
        f"  {model.name} ({model.family}): {pipeline.num_blocks} blocks, width {pipeline.width}, "
        f"{pipeline.num_tokens} tokens, latents {'×'.join(map(str, model.latent_shape))}, {subjects}",
        f"  guidance {pipeline.guidance}; solver state of {pipeline.state_rows} rows; images {images}",
    ]


def _table(graphs: Iterable[GraphSpec], sizes: Mapping[str, int], size_of: str) -> list[str]:
    from hemiola_runtime.artifacts import in_words

    lines = [f"  {'engine':14}{'inputs':>8}{'outputs':>9}{size_of:>11}"]
    for graph in graphs:
        size = in_words(sizes[graph.name])
        lines.append(f"  {graph.name:14}{len(graph.inputs):8}{len(graph.outputs):9}{size:>11}")
    return lines


def _graphs(path: Path) -> list[str]:
    from hemiola_engines.layouts import arrange
    from hemiola_runtime.artifacts import in_words
    from hemiola_runtime.graph_set import read_graph_set
    from hemiola_runtime.graphs import FRONT, WEIGHTS_FILE

    graph_set = read_graph_set(path)
    lines = ["graphs", *_pipeline(graph_set.pipeline)]
    for precision, part in graph_set.precisions.items():
        sizes = {name: sum(weight.num_bytes for weight in graph.weights) for name, graph in part.graphs.items()}
        shared = in_words((path / precision / WEIGHTS_FILE).stat().st_size)
        lines += [f"  {precision}:", *_table(part.graphs.values(), sizes, "weights")]
        lines.append(f"  one weight file for all of them: {shared}")
        for layout in ("separate", "segmented") if FRONT in part.graphs else ("separate",):
            total = in_words(sum(sizes[name] for name in arrange(part.graphs, layout)[0]))
            lines.append(f"  engines that hold their weights, layout {layout}: {total}")
    return [*lines, f"  schedules {', '.join(graph_set.schedules)}"]


def _layout(manifest: Manifest) -> list[str]:
    """Show which engines make up each forward, and what they cost in bytes."""
    from hemiola_runtime.artifacts import in_words

    files = {name: manifest.files[graph.file].num_bytes for name, graph in manifest.graphs.items()}
    weights = {name: sum(weight.num_bytes for weight in graph.weights) for name, graph in manifest.graphs.items()}
    is_shared = manifest.uses_weight_file
    lines = _table(manifest.graphs.values(), weights if is_shared else files, "weights" if is_shared else "file")
    layout = "segmented" if len(manifest.forwards["full"]) > 1 else "separate"
    chains = ", ".join(f"{name} = {' + '.join(chain)}" for name, chain in manifest.forwards.items())
    total = in_words(sum(file.num_bytes for path, file in manifest.files.items() if path.startswith("engines/")))
    return [*lines, f"  layout {layout}: {chains}; {total} of engines and weights"]


def _costs(bundle: Path) -> list[str]:
    """Tell the machines that a bundle was measured on."""
    from hemiola_runtime.cost_table import stored_cost_tables

    lines = []
    for table in stored_cost_tables(bundle):
        versions = ", ".join(f"{name} {version}" for name, version in table.made_by.versions.items())
        sizes = ", ".join(map(str, table.batch_sizes))
        lines.append(
            f"  costs on {table.where} ({versions}): {len(table.rows)} rows, batch sizes {sizes}; {table.file}"
        )
    return lines


def _bundle(path: Path) -> list[str]:
    """Describe a bundle; its engines are not loaded, so this works on any machine."""
    from hemiola_runtime.artifacts import in_words
    from hemiola_runtime.bundle import open_bundle
    from hemiola_runtime.components import Components
    from hemiola_runtime.memory import plan_memory
    from hemiola_runtime.program import lower

    bundle = open_bundle(path)
    manifest = bundle.manifest
    schedules = {name: bundle.schedule(name) for name in manifest.schedules}
    largest = manifest.pipeline.max_size
    programs = [
        lower(manifest, schedule, bundle.solver_table(schedule), manifest.max_batch_size, size)
        for schedule in schedules.values()
        for size in manifest.pipeline.demanding_sizes
    ]
    components = Components.num_bytes(manifest)
    plan = plan_memory(manifest, max(program.num_bytes for program in programs), 1, components)
    caches = {
        images: max(
            lower(manifest, schedule, bundle.solver_table(schedule), images, largest).cache_bytes
            for schedule in schedules.values()
        )
        for images in dict.fromkeys((1, manifest.max_batch_size))
    }
    of_caches = ", ".join(f"{in_words(size)} for {images} images" for images, size in caches.items())
    backend = manifest.backend
    tied = [f"on {backend.gpu}"] if backend.gpu else []
    tied += [f"compute capability {', '.join(backend.compute_capabilities)}"] if backend.compute_capabilities else []
    lines = [
        ", ".join([f"bundle for {backend.name} {backend.version}", *tied, manifest.precision])
        + f", up to {manifest.max_batch_size} images at once",
        *_pipeline(manifest.pipeline),
        *_layout(manifest),
        f"  memory of a sampler: {plan}",
        f"  caches among it: {of_caches}".replace("1 images", "1 image"),
    ]
    for name, schedule in schedules.items():
        parity = manifest.parity.get(name)
        differs = "" if parity is None else f"; differs from PyTorch by {parity:.1e}"
        lines += [f"  {name}: {schedule.scheduler.label}, {schedule.summary}{differs}", f"    {schedule.rhythm}"]
    lines += [f"  {name}: differs from PyTorch by {d:.1e} per step" for name, d in manifest.forward_parity.items()]
    lines += _costs(path)
    if names := list(manifest.pipeline.labels.items()):
        shown = ", ".join(f"{label} {name}" for label, name in names[:12])
        lines.append(f"  labels: {shown}{', …' if len(names) > 12 else ''}")
    return lines
