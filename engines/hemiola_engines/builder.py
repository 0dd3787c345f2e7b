"""What every backend's builder offers and is given, and the check that all of them begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hemiola_engines.errors import BuildError
from hemiola_engines.options import BuildOptions
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.graphs import GraphFormat, GraphSpec, Precision
from hemiola_runtime.manifest import Profile

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One engine to build.

    Attributes:
        graph: its description.
        source: the graph's file; the weight file lies beside it.
        target: the engine's file.
        profiles: sizes to tune for; none for a backend without profiles.
    """

    graph: GraphSpec
    source: Path
    target: Path
    profiles: tuple[Profile, ...]


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

    def build_engines(
        self, jobs: Sequence[EngineJob], options: BuildOptions, progress: Progress, *, rows_per_image: int
    ) -> None:
        """Write the engines of some graphs; each file appears whole or not at all.

        Args:
            jobs: one for each engine.
            options: how to build.
            progress: told `engine NAME` when one is begun, and how far it is.
            rows_per_image: 2 under guidance, else 1.

        Raises:
            BuildError: a graph is not the one that was exported, or the backend refuses it.
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
