"""What build says about a bundle: `manifest.json`, with a digest of every file. Standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from hemiola_runtime.artifacts import MadeBy, sha256_of
from hemiola_runtime.codec import as_json, write_json
from hemiola_runtime.errors import IntegrityError, ScheduleError
from hemiola_runtime.folders import check_path, read_description
from hemiola_runtime.graph_set import TOKENIZER_FILE, UNCACHED
from hemiola_runtime.graphs import CONDITIONING, TEXT_ENCODER, GraphSpec, Precision, is_token_count
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.schedule import KINDS, Forward, SchedulerIdentity

MANIFEST_FILE: Final = "manifest.json"
PROFILE_SYMBOLS: Final = ("B", "K", "T", "N", "rows", "columns")  # those that are free; the others follow from them


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes that an engine was tuned for, as in TensorRT's optimization profiles.

    Attributes:
        sides: smallest, likeliest and largest number behind those of the symbols B, K, K.mlp.3, T, N, `rows` and
            `columns` that its inputs have.
    """

    sides: dict[str, tuple[int, int, int]]

    def __post_init__(self) -> None:
        for symbol, (least, likely, most) in self.sides.items():
            is_known = symbol in PROFILE_SYMBOLS or is_token_count(symbol)
            if not is_known or not 1 <= least <= likely <= most:
                raise ValueError(f"{symbol} = {least} ≤ {likely} ≤ {most} is no side of a profile")

    def covers(self, symbols: Mapping[str, int]) -> bool:
        """Tell whether the engine takes these sizes under this profile."""
        return all(least <= symbols[symbol] <= most for symbol, (least, _, most) in self.sides.items())


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine: a graph made runnable.

    Attributes:
        graph: its inputs, outputs and weights; `file` is the engine's file within the bundle.
        key: digest of all that went into it; an engine is built again only if it changes.
        profiles: what it was tuned for; none where the backend takes all sizes alike.
    """

    graph: GraphSpec
    key: str
    profiles: tuple[Profile, ...]


@dataclass(frozen=True, slots=True)
class FileSpec:
    """Digest and size of one file of a bundle."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """What the engines were built by, and what they are tied to.

    Attributes:
        name: of the backend.
        version: of it, exactly.
        gpu: name of the GPU they were built on, if they run on no other; else None.
        compute_capabilities: of the GPUs they run on, as in "8.9"; none where that does not matter.
        is_version_compatible: whether newer versions run them too, and TensorRT's lean runtime.
    """

    name: str
    version: str
    gpu: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    is_version_compatible: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """The folder that is deployed.

    Attributes:
        schema: of the file, now 4.
        backend: what runs the engines.
        pipeline: what they compute.
        precision: of matrix products, weights and caches.
        max_batch_size: largest B that is served.
        engines: by name.
        forwards: the engines that make up each kind of step, in order: of `full`, of `reuse_2`.
        schedules: name → file; the first is the default.
        solvers: digest of the scheduler → file.
        files: every file of the bundle but this one, by its path within it.
        parity: relative L2 of the final latents against PyTorch in float32, by schedule; empty until it was measured.
        forward_parity: largest relative L2 of what each forward leaves, against PyTorch in float32 on the inputs of a
            real trajectory; empty until it was measured.
        made_by: command and versions.
        digest: SHA-256 over all of the above; set when the manifest is written, checked when it is read.
    """

    schema: Literal[4]
    backend: BackendSpec
    pipeline: Pipeline
    precision: Precision
    max_batch_size: int
    engines: dict[str, EngineSpec]
    forwards: dict[str, tuple[str, ...]]
    schedules: dict[str, str]
    solvers: dict[str, str]
    files: dict[str, FileSpec]
    parity: dict[str, float]
    forward_parity: dict[str, float]
    made_by: MadeBy
    digest: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for path in self.files:
            check_path(path)
        named = [engine.graph.file for engine in self.engines.values()]
        for path in (*named, *self.schedules.values(), *self.solvers.values()):
            if path not in self.files:
                raise ValueError(f"{path!r} is used but has no digest in `files`")
        wanted = {CONDITIONING, *(engine for chain in self.forwards.values() for engine in chain)}
        if self.pipeline.text is not None:
            wanted.add(TEXT_ENCODER)
            if TOKENIZER_FILE not in self.files:
                raise ValueError(f"images are drawn of prompts, but there is no {TOKENIZER_FILE}")
        if missing := wanted - set(self.engines):
            raise ValueError(f"there is no engine {', '.join(sorted(missing))}")
        if unknown := set(self.forwards) - set(KINDS):
            raise ValueError(f"{', '.join(sorted(unknown))} is no forward")
        if not self.forwards.get(Forward.FULL.value) or not all(self.forwards.values()):
            raise ValueError("a forward, `full` or another, has no engine")
        if UNCACHED not in self.schedules:
            raise ValueError(f"there is no schedule `{UNCACHED}`")
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size is 1 or more, not {self.max_batch_size}")

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        """What the engines read and write, by name."""
        return {name: engine.graph for name, engine in self.engines.items()}

    @property
    def uses_weight_file(self) -> bool:
        """Whether weights lie in a file beside the engines instead of within them."""
        return any(graph.weights for graph in self.graphs.values())

    def solver_file(self, scheduler: SchedulerIdentity) -> str:
        """Return the file of a scheduler's table.

        Raises:
            ScheduleError: the bundle has none; the message names both sides.
        """
        if scheduler.digest not in self.solvers:
            raise ScheduleError(
                f"the bundle has no solver table for the schedule's scheduler {scheduler.label} "
                f"({scheduler.digest}); it has {', '.join(self.solvers.values())}. "
                "Export again with this schedule among the others"
            )
        return self.solvers[scheduler.digest]


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest.

    Raises:
        BundleError: there is none, or it is not valid.
        IntegrityError: it is not the one that was built.
    """
    manifest = read_description(Manifest, folder / MANIFEST_FILE, "`hemiola build` writes bundles")
    if manifest.digest != (digest := _digest(manifest)):
        raise IntegrityError(
            f"{folder / MANIFEST_FILE} has SHA-256 {digest[:12]}… instead of {manifest.digest[:12]}…: it is not "
            "the one that was built. Copy the bundle again, or build it again with `hemiola build`"
        )
    return manifest


def _digest(manifest: Manifest) -> str:
    return sha256_of(as_json(replace(manifest, digest="")))


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a bundle's manifest atomically."""
    write_json(replace(manifest, digest=_digest(manifest)), folder / MANIFEST_FILE)
