"""What every backend's builder offers, and the check that all of them begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hemiola_engines.errors import BuildError
from hemiola_engines.options import BuildOptions
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.graphs import GraphFormat, GraphSpec, Precision
from hemiola_runtime.manifest import Profile

Progress = Callable[[str], None]


class Builder(Protocol):
    """Makes graphs runnable by one backend."""

    @property
    def extension(self) -> str:
        """Of the engines' files."""

    @property
    def format(self) -> GraphFormat:
        """What it builds from."""

    @property
    def keeps_weight_file(self) -> bool:
        """Whether engines read their weights from the shared weight file; else they hold them."""

    @property
    def has_profiles(self) -> bool:
        """Whether engines are tuned for sizes."""

    def version(self) -> str:
        """Version of the backend's library.

        Raises:
            BuildError: it is not installed.
        """

    def check(self, options: BuildOptions, precision: Precision) -> None:
        """Refuse options and precisions that the backend does not have, before any work is done.

        Raises:
            BuildError: with what it does have.
        """

    def target(self, options: BuildOptions) -> tuple[str | None, tuple[str, ...]]:
        """Return what engines are tied to: the name of a GPU or None, and compute capabilities or none.

        Raises:
            BuildError: the builder needs a GPU, and there is none.
        """

    def build_engine(
        self,
        graph: GraphSpec,
        source: Path,
        target: Path,
        profiles: Sequence[Profile],
        options: BuildOptions,
        progress: Progress,
        *,
        rows_per_image: int,
    ) -> None:
        """Write the engine of a graph; the file appears whole or not at all.

        Args:
            graph: its description.
            source: its file; the weight file lies beside it.
            target: the engine's file.
            profiles: sizes to tune for; none for a backend without profiles.
            options: how to build.
            progress: told what is being done.
            rows_per_image: 2 under guidance, else 1.

        Raises:
            BuildError: the file is not the one that was exported, or the backend refuses it.
        """


def check_source(graph: GraphSpec, source: Path) -> None:
    """Make sure that a graph is the one that was exported.

    Raises:
        BuildError: it is not.
    """
    if not source.exists() or sha256_of(source.read_bytes()) != graph.sha256:
        raise BuildError(
            f"{source} is missing, or was changed since it was exported. Export again with `hemiola export`"
        )
