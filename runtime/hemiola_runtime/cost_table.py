"""What every forward of a bundle costs on one machine, as `hemiola measure` found it there. Standard library alone.

A table is of a machine, not of the build: it lies in the bundle's folder `costs`, the manifest does not name it, and
whoever opens the bundle to draw with it does not read it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final, Literal

from hemiola_runtime.artifacts import MadeBy, sha256_of
from hemiola_runtime.codec import as_json, parse, write_json
from hemiola_runtime.errors import BundleError
from hemiola_runtime.graphs import CONDITIONING, VAE_DECODER, Precision
from hemiola_runtime.machine import Machine
from hemiola_runtime.manifest import MANIFEST_FILE, BackendSpec
from hemiola_runtime.schedule import KINDS, Forward, ModelIdentity, Step, TokenSelector

COSTS_FOLDER: Final = "costs"
DIGEST_LENGTH: Final = 12  # hexadecimal digits in the name of a table's file


def mean_tokens(step: Step) -> float:
    """Return K of a step: the mean where blocks and branches have counts of their own, 0 for a step without."""
    return fmean(step.counts) if step.counts else 0.0


@dataclass(frozen=True, slots=True)
class CostRow:
    """What one thing takes that a request does.

    Attributes:
        kind: of a step, as in `full` or `reuse_2`; or `conditioning` or `vae_decoder`.
        tokens: K, the mean of all counts where blocks have counts of their own; 0 for a kind that selects none.
        batch_size: B.
        median_ms: of all launches that were measured; a step of several engines is the sum of theirs.
        p10_ms: the tenth percentile.
        p90_ms: the ninetieth.
        count: how many launches.
    """

    kind: str
    tokens: int
    batch_size: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.kind not in (CONDITIONING, VAE_DECODER):
            raise ValueError(f"{self.kind!r} is no kind of step, and neither `{CONDITIONING}` nor `{VAE_DECODER}`")
        if self.tokens < 0 or (self.tokens > 0) != (self.kind.partition("_")[0] == Forward.TOKENS.value):
            raise ValueError(f"`{self.kind}` of {self.tokens} tokens; `tokens` has 1 or more, all others 0")
        if min(self.batch_size, self.count) < 1:
            raise ValueError(f"batch_size and count are 1 or more, not {self.batch_size} and {self.count}")
        if not 0 < self.p10_ms <= self.median_ms <= self.p90_ms < math.inf:
            raise ValueError(
                f"`{self.kind}` took {self.p10_ms} ≤ {self.median_ms} ≤ {self.p90_ms} ms: times are above 0, finite "
                "and in order"
            )


@dataclass(frozen=True, slots=True)
class CostTable:
    """What every forward of a bundle costs on one machine, at the size of pictures that it draws by default.

    Attributes:
        schema: of the file, now 1.
        model: what the bundle draws with.
        guidance: as in a schedule; under `classifier_free` every image is two rows.
        deep_start: of `deep` and `tokens`, as in a schedule; None if the bundle has neither.
        selector: of `tokens`, likewise.
        mask: of `masked`, likewise.
        has_block_counts: whether `tokens` takes a token count for each block and branch.
        backend: what ran the engines.
        precision: of matrix products, weights and caches.
        gpu: its name; None if they ran on the processor.
        machine: where.
        num_steps: T, the model evaluations that `conditioning` was measured for.
        rows: at most one for a kind, a token count and a batch size.
        made_by: command and versions.
    """

    schema: Literal[1]
    model: ModelIdentity
    guidance: Literal["classifier_free", "none"]
    deep_start: int | None
    selector: TokenSelector | None
    mask: tuple[str, ...] | None
    has_block_counts: bool
    backend: BackendSpec
    precision: Precision
    gpu: str | None
    machine: Machine
    num_steps: int
    rows: tuple[CostRow, ...]
    made_by: MadeBy

    def __post_init__(self) -> None:
        keys = {(row.kind, row.tokens, row.batch_size) for row in self.rows}
        if len(keys) != len(self.rows):
            raise ValueError("two rows are of one kind, token count and batch size")
        for kind in (Forward.FULL.value, CONDITIONING):
            lacking = [batch_size for batch_size in self.batch_sizes if (kind, 0, batch_size) not in keys]
            if lacking or not self.rows:
                raise ValueError(f"there is no row for `{kind}`, batch sizes {lacking}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is 1 or more, not {self.num_steps}")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes that were measured, in order."""
        return tuple(sorted({row.batch_size for row in self.rows}))

    @property
    def file(self) -> str:
        """Where it lies within its bundle: a machine and GPU have one table there, the one measured last."""
        digest = sha256_of(as_json((self.machine, self.gpu)))
        return f"{COSTS_FOLDER}/{digest[:DIGEST_LENGTH]}.json"

    @property
    def where(self) -> str:
        """The machine in words."""
        on_gpu = "" if self.gpu is None else f"{self.gpu}, "
        return f"{on_gpu}{self.machine.processor}, {self.machine.num_cores} cores"

    def row(self, kind: str, tokens: int, batch_size: int) -> CostRow | None:
        """Return what was measured, None if it was not."""
        wanted = (kind, tokens, batch_size)
        return next((row for row in self.rows if (row.kind, row.tokens, row.batch_size) == wanted), None)

    def milliseconds(self, kind: str, tokens: float, batch_size: int) -> float | None:
        """Return the median time of a kind of step, or of `conditioning` or `vae_decoder`.

        Between two token counts that were measured, and beyond the outermost two, it lies on the line through both;
        but what lies beyond takes at least as long as the smallest count.

        Args:
            kind: as in a row.
            tokens: K, 0 for kinds without.
            batch_size: one of those that were measured.

        Returns:
            None if the kind was not measured for this batch size.
        """
        points = sorted(
            (row.tokens, row.median_ms) for row in self.rows if (row.kind, row.batch_size) == (kind, batch_size)
        )
        return _on_lines(points, tokens) if points else None

    def step_ms(self, step: Step, batch_size: int) -> float | None:
        """Return the time of a step, None if its kind was not measured for this batch size."""
        return self.milliseconds(step.kind, mean_tokens(step), batch_size)

    def trajectory_ms(self, steps: Iterable[Step], batch_size: int) -> float | None:
        """Return the time of all launches of a request, `conditioning` and decoder included.

        Returns:
            None if one of its kinds was not measured for this batch size.
        """
        of_request = [self.milliseconds(CONDITIONING, 0, batch_size)]
        if any(row.kind == VAE_DECODER for row in self.rows):
            of_request.append(self.milliseconds(VAE_DECODER, 0, batch_size))
        times = [*of_request, *(self.step_ms(step, batch_size) for step in steps)]
        known = [time for time in times if time is not None]
        return math.fsum(known) if len(known) == len(times) else None

    def check_model(self, model: ModelIdentity, guidance: str) -> None:
        """Make sure that the table tells the costs of a model.

        Raises:
            BundleError: it was measured of another; the message names both sides.
        """
        if (replace(self.model, name=model.name), self.guidance) != (model, guidance):
            raise BundleError(
                f"the cost table was measured of {_in_words(self.model, self.guidance)}, but here is "
                f"{_in_words(model, guidance)}. Build a bundle of it, and measure that with `hemiola measure BUNDLE`"
            )


