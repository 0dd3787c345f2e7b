"""What export and build say about their folders: `graphs.json` and `manifest.json`, with the standard library alone.

Both describe one pipeline (what the model is and what its graphs expect) and a set of graphs by their inputs, outputs
and weights. A bundle adds what the engines were built with and the digest of every file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final, Literal, TypeVar

from hemiola_runtime.artifacts import MadeBy, sha256_of
from hemiola_runtime.codec import as_json, parse, write_json
from hemiola_runtime.errors import BundleError, IntegrityError, ScheduleError
from hemiola_runtime.schedule import Forward, ModelIdentity, Schedule, SchedulerIdentity, TokenSelector

CONDITIONING: Final = "conditioning"  # engine that runs once, ahead of the steps
VAE_DECODER: Final = "vae_decoder"  # engine that runs once, after them
FRONT: Final = "front"  # graph of the shallow blocks of `full`; `deep` goes on from there
MANIFEST_FILE: Final = "manifest.json"
GRAPHS_FILE: Final = "graphs.json"
WEIGHTS_FILE: Final = "weights.bin"
REFERENCE_FILE: Final = "reference.npz"
UNCACHED: Final = "full"  # name of the schedule that computes everything at every step; every bundle has it

STEP_TABLE: Final = "TR"  # first side of a table that conditioning writes: T steps of R rows each

SYMBOLS: Final = ("B", "R", "K", "T", STEP_TABLE)

T = TypeVar("T")

DType = Literal["float32", "float16", "bfloat16", "int64"]
ITEMSIZE: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}

GraphFormat = Literal["onnx", "torch"]
Precision = Literal["fp32", "fp16", "bf16"]  # of matrix products, weights and caches
PRECISIONS: Final[Mapping[Precision, DType]] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    Attributes:
        name: as in the graph.
        dtype: element type.
        shape: integers, or the symbols B images, R rows (2B under guidance), K tokens, T model evaluations, TR = T·R.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        for side in self.shape:
            if (side not in SYMBOLS) if isinstance(side, str) else side < 0:
                raise ValueError(f"{side!r} is no side of a shape; symbols are {', '.join(SYMBOLS)}")

    def resolve(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every symbol replaced by its number."""
        return tuple(side if isinstance(side, int) else symbols[side] for side in self.shape)

    def num_bytes(self, symbols: Mapping[str, int]) -> int:
        """Return its size in bytes."""
        return math.prod(self.resolve(symbols)) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Where one weight of a graph lies within the weight file that all graphs share."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One ONNX graph.

    Attributes:
        name: a forward, `front`, `conditioning` or `vae_decoder`.
        file: within its folder.
        sha256: of the file.
        inputs: in the graph's order. An output `next_x` replaces the tensor `x`.
        outputs: in the graph's order.
        weights: those that lie in the shared weight file.
        activation_bytes_per_row: estimate of the intermediate tensors alive at once, for one row.
    """

    name: str
    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...]
    activation_bytes_per_row: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the graphs compute, whatever runs them.

    Attributes:
        model: the model they were exported from.
        guidance: `classifier_free` or `none`.
        num_blocks: L.
        width: D.
        num_tokens: N.
        branches: modules of a block that are cached, in the order of their residual sums.
        state_rows: 1 + k, the sample and the solver's history.
        deep_start: first deep block of `deep` and `tokens`, None if neither was exported.
        selector: of `tokens`, None if it was not exported.
        labels: class label → what people call it.
        image_shape: (height, width, channels) of one picture.
    """

    model: ModelIdentity
    guidance: Literal["classifier_free", "none"]
    num_blocks: int
    width: int
    num_tokens: int
    branches: tuple[str, ...]
    state_rows: int
    deep_start: int | None
    selector: TokenSelector | None
    labels: dict[str, str]
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if list(self.labels) != [str(label) for label in range(len(self.labels))] or not self.labels:
            raise ValueError("labels are numbered from 0, one after the other")

    @property
    def rows_per_image(self) -> int:
        """2 under classifier-free guidance, else 1."""
        return 2 if self.guidance == "classifier_free" else 1

    def symbols(self, batch_size: int, num_evaluations: int, num_selected: int = 0) -> dict[str, int]:
        """Return the number behind every symbol of a shape."""
        rows = batch_size * self.rows_per_image
        return {"B": batch_size, "R": rows, "K": num_selected, "T": num_evaluations, STEP_TABLE: num_evaluations * rows}

    def check_schedule(self, schedule: Schedule, forwards: set[str]) -> None:
        """Make sure that a schedule was made for this pipeline.

        Raises:
            ScheduleError: it was not; the message names both sides.
        """
        mine, theirs = self.model, schedule.model
        if (mine.family, mine.weights_sha256) != (theirs.family, theirs.weights_sha256):
            raise ScheduleError(
                f"the schedule was made for the model {theirs.name} (weights {theirs.weights_sha256[:12]}), "
                f"but here is {mine.name} (weights {mine.weights_sha256[:12]}). Search a schedule for this model"
            )
        if mine.latent_shape != theirs.latent_shape:
            raise ScheduleError(
                f"the schedule was made for latents of shape {list(theirs.latent_shape)}, but here they are "
                f"{list(mine.latent_shape)}. Search a schedule at this resolution"
            )
        if self.guidance != schedule.guidance:
            raise ScheduleError(
                f"the schedule was made with guidance `{schedule.guidance}`, but here it is `{self.guidance}`"
            )
        if missing := sorted({forward.value for forward in schedule.counts} - forwards):
            raise ScheduleError(
                f"the schedule runs `{', '.join(missing)}`, but only {', '.join(sorted(forwards))} were exported. "
                "Export again with this schedule among the others"
            )
        for name, wanted, here in (
            ("deep_start", schedule.deep_start, self.deep_start),
            ("selector", schedule.selector, self.selector),
        ):
            if wanted is not None and wanted != here:
                raise ScheduleError(
                    f"the schedule needs {name} = {wanted}, but the graphs were exported with {name} = {here}. "
                    "Export again with this schedule"
                )
        for i, step in enumerate(schedule.steps):
            if step.tokens is not None and step.tokens > self.num_tokens:
                raise ScheduleError(f"step {i} recomputes {step.tokens} tokens, but an image has {self.num_tokens}")


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs of one precision, over one weight file.

    Attributes:
        graphs: by name; their files lie in a folder called by the precision, beside their weights.
        weights_sha256: of the weight file that they share.
    """

    graphs: dict[str, GraphSpec]
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class GraphSet:
    """The folder that export leaves: graphs and weights in one precision or several, schedules, solver tables.

    Attributes:
        schema: of the file, now 2.
        pipeline: what the graphs compute.
        format: of the graphs' files: ONNX, or PyTorch's exported programs, which only its own compiler builds from.
        precisions: the graphs, by precision.
        schedules: name → file; the first is the one that runs unless another is asked for.
        solvers: digest of the scheduler → file.
        has_reference: whether there are images that PyTorch drew, by which engines are judged.
        made_by: command and versions.
    """

    schema: Literal[2]
    pipeline: Pipeline
    format: GraphFormat
    precisions: dict[str, Graphs]
    schedules: dict[str, str]
    solvers: dict[str, str]
    has_reference: bool
    made_by: MadeBy

    def __post_init__(self) -> None:
        if not self.precisions or not set(self.precisions) <= set(PRECISIONS):
            raise ValueError(
                f"graphs are {', '.join(PRECISIONS)}, not {', '.join(self.precisions) or 'of no precision'}"
            )
        named = [graph.file for part in self.precisions.values() for graph in part.graphs.values()]
        for path in (*named, *self.schedules.values(), *self.solvers.values()):
            _check_path(path)


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes that an engine was tuned for, as in TensorRT's optimization profiles.

    Attributes:
        sides: smallest, likeliest and largest number behind those of the symbols B, K and T that its inputs have.
    """

    sides: dict[str, tuple[int, int, int]]

    def __post_init__(self) -> None:
        for symbol, (least, likely, most) in self.sides.items():
            if symbol not in ("B", "K", "T") or not 1 <= least <= likely <= most:
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
        schema: of the file, now 2.
        backend: what runs the engines.
        pipeline: what they compute.
        precision: of matrix products, weights and caches.
        max_batch_size: largest B that is served.
        engines: by name.
        forwards: the engines that make up each forward, in order.
        schedules: name → file; the first is the default.
        solvers: digest of the scheduler → file.
        files: every file of the bundle but this one, by its path within it.
        parity: relative L2 of the final latents against PyTorch in float32, by schedule; empty until it was measured.
        forward_parity: largest relative L2 of what each forward leaves, against PyTorch in float32 on the inputs of a
            real trajectory; empty until it was measured.
        made_by: command and versions.
        digest: SHA-256 over all of the above; set when the manifest is written, checked when it is read.
    """

    schema: Literal[2]
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
            _check_path(path)
        named = [engine.graph.file for engine in self.engines.values()]
        for path in (*named, *self.schedules.values(), *self.solvers.values()):
            if path not in self.files:
                raise ValueError(f"{path!r} is used but has no digest in `files`")
        wanted = {CONDITIONING, *(engine for chain in self.forwards.values() for engine in chain)}
        if missing := wanted - set(self.engines):
            raise ValueError(f"there is no engine {', '.join(sorted(missing))}")
        if unknown := set(self.forwards) - {forward.value for forward in Forward}:
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


def _check_path(path: str) -> None:
    parts = PurePosixPath(path)
    is_inside = parts.parts and not parts.is_absolute() and ".." not in parts.parts and "\\" not in path
    if not is_inside or str(parts) != path or "\0" in path:
        raise ValueError(f"the path {path!r} leaves the bundle")


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest.

    Raises:
        BundleError: there is none, or it is not valid.
        IntegrityError: it is not the one that was built.
    """
    manifest = _read(Manifest, folder / MANIFEST_FILE, "`hemiola build` writes bundles")
    if manifest.digest != (digest := _digest(manifest)):
        raise IntegrityError(
            f"{folder / MANIFEST_FILE} has SHA-256 {digest[:12]}… instead of {manifest.digest[:12]}…: it is not "
            "the one that was built. Copy the bundle again, or build it again with `hemiola build`"
        )
    return manifest


def _digest(manifest: Manifest) -> str:
    return sha256_of(as_json(replace(manifest, digest="")))


def read_graph_set(folder: Path) -> GraphSet:
    """Read what export says about its folder.

    Raises:
        BundleError: there is nothing of the kind, or it is not valid.
    """
    return _read(GraphSet, folder / GRAPHS_FILE, "`hemiola export` writes such folders")


def _read(kind: type[T], path: Path, mend: str) -> T:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}. {mend}") from error
    try:
        return parse(kind, text, path.name)
    except ValueError as error:
        raise BundleError(f"{error}. {mend}") from error


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a bundle's manifest atomically."""
    write_json(replace(manifest, digest=_digest(manifest)), folder / MANIFEST_FILE)


def write_graph_set(graphs: GraphSet, folder: Path) -> None:
    """Write what export says about its folder, atomically."""
    write_json(graphs, folder / GRAPHS_FILE)
