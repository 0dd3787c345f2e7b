"""What is searched for: a model, a sampler, what steps cost, and how much a schedule may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.codec import as_json
from hemiola_runtime.schedule import (
    DEEP,
    FULL,
    REUSE,
    Forward,
    SchedulerIdentity,
    Step,
    TokenSelector,
    tokens,
)
from hemiola_runtime.solver_table import SolverTable
from hemiola_search.budget import TOLERANCE, Budget
from hemiola_search.costs import Costs, FlopsModel
from hemiola_search.errors import SearchError

Effort = Literal["quick", "thorough"]
SMALLEST_ERROR: Final = 1e-9  # that counts: what float32 leaves of two equal trajectories


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What a user asks of a search.

    Attributes:
        v_min: fewest cached steps after a full one (ProCache).
        v_max: most; None for the mean segment, rounded up.
        selective: forward of ProCache's selective steps; `none` leaves them cached.
        token_ratio: K / N of selective steps.
        deep_ratio: share of the blocks that are deep; ProCache's is a quarter.
        selector: how tokens are ranked.
        max_order: of forecasts; 0 where caches are repeated only.
        guidance_scale: of the trajectories that schedules are scored on.
        num_images: images that candidates are scored on.
        num_held_out: other images, for the figures of the result.
        effort: how many schedules are tried.
        seed: of all noise, and of every choice by chance.
    """

    v_min: int
    v_max: int | None
    selective: Literal["tokens", "deep", "none"]
    token_ratio: float
    deep_ratio: float
    selector: TokenSelector
    max_order: int
    guidance_scale: float
    num_images: int
    num_held_out: int
    effort: Effort
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.token_ratio <= 1 or not 0 <= self.deep_ratio <= 1:
            raise SearchError("token_ratio lies above 0 and deep_ratio from 0, both up to 1")
        if self.seed < 0 or not math.isfinite(self.guidance_scale):
            raise SearchError("the seed is 0 or more, and guidance_scale a finite number")
        if self.num_images < 1 or self.num_held_out < 2:
            raise SearchError("a search scores on 1 image or more and reports on 2 or more")
        if self.max_order not in (0, 1, 2, 3):
            raise SearchError(f"max_order is 0, 1, 2 or 3, not {self.max_order}")


@dataclass(frozen=True)
class Candidate:
    """A schedule that a strategy proposes.

    Attributes:
        strategy: which proposes it.
        name: what tells it from the strategy's others.
        num_steps: T of its scheduler; only `fewer_steps` differs from the problem's.
        steps: one per model evaluation.
        deep_start: first deep block; None if no step is `deep` or `tokens`.
        selector: how tokens are ranked; None if no step is `tokens`.
        mask: what `masked` computes; None if no step is `masked`.
    """

    strategy: str
    name: str
    num_steps: int
    steps: tuple[Step, ...]
    deep_start: int | None = None
    selector: TokenSelector | None = None
    mask: tuple[str, ...] | None = None

    @cached_property
    def key(self) -> str:
        """Digest of what it computes, whoever proposes it."""
        return sha256_of(as_json(replace(self, strategy="", name="")))[:24]

    @property
    def rhythm(self) -> str:
        """Its steps as letters."""
        return "".join(step.symbol for step in self.steps)

    @property
    def num_full(self) -> int:
        """How many steps are `full`."""
        return sum(step.forward is Forward.FULL for step in self.steps)

    @property
    def has_block_counts(self) -> bool:
        """Whether blocks have token counts of their own."""
        return any(isinstance(step.tokens, tuple) for step in self.steps)