def _in_words(model: ModelIdentity, guidance: str) -> str:
    return (
        f"{model.name} ({model.family}, weights {model.weights_sha256[:12]}, latents of shape "
        f"{list(model.latent_shape)}, guidance `{guidance}`)"
    )


def _on_lines(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the height at x of the lines through points, which are in order; see `CostTable.milliseconds`."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(1, bisect_left(points, (x,))), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    weight = (x - x0) / (x1 - x0)
    y = (1 - weight) * y0 + weight * y1  # gives both ends back to the last bit
    return y if 0 <= weight <= 1 else max(y, points[0][1])


def stored_cost_tables(bundle: Path) -> tuple[CostTable, ...]:
    """Read the cost tables that lie in a bundle's folder, of all machines; none if it was never measured.

    Raises:
        BundleError: one is not valid.
    """
    return tuple(read_cost_table(path) for path in sorted((bundle / COSTS_FOLDER).glob("*.json")))


def read_cost_tables(path: Path) -> tuple[CostTable, ...]:
    """Read the cost tables of a bundle, or the one in a file.

    Raises:
        BundleError: there is none, or one is not valid; the message says what to run.
    """
    if not path.is_dir():
        return (read_cost_table(path),)
    if not (path / MANIFEST_FILE).is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST_FILE}. `hemiola build` writes bundles")
    if not (found := stored_cost_tables(path)):
        raise BundleError(f"the bundle {path} has no cost table. Measure it with `hemiola measure {path}`")
    return found


def read_cost_table(path: Path) -> CostTable:
    """Read one cost table.

    Raises:
        BundleError: there is no such file, or it is not a valid table.
    """
    mend = "Measure the bundle again with `hemiola measure BUNDLE`"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read the cost table {path}: {error.strerror}. {mend}") from error
    try:
        return parse(CostTable, text, path.name)
    except ValueError as error:
        raise BundleError(f"{error}. {mend}") from error


def write_cost_table(table: CostTable, path: Path) -> None:
    """Write a cost table atomically."""
    write_json(table, path)
