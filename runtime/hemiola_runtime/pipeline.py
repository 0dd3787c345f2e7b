"""What the graphs of a model compute, whatever runs them, and which schedules fit that. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.graphs import STEP_TABLE
from hemiola_runtime.schedule import ModelIdentity, Schedule, Step, TokenSelector

Size = tuple[int, int]  # (H, W) of latents


@dataclass(frozen=True, slots=True)
class TextSpec:
    """What prompts become.

    Attributes:
        num_tokens: S, tokens of a prompt with its padding; longer prompts are cut. Each becomes an embedding (D,).
    """

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the graphs compute, whatever runs them.

    Sizes are (H, W) in latents.

    Attributes:
        model: the model they were exported from; its latent shape is that of the size that is drawn by default.
        guidance: `classifier_free` or `none`.
        num_blocks: L.
        width: D.
        patch_size: p; a token stands for p × p latents.
        branches: modules of a block that are cached, in the order of their residual sums.
        state_rows: 1 + k, the sample and the solver's history.
        deep_start: first deep block of `deep` and `tokens`, None if neither was exported.
        selector: of `tokens`, None if it was not exported.
        mask: of `masked`, None if it was not exported.
        has_block_counts: whether `tokens` takes a token count for each block and branch.
        labels: class label → what people call it; empty where images are drawn of prompts.
        text: of prompts; None where images are drawn of labels.
        min_size: smallest H and W that can be drawn.
        max_size: largest; the same as the smallest where all pictures have one size.
        pixels_per_latent: side of the square of pixels that a latent becomes; 1 for a model of pixels.
        image_channels: of a picture; 3 RGB, 1 grey.
        tile_size: H and W of the latents that the decoder takes at once, where larger ones are cut; None if it takes
            all.
        guidance_scale: of requests that name none: what the first schedule was searched with.
    """

    model: ModelIdentity
    guidance: Literal["classifier_free", "none"]
    num_blocks: int
    width: int
    patch_size: int
    branches: tuple[str, ...]
    state_rows: int
    deep_start: int | None
    selector: TokenSelector | None
    mask: tuple[str, ...] | None
    has_block_counts: bool
    labels: dict[str, str]
    text: TextSpec | None
    min_size: Size
    max_size: Size
    pixels_per_latent: int
    image_channels: int
    tile_size: int | None
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if list(self.labels) != [str(label) for label in range(len(self.labels))]:
            raise ValueError("labels are numbered from 0, one after the other")
        if bool(self.labels) == (self.text is not None):
            raise ValueError("images are drawn of labels or of prompts, one of the two")
        if min(self.patch_size, self.pixels_per_latent, self.image_channels, self.tile_size or 1) < 1:
            raise ValueError("patch_size, pixels_per_latent, image_channels and tile_size are 1 or more")
        for least, side, most in zip(self.min_size, self.size, self.max_size, strict=True):
            if not 1 <= least <= side <= most:
                raise ValueError(f"the sides {least} ≤ {side} ≤ {most} of a picture are out of order")

    @property
    def size(self) -> Size:
        """(H, W) that is drawn by default."""
        return self.model.latent_shape[1:]

    @property
    def has_one_size(self) -> bool:
        """Whether all pictures have that size."""
        return self.min_size == self.max_size

    @property
    def num_tokens(self) -> int:
        """N at that size."""
        return self.tokens_of(self.size)

    @property
    def rows_per_image(self) -> int:
        """2 under classifier-free guidance, else 1."""
        return 2 if self.guidance == "classifier_free" else 1

    def tokens_of(self, size: Size) -> int:
        """Return N at some size."""
        return math.prod(self.grid_of(size))

    def grid_of(self, size: Size) -> tuple[int, int]:
        """Return (rows, columns) of tokens at some size."""
        return size[0] // self.patch_size, size[1] // self.patch_size

    def image_shape(self, size: Size) -> tuple[int, int, int]:
        """Return (height, width, channels) of a picture of some size."""
        return size[0] * self.pixels_per_latent, size[1] * self.pixels_per_latent, self.image_channels

    def is_tiled(self, size: Size) -> bool:
        """Tell whether latents of some size are decoded in tiles."""
        return self.tile_size is not None and max(size) > self.tile_size

    def tile_of(self, size: Size) -> Size:
        """Return (H, W) of what the decoder takes at once of latents of some size."""
        if self.tile_size is None:
            return size
        return min(size[0], self.tile_size), min(size[1], self.tile_size)

    @property
    def demanding_sizes(self) -> set[Size]:
        """The sizes one of which takes the most memory: the largest, and the largest that is decoded at once."""
        tile = self.tile_of(self.max_size)
        is_drawn = all(least <= side for least, side in zip(self.min_size, tile, strict=True))
        return {self.max_size, tile} if is_drawn else {self.max_size}

    def symbols(self, batch_size: int, num_evaluations: int, size: Size | None = None) -> dict[str, int]:
        """Return the number behind every symbol of a shape; K, which differs from step to step, is 0."""
        size = self.size if size is None else size
        rows = batch_size * self.rows_per_image
        grid, (height, width, _) = self.grid_of(size), self.image_shape(size)
        return {
            "B": batch_size,
            "R": rows,
            "K": 0,
            "T": num_evaluations,
            STEP_TABLE: num_evaluations * rows,
            "N": math.prod(grid),
            "rows": grid[0],
            "columns": grid[1],
            "height": height,
            "width": width,
        }

    def selected_tokens(self, step: Step, size: Size) -> dict[str, int]:
        """Return K of a step at some size, by its symbol: the share of tokens that the schedule recomputes at its own.

        Where every block has a count of its own, those too; 0 for a step without.
        """
        deep = range(self.deep_start or 0, self.num_blocks)
        counts = token_counts(step, self.branches, deep, has_block_counts=self.has_block_counts)
        share = self.tokens_of(size) / self.num_tokens
        return {symbol: max(1, round(count * share)) if count else 0 for symbol, count in counts.items()}

    def check_schedule(self, schedule: Schedule, kinds: set[str]) -> None:
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
        if missing := sorted(set(schedule.kinds) - kinds):
            raise ScheduleError(
                f"the schedule runs `{', '.join(missing)}`, but only {', '.join(sorted(kinds))} were exported. "
                "Export again with this schedule among the others"
            )
        for name, wanted, here in (
            ("deep_start", schedule.deep_start, self.deep_start),
            ("selector", schedule.selector, self.selector),
            ("mask", schedule.mask, self.mask),
        ):
            if wanted is not None and wanted != here:
                raise ScheduleError(
                    f"the schedule needs {name} = {wanted}, but the graphs were exported with {name} = {here}. "
                    "Export again with this schedule"
                )
        if schedule.has_block_counts and not self.has_block_counts:
            raise ScheduleError(
                "the schedule has a token count for each block, but the graphs were exported with one for all. Export "
                "again with this schedule"
            )
        for i, step in enumerate(schedule.steps):
            if step.max_tokens > self.num_tokens:
                raise ScheduleError(f"step {i} recomputes {step.max_tokens} tokens, but an image has {self.num_tokens}")
            if isinstance(step.tokens, tuple):
                self._check_counts(i, step.tokens)

    def _check_counts(self, step: int, counts: tuple[tuple[int, ...], ...]) -> None:
        found = [len(branch) for branch in counts]
        taken = [self.num_blocks - (self.deep_start or 0) for _ in self.branches[1:]]
        if found != taken:
            mine, theirs = (" + ".join(map(str, lengths)) for lengths in (taken, found))
            raise ScheduleError(
                f"step {step} has token counts for {theirs} blocks, but the graphs take them for {mine}: one for each "
                "deep block of each branch but self-attention"
            )


def token_counts(step: Step, branches: Sequence[str], deep: range, *, has_block_counts: bool) -> dict[str, int]:
    """Return the number behind K, and behind K of every branch and block that has a count of its own.

    Args:
        step: any.
        branches: of the model; self-attention, which `tokens` never computes, is the first.
        deep: blocks.
        has_block_counts: whether each has a count of its own.
    """
    counts = {"K": step.max_tokens}
    if step.tokens is not None and has_block_counts:
        by_branch = step.tokens if isinstance(step.tokens, tuple) else ((step.tokens,) * len(deep),) * len(branches[1:])
        for branch, by_block in zip(branches[1:], by_branch, strict=True):
            counts |= {f"K.{branch}.{block}": n for block, n in zip(deep, by_block, strict=True)}
    return counts
