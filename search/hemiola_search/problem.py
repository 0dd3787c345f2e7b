"""What is searched for, and what a strategy answers with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hemiola_runtime.schedule import DEEP, Forward, SchedulerIdentity, Step, TokenSelector, tokens
from hemiola_runtime.solver_table import SolverTable
from hemiola_search.costs import FlopsModel
from hemiola_search.errors import SearchError


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What a user asks of a search.

    Attributes:
        budget: B, full steps of the T.
        v_min: fewest cached steps after a full one (ProCache).
        v_max: most; None for the mean segment, rounded up.
        selective: forward of ProCache's selective steps; `none` leaves them cached.
        token_ratio: K / N of selective steps.
        deep_ratio: share of the blocks that are deep; ProCache's is a quarter.
        selector: how tokens are ranked.
        guidance_scale: of the trajectories that schedules are scored on.
        num_images: images that candidates are scored on.
        num_held_out: other images, for the figures of the result.
        seed: of all noise.
    """

    budget: int
    v_min: int
    v_max: int | None
    selective: Literal["tokens", "deep", "none"]
    token_ratio: float
    deep_ratio: float
    selector: TokenSelector
    guidance_scale: float
    num_images: int
    num_held_out: int
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.token_ratio <= 1 or not 0 <= self.deep_ratio <= 1:
            raise SearchError("token_ratio lies above 0 and deep_ratio from 0, both up to 1")
        if self.seed < 0 or not math.isfinite(self.guidance_scale):
            raise SearchError("the seed is 0 or more, and guidance_scale a finite number")
        if self.num_images < 1 or self.num_held_out < 2:
            raise SearchError("a search scores on 1 image or more and reports on 2 or more")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that a strategy proposes.

    Attributes:
        strategy: which proposes it.
        name: what tells it from the strategy's others.
        num_steps: T of its scheduler; only `fewer_steps` differs from the problem's.
        steps: one per model evaluation.
    """

    strategy: str
    name: str
    num_steps: int
    steps: tuple[Step, ...]

    @property
    def is_deep(self) -> bool:
        """Whether it has deep blocks at all."""
        return any(step.forward in (Forward.DEEP, Forward.TOKENS) for step in self.steps)

    @property
    def is_selective(self) -> bool:
        """Whether it selects tokens."""
        return any(step.forward is Forward.TOKENS for step in self.steps)


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, a sampler and a budget.

    Attributes:
        table: solver table of the scheduler for some number of steps; raises UnsupportedSolverError if it has none.
        num_inference_steps: T.
        guidance: `classifier_free` or `none`.
        options: what the user asks for.
        latent_shape: (C, H, W).
        num_blocks: L.
        num_tokens: N.
        flops: cost of a step.
    """

    table: Callable[[int], SolverTable]
    num_inference_steps: int
    guidance: Literal["classifier_free", "none"]
    options: SearchOptions
    latent_shape: tuple[int, int, int]
    num_blocks: int
    num_tokens: int
    flops: FlopsModel

    @property
    def scheduler(self) -> SchedulerIdentity:
        """What the schedule is for."""
        return self.table(self.num_inference_steps).scheduler

    @property
    def num_evaluations(self) -> int:
        """Steps that a schedule has."""
        return len(self.scheduler.timesteps)

    @property
    def deep_start(self) -> int:
        """First deep block; 21 of 28 for a quarter."""
        return first_deep_block(self.num_blocks, self.options.deep_ratio)

    @property
    def selective_step(self) -> Step | None:
        """What a selective step is, None if there are none."""
        if self.options.selective == "none" or self.deep_start == self.num_blocks:
            return None
        if self.options.selective == "deep":
            return DEEP
        return tokens(max(1, round(self.num_tokens * self.options.token_ratio)))


def first_deep_block(num_blocks: int, deep_ratio: float) -> int:
    """Return the index of the first deep block."""
    return num_blocks - round(num_blocks * deep_ratio)


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its quality figures by name, as `relative_l2`."""

    candidate: Candidate
    quality: dict[str, float]


Score = Callable[[Candidate], Scored]
Strategy = Callable[[Problem, Score], Sequence[Scored]]  # returns what it tried, the best first
