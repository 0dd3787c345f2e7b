"""The builder for ONNX Runtime: its engines are the exported graphs themselves.

ONNX Runtime optimises a graph when a session opens, in a tenth of a second for a dozen blocks. Optimising ahead would
write a private copy of every weight that a fusion touches, so weights could no longer be mapped once for all sessions.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from hemiola_engines.errors import BuildError
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.manifest import GraphSpec

EXTENSION = "onnx"


def version() -> str:
    """Version of the installed ONNX Runtime.

    Raises:
        BuildError: none is installed.
    """
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError as error:
        raise BuildError("onnxruntime is not installed. Install it with: pip install 'hemiola[cpu]'") from error


def build_engine(graph: GraphSpec, source: Path, target: Path) -> None:
    """Write the engine of a graph.

    Args:
        graph: its description.
        source: its ONNX file.
        target: the engine's file.

    Raises:
        BuildError: the file is not the one that was exported.
    """
    if not source.exists() or sha256_of(source.read_bytes()) != graph.sha256:
        raise BuildError(
            f"{source} is missing, or was changed since it was exported. Export again with `hemiola export`"
        )
    shutil.copyfile(source, target)
