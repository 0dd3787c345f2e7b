"""The engines stage as one function: a folder of graphs becomes a bundle, whose every byte is accounted for."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Final

from hemiola_engines import onnxruntime
from hemiola_engines.errors import BuildError
from hemiola_engines.parity import check_parity
from hemiola_runtime.artifacts import MadeBy, replacing_folder, sha256_of
from hemiola_runtime.errors import BundleError
from hemiola_runtime.manifest import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    BackendSpec,
    EngineSpec,
    FileSpec,
    GraphSet,
    GraphSpec,
    Manifest,
    read_graph_set,
    read_manifest,
    write_manifest,
)

logger = logging.getLogger(__name__)

BUILDERS: Final[dict[str, ModuleType]] = {"onnxruntime": onnxruntime}
ENGINES_FOLDER: Final = "engines"

Progress = Callable[[str], None]


def build_bundle(
    graphs: Path, out: Path, *, backend: str, max_batch_size: int, progress: Progress = lambda _: None
) -> Manifest:
    """Build the engines of an export and pack them into a bundle.

    An engine that `out` already holds with the same key is taken from there. The new bundle replaces the old one only
    when it is complete and computes what PyTorch computed.

    Args:
        graphs: a folder from `hemiola export`.
        out: the bundle's folder.
        backend: a key of BUILDERS.
        max_batch_size: largest number of images in one request.
        progress: told what is being done.

    Raises:
        BuildError: the graphs cannot be built, or the engines differ from PyTorch.
    """
    if max_batch_size < 1:
        raise BuildError(f"max_batch_size is 1 or more, not {max_batch_size}")
    graph_set = read_graph_set(graphs)
    builder = BUILDERS[backend]
    version: str = builder.version()
    existing = _existing_engines(out)
    with replacing_folder(out, MANIFEST_FILE) as folder:
        (folder / ENGINES_FOLDER).mkdir()
        progress("weights")
        _copy_weights(graphs, graph_set, folder)
        engines = {}
        for name, graph in graph_set.graphs.items():
            file = f"{ENGINES_FOLDER}/{name}.{builder.EXTENSION}"
            key = sha256_of("\n".join([graph.sha256, graph_set.weights_sha256, backend, version]).encode())
            if key in existing:
                progress(f"engine {name}: up to date")
                _link_or_copy(existing[key], folder / file)
            else:
                progress(f"engine {name}")
                builder.build_engine(graph, graphs / graph.file, folder / file)
            digest = sha256_of((folder / file).read_bytes())
            engines[name] = EngineSpec(_at(graph, file, digest), key)
        _copy_data(graphs, graph_set, folder)
        manifest = Manifest(
            schema=1,
            backend=BackendSpec(backend, version),
            pipeline=graph_set.pipeline,
            precision=graph_set.precision,
            max_batch_size=max_batch_size,
            engines=engines,
            schedules=graph_set.schedules,
            solvers=graph_set.solvers,
            files=_digests(folder),
            parity={},
            made_by=MadeBy.here(backend, "numpy"),
        )
        write_manifest(manifest, folder)
        progress("parity with PyTorch")
        manifest = replace(manifest, parity=check_parity(folder))
        write_manifest(manifest, folder)
    logger.info("wrote %s: %s", out, ", ".join(engines))
    return manifest


def _at(graph: GraphSpec, file: str, digest: str) -> GraphSpec:
    return replace(graph, file=file, sha256=digest)


def _existing_engines(out: Path) -> dict[str, Path]:
    """Return the intact engines of the bundle that is to be replaced, by key."""
    try:
        manifest = read_manifest(out)
    except BundleError:
        return {}
    found = {}
    for engine in manifest.engines.values():
        path = out / engine.graph.file
        if path.is_file() and sha256_of(path.read_bytes()) == manifest.files[engine.graph.file].sha256:
            found[engine.key] = path
    return found


def _copy_weights(graphs: Path, graph_set: GraphSet, folder: Path) -> None:
    source = graphs / WEIGHTS_FILE
    if not source.is_file() or _digest(source).sha256 != graph_set.weights_sha256:
        raise BuildError(f"{source} is missing, or was changed since it was exported. Export again")
    shutil.copyfile(source, folder / ENGINES_FOLDER / WEIGHTS_FILE)


def _copy_data(graphs: Path, graph_set: GraphSet, folder: Path) -> None:
    for file in (*graph_set.schedules.values(), *graph_set.solvers.values(), REFERENCE_FILE):
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
    data = path.read_bytes()
    return FileSpec(sha256_of(data), len(data))