@dataclass(frozen=True)
class Problem:
    """A model, a sampler and a limit.

    Attributes:
        table: solver table of the scheduler for some number of steps; raises UnsupportedSolverError if it has none.
        num_inference_steps: T.
        guidance: `classifier_free` or `none`.
        options: what the user asks for.
        latent_shape: (C, H, W).
        grid: (rows, columns) of tokens.
        num_blocks: L.
        branches: of a block, in order; self-attention is the first.
        costs: of steps.
        flops: of steps, whatever they cost.
        budget: how much a schedule may cost.
    """

    table: Callable[[int], SolverTable]
    num_inference_steps: int
    guidance: Literal["classifier_free", "none"]
    options: SearchOptions
    latent_shape: tuple[int, int, int]
    grid: tuple[int, int]
    num_blocks: int
    branches: tuple[str, ...]
    costs: Costs
    flops: FlopsModel
    budget: Budget

    @property
    def scheduler(self) -> SchedulerIdentity:
        """What the schedule is for."""
        return self.table(self.num_inference_steps).scheduler

    @cached_property
    def num_evaluations(self) -> int:
        """Steps that a schedule has."""
        return len(self.scheduler.timesteps)

    @property
    def num_tokens(self) -> int:
        """N."""
        return math.prod(self.grid)

    @property
    def deep_start(self) -> int:
        """First deep block of ProCache; 21 of 28 for a quarter."""
        return self.num_blocks - round(self.num_blocks * self.options.deep_ratio)

    @cached_property
    def limit(self) -> float:
        """What a schedule may cost, in the unit of the costs."""
        return self.budget.limit(self.costs, self.num_evaluations)

    def cost(self, candidate: Candidate) -> float:
        """Return what a candidate costs."""
        return self.costs.schedule(candidate.steps, candidate.deep_start, candidate.mask)

    def fits(self, candidate: Candidate) -> bool:
        """Tell whether a candidate costs no more than the limit."""
        return self.cost(candidate) <= self.limit * (1 + TOLERANCE)

    def max_full(self, other: Step = REUSE, deep_start: int | None = None) -> int:
        """Return how many steps can be full where all others are `other`; 0 where even one costs too much.

        Where `other` forecasts, the steps behind the first full ones repeat the cache or forecast by fewer of them: the
        dearest of all these counts.
        """
        lower = [replace(other, forecast=other.forecast[: order + 1]) for order in range(1, other.order)]
        cached = [other, *lower, *([REUSE] if other.order else [])]
        full = self.costs.step(FULL, deep_start, None)
        cheap = max(self.costs.step(step, deep_start, None) for step in cached)
        left = self.limit * (1 + TOLERANCE) - self.costs.around(self.num_evaluations) - self.num_evaluations * cheap
        if full <= cheap:  # where caching saves nothing, as it may in small models that were measured
            return self.num_evaluations if left >= self.num_evaluations * (full - cheap) else 0
        return max(0, min(self.num_evaluations, math.floor(left / (full - cheap))))

    def first_fitting(self, candidates: Iterable[Candidate]) -> Candidate:
        """Return the first candidate that costs no more than the limit.

        Raises:
            SearchError: none does.
        """
        for candidate in candidates:
            if self.fits(candidate):
                return candidate
        raise SearchError(f"no such schedule keeps to {self.budget}: {self.limit:.4g} {self.costs.unit}")

    def candidate(self, strategy: str, name: str, steps: tuple[Step, ...]) -> Candidate:
        """Make a candidate of full steps, cached ones, and the deep or token steps of ProCache."""
        is_deep = any(step.forward in (Forward.DEEP, Forward.TOKENS) for step in steps)
        is_selective = any(step.forward is Forward.TOKENS for step in steps)
        return Candidate(
            strategy,
            name,
            self.num_inference_steps,
            steps,
            self.deep_start if is_deep else None,
            self.options.selector if is_selective else None,
        )

    @property
    def selective_step(self) -> Step | None:
        """What a selective step of ProCache is, None if there are none."""
        if self.options.selective == "none" or self.deep_start == self.num_blocks:
            return None
        if self.options.selective == "deep":
            return DEEP
        return tokens(max(1, round(self.num_tokens * self.options.token_ratio)))


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its figures.

    Attributes:
        candidate: what was scored.
        samples: of each image, by name, as `relative_l2`.
        totals: of all images together, as `frechet`.
        path: relative L2 of the sample behind every step; empty where it was not followed, or has other steps.
    """

    candidate: Candidate
    samples: dict[str, tuple[float, ...]]
    totals: dict[str, float]
    path: tuple[float, ...] = ()

    @property
    def quality(self) -> dict[str, float]:
        """All figures by name, means over the images."""
        return {name: math.fsum(values) / len(values) for name, values in self.samples.items()} | self.totals

    @property
    def diverges(self) -> bool:
        """Whether its trajectory ends in numbers that are not finite; it has no figures then."""
        return not math.isfinite(self.error)

    @property
    def error(self) -> float:
        """What is made small: the relative L2 of the final latents, its geometric mean over the images.

        Few images are searched on, and one among them whose trajectory is easily led astray would decide alone in a
        plain mean.
        """
        logs = [math.log(max(value, SMALLEST_ERROR)) for value in self.samples["relative_l2"]]
        return math.exp(math.fsum(logs) / len(logs))
