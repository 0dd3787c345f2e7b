"""The engines stage as one function: a folder of graphs becomes a bundle, whose every byte is accounted for."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hemiola_engines.builder import Builder, EngineJob, Progress
from hemiola_engines.errors import BuildError
from hemiola_engines.inductor import INDUCTOR
from hemiola_engines.layouts import arrange
from hemiola_engines.onnxruntime import ONNXRUNTIME, ONNXRUNTIME_CUDA
from hemiola_engines.options import BuildOptions
from hemiola_engines.parity import check_parity
from hemiola_engines.profiles import profiles_of
from hemiola_engines.tensorrt import TENSORRT, TENSORRT_RTX
from hemiola_runtime.artifacts import MadeBy, replacing_folder, sha256_of
from hemiola_runtime.backends import entry_of, obstacle
from hemiola_runtime.codec import encode
from hemiola_runtime.errors import BundleError
from hemiola_runtime.graph_set import REFERENCE_FILE, TOKENIZER_FILE, GraphSet, read_graph_set
from hemiola_runtime.graphs import PRECISIONS, WEIGHTS_FILE, GraphSpec, Precision
from hemiola_runtime.manifest import (
    MANIFEST_FILE,
    BackendSpec,
    EngineSpec,
    FileSpec,
    Manifest,
    Profile,
    read_manifest,
    write_manifest,
)
from hemiola_runtime.schedule import read_schedule

logger = logging.getLogger(__name__)

BUILDERS: Final[dict[str, Builder]] = {
    "onnxruntime": ONNXRUNTIME,
    "onnxruntime_cuda": ONNXRUNTIME_CUDA,
    "tensorrt": TENSORRT,
    "tensorrt_rtx": TENSORRT_RTX,
    "inductor": INDUCTOR,
}
ENGINES_FOLDER: Final = "engines"
RECIPE: Final = 1  # to be raised when a builder makes another engine of the same graph and options


@dataclass(frozen=True, slots=True)
class Built:
    """What a build gives.

    Attributes:
        manifest: of the bundle.
        not_compared: why the engines were not compared with PyTorch; None if they were.
    """

    manifest: Manifest
    not_compared: str | None


def build_bundle(graphs: Path, out: Path, options: BuildOptions, *, progress: Progress = lambda _: None) -> Built:
    """Build the engines of an export and pack them into a bundle.

    An engine that `out` already holds with the same key is taken from there. The new bundle replaces the old one only
    when it is complete and, where its backend runs on this machine, computes what PyTorch computed.

    Args:
        graphs: a folder from `hemiola export`.
        out: the bundle's folder.
        options: how to build.
        progress: told what is being done.

    Raises:
        BuildError: the graphs cannot be built, or the engines differ from PyTorch.
    """
    if options.max_batch_size < 1:
        raise BuildError(f"max_batch_size is 1 or more, not {options.max_batch_size}")
    graph_set = read_graph_set(graphs)
    precision = _precision(graph_set, options.precision)
    exported = graph_set.precisions[precision]
    builder = BUILDERS[options.backend]
    if builder.format != graph_set.format:
        raise BuildError(
            f"{options.backend} builds from {builder.format} graphs, but {graphs} holds {graph_set.format} graphs. "
            f"Export again with --format {builder.format}"
        )
    builder.check(options, precision)
    chosen, forwards = arrange(exported.graphs, options.layout)
    gpu, capabilities = builder.target(options)
    backend = BackendSpec(options.backend, builder.version(), gpu, capabilities, options.is_version_compatible)
    existing = _existing_engines(out)
    with replacing_folder(out, MANIFEST_FILE) as folder:
        (folder / ENGINES_FOLDER).mkdir()
        _copy_data(graphs, graph_set, folder)
        weights = graphs / precision / WEIGHTS_FILE
        progress("weights")
        _check_weights(weights, exported.weights_sha256)
        if builder.keeps_weight_file:
            shutil.copyfile(weights, folder / ENGINES_FOLDER / WEIGHTS_FILE)
        jobs = {
            name: EngineJob(
                graph,
                graphs / graph.file,
                folder / ENGINES_FOLDER / f"{name}.{builder.extension}",
                _profiles(graph, graph_set, graphs, options, builder),
            )
            for name, graph in chosen.items()
        }
        keys = {
            name: _key(job.graph, exported.weights_sha256, backend, job.profiles, options) for name, job in jobs.items()
        }
        for name, key in keys.items():
            if key in existing:
                progress(f"engine {name}: up to date")
                _link_or_copy(existing[key], jobs[name].target)
        missing = [job for name, job in jobs.items() if keys[name] not in existing]
        builder.build_engines(missing, options, progress, rows_per_image=graph_set.pipeline.rows_per_image)
        engines = {name: _engine(job, keys[name], builder) for name, job in jobs.items()}
        manifest = Manifest(
            schema=4,
            backend=backend,
            pipeline=graph_set.pipeline,
            precision=precision,
            max_batch_size=options.max_batch_size,
            engines=engines,
            forwards=forwards,
            schedules=graph_set.schedules,
            solvers=graph_set.solvers,
            files=_digests(folder),
            parity={},
            forward_parity={},
            made_by=MadeBy.here("numpy", entry_of(options.backend).distribution),
        )
        write_manifest(manifest, folder)
        not_compared = obstacle(backend) if graph_set.has_reference else "the export holds no reference images"
        if not_compared is None:
            progress("parity with PyTorch")
            manifest = replace(manifest, parity=check_parity(folder))
            write_manifest(manifest, folder)
    logger.info("wrote %s: %s", out, ", ".join(engines))
    return Built(manifest, not_compared)


def _engine(job: EngineJob, key: str, builder: Builder) -> EngineSpec:
    file = f"{ENGINES_FOLDER}/{job.target.name}"
    weights = job.graph.weights if builder.keeps_weight_file else ()
    graph = replace(job.graph, file=file, sha256=_digest(job.target).sha256, weights=weights)
    return EngineSpec(graph, key, job.profiles)


def _precision(graph_set: GraphSet, asked: Precision | None) -> Precision:
    exported = {precision: None for precision in PRECISIONS if precision in graph_set.precisions}
    if asked is None and len(exported) == 1:
        return next(iter(exported))
    if asked is None or asked not in exported:
        wish = "none was chosen" if asked is None else f"{asked} was asked for"
        raise BuildError(
            f"the graphs were exported in {', '.join(exported)}; {wish}. Choose with --precision, or export again "
            "with `hemiola export --precision`"
        )
    return asked


def _profiles(
    graph: GraphSpec, graph_set: GraphSet, graphs: Path, options: BuildOptions, builder: Builder
) -> tuple[Profile, ...]:
    if not builder.has_profiles:
        return ()
    schedules = [read_schedule(graphs / file) for file in graph_set.schedules.values()]
    return profiles_of(graph, graph_set.pipeline, schedules, options.max_batch_size)


def _key(
    graph: GraphSpec,
    weights_sha256: str,
    backend: BackendSpec,
    profiles: tuple[Profile, ...],
    options: BuildOptions,
) -> str:
    """Digest all that an engine is made of."""
    measurements = options.timing_cache if options.is_timing_cache_pinned else None
    pinned = [] if measurements is None else [_digest(file).sha256 for file in sorted(measurements.glob("*"))]
    tuning = [RECIPE, options.optimization_level, *pinned]
    parts = [graph.sha256, weights_sha256, encode(backend), encode(profiles), tuning]
    return sha256_of(json.dumps(parts).encode())


def _existing_engines(out: Path) -> dict[str, Path]:
    """Return the intact engines of the bundle that is to be replaced, by key."""
    try:
        manifest = read_manifest(out)
    except BundleError:
        return {}
    found = {}
    for engine in manifest.engines.values():
        path = out / engine.graph.file
        if path.is_file() and _digest(path).sha256 == manifest.files[engine.graph.file].sha256:
            found[engine.key] = path
    return found


def _check_weights(source: Path, sha256: str) -> None:
    if not source.is_file() or _digest(source).sha256 != sha256:
        raise BuildError(f"{source} is missing, or was changed since it was exported. Export again")


def _copy_data(graphs: Path, graph_set: GraphSet, folder: Path) -> None:
    reference = (REFERENCE_FILE,) if graph_set.has_reference else ()
    tokenizer = (TOKENIZER_FILE,) if graph_set.pipeline.text is not None else ()
    for file in (*graph_set.schedules.values(), *graph_set.solvers.values(), *reference, *tokenizer):
        if not (graphs / file).is_file():
            raise BuildError(f"{graphs / file} is missing. Export again with `hemiola export`")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(graphs / file, folder / file)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _digests(folder: Path) -> dict[str, FileSpec]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def _digest(path: Path) -> FileSpec:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileSpec(digest, path.stat().st_size)
