"""Schedules: which forward runs at each denoising step; the only reader and writer of `schedule.json`.

A schedule is bound to one model, scheduler, step count and latent shape. This module needs the standard library only
and knows nothing of engines, of bundles or of how schedules are found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

from hemiola_runtime.artifacts import MadeBy, sha256_of
from hemiola_runtime.codec import encode, parse, write_json
from hemiola_runtime.errors import ScheduleError

MAX_STEPS: Final = 10_000
MAX_ORDER: Final = 4  # of a forecast
COMPUTED: Final = "x"  # letters of a mask
CACHED: Final = "."


class Forward(str, Enum):
    """The work done for one model evaluation."""

    FULL = "full"
    DEEP = "deep"
    MASKED = "masked"
    TOKENS = "tokens"
    REUSE = "reuse"
    RESIDUAL = "residual"

    @property
    def symbol(self) -> str:
        """One letter for rhythms: F full, D deep, M masked, S selective (tokens), C cached (reuse), R residual."""
        return {"full": "F", "deep": "D", "masked": "M", "tokens": "S", "reuse": "C", "residual": "R"}[self.value]


@dataclass(frozen=True, slots=True)
class Step:
    """What one model evaluation does.

    What it does not compute it reads from the cache: as it was last computed, or as a *forecast*, a weighted sum of
    what the last full steps computed. Forecasts are data: the weights come from whoever finds the schedule.

    Attributes:
        forward: which forward.
        tokens: K, the number of tokens that `tokens` recomputes in each deep block; or K of every deep block, for each
            branch that is recomputed, in the model's order. None for the other forwards.
        forecast: weights of what the last full steps computed, the newest first; empty to take the newest as it is.
    """

    forward: Forward
    tokens: int | tuple[tuple[int, ...], ...] | None = None
    forecast: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.forward is Forward.TOKENS:
            if self.tokens is None or not self.counts or min(self.counts) < 1:
                raise ValueError(f"a step of `tokens` recomputes 1 token or more, not {self.tokens}; 0 is `reuse`")
        elif self.tokens is not None:
            raise ValueError(f"`{self.forward.value}` takes no token count, found {self.tokens}")
        if self.forecast and self.forward is Forward.FULL:
            raise ValueError("`full` reads no cache, so it takes no forecast")
        if len(self.forecast) == 1 or len(self.forecast) > MAX_ORDER + 1:
            raise ValueError(f"a forecast has 2 to {MAX_ORDER + 1} weights, not {len(self.forecast)}")
        if self.forecast and not (all(map(math.isfinite, self.forecast)) and self.forecast[0]):
            raise ValueError("the weights of a forecast are finite, and the newest one's is not 0")

    @property
    def order(self) -> int:
        """Of the forecast: how many full steps before the last it looks back."""
        return max(0, len(self.forecast) - 1)

    @property
    def kind(self) -> str:
        """Name of the graph that does it: the forward's, with the order of its forecast, as in `reuse_2`."""
        return f"{self.forward.value}_{self.order}" if self.order else self.forward.value

    @property
    def symbol(self) -> str:
        """One letter for rhythms: the forward's, or the order of its forecast for a step that only reuses."""
        return KINDS[self.kind]

    @property
    def counts(self) -> tuple[int, ...]:
        """Token counts, of whichever blocks; none for forwards without."""
        if self.tokens is None or isinstance(self.tokens, int):
            return () if self.tokens is None else (self.tokens,)
        return tuple(count for branch in self.tokens for count in branch)

    @property
    def max_tokens(self) -> int:
        """The largest of them, 0 for forwards without."""
        return max(self.counts, default=0)


ORDER_SYMBOLS: Final = {Forward.REUSE: ("1", "2", "3", "4"), Forward.RESIDUAL: ("¹", "²", "³", "⁴")}
KINDS: Final[Mapping[str, str]] = {forward.value: forward.symbol for forward in Forward} | {  # with their letters
    f"{forward.value}_{order}": ORDER_SYMBOLS.get(forward, (forward.symbol,) * MAX_ORDER)[order - 1]
    for forward in Forward
    if forward is not Forward.FULL
    for order in range(1, MAX_ORDER + 1)
}

FULL: Final = Step(Forward.FULL)
DEEP: Final = Step(Forward.DEEP)
MASKED: Final = Step(Forward.MASKED)
REUSE: Final = Step(Forward.REUSE)
RESIDUAL: Final = Step(Forward.RESIDUAL)


def keeps_residual(kinds: Iterable[str]) -> bool:
    """Tell whether some kind of step reads the residual of the whole model."""
    return any(kind.partition("_")[0] == Forward.RESIDUAL.value for kind in kinds)


def keeps_layers(kinds: Iterable[str]) -> bool:
    """Tell whether some kind of step reads what single layers left."""
    return any(kind.partition("_")[0] not in (Forward.FULL.value, Forward.RESIDUAL.value) for kind in kinds)


def tokens(count: int | tuple[tuple[int, ...], ...]) -> Step:
    """Make a step that recomputes `count` tokens in each deep block."""
    return Step(Forward.TOKENS, count)


@dataclass(frozen=True, slots=True)
class TokenSelector:
    """How `tokens` ranks tokens: score + staleness_weight · staleness, raised for each neighbourhood's best.

    Attributes:
        score: `attention`: how much a token is attended to, the column mean of the softmax map (ToCa s1, arXiv
            2410.05317 §3.2); `value_norm`: L2 norm of its value vectors, summed over heads; `output_norm`: L2 norm of
            its attention output (ProCache, arXiv 2512.17298); `cross_attention_entropy`: how evenly it looks at the
            prompt (ToCa s2); `random`: a fixed random number per block and token. All but `random` are L2-normalised
            over the tokens of an image.
        staleness_weight: added for each `tokens` step since the token was last computed (ToCa s3: λ3 / period).
        spatial_bonus: λ4 of ToCa s4: the best token of each square of tokens gets score · (1 + λ4).
        spatial_size: side of these squares in tokens; divides both sides of the token grid.
        seed: of the numbers of `random`.
    """

    score: Literal["attention", "value_norm", "output_norm", "cross_attention_entropy", "random"]
    staleness_weight: float
    spatial_bonus: float
    spatial_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.staleness_weight < 0 or self.spatial_bonus < 0:
            raise ValueError("staleness_weight and spatial_bonus are 0 or more")
        if self.spatial_size < 1:
            raise ValueError(f"spatial_size is 1 or more, not {self.spatial_size}")

    @property
    def has_squares(self) -> bool:
        """Whether some tokens are raised above their neighbours."""
        return self.spatial_bonus > 0 and self.spatial_size > 1


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model a schedule was made for.

    Attributes:
        family: key of the model family, as in `dit`.
        name: how people call it; not compared.
        weights_sha256: digest of the transformer's weight files.
        latent_shape: (C, H, W) of one image's latents.
    """

    family: str
    name: str
    weights_sha256: str
    latent_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape {list(self.latent_shape)} has an empty side")


@dataclass(frozen=True, slots=True)
class SchedulerIdentity:
    """The diffusers scheduler a schedule was made for, and the model evaluations it asks for.

    Attributes:
        class_name: as in `DDIMScheduler`.
        config: its configuration, without the keys that begin with an underscore.
        num_inference_steps: T as given to `set_timesteps`.
        timesteps: one per model evaluation, noisiest first; more than T for PNDM or Heun.
    """

    class_name: str
    config: dict[str, Any]
    num_inference_steps: int
    timesteps: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.timesteps) <= MAX_STEPS:
            raise ValueError(f"{len(self.timesteps)} timesteps; a schedule has 1 to {MAX_STEPS}")

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that stand for everything above."""
        ordered = {key: self.config[key] for key in sorted(self.config)}
        return sha256_of(str(encode(replace(self, config=ordered))).encode())[:16]

    @property
    def label(self) -> str:
        """How people call it, as in `DDIM-50`."""
        return f"{self.class_name.removesuffix('Scheduler')}-{self.num_inference_steps}"

    def difference(self, other: SchedulerIdentity) -> str:
        """Say where two identities differ, for messages; empty where they are equal."""
        if self.class_name != other.class_name:
            return f"{self.class_name} against {other.class_name}"
        if self.num_inference_steps != other.num_inference_steps:
            return f"{self.num_inference_steps} steps against {other.num_inference_steps}"
        for key in sorted({*self.config, *other.config}):
            if (mine := self.config.get(key)) != (theirs := other.config.get(key)):
                return f"{key} = {mine!r} against {theirs!r}"
        return "" if self.timesteps == other.timesteps else "the same configuration, but other timesteps"


@dataclass(frozen=True, slots=True)
class FoundBy:
    """How a schedule was found: strategy, its arguments, the seed, and what made the file."""

    strategy: str
    arguments: dict[str, Any]
    seed: int
    made_by: MadeBy


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which forward runs at each model evaluation, and what that choice is bound to.

    Attributes:
        schema: of the file, now 2.
        model: what it was made for.
        scheduler: what it was made for.
        guidance: `classifier_free` (every image is two rows) or `none`.
        deep_start: index of the first deep block, where `deep` and `tokens` begin to compute; None if neither occurs.
        selector: how tokens are ranked; None if `tokens` does not occur.
        mask: what `masked` computes: for each branch of the model a string with one letter for each block, `x` if it is
            computed, `.` if it comes from the cache. None if `masked` does not occur.
        steps: one per model evaluation; step 0 is the noisiest.
        found_by: where it comes from.
        measured: quality and cost figures by name, as `relative_l2` or `tera_flops_per_image`.
    """

    schema: Literal[2]
    model: ModelIdentity
    scheduler: SchedulerIdentity
    guidance: Literal["classifier_free", "none"]
    deep_start: int | None
    selector: TokenSelector | None
    mask: tuple[str, ...] | None
    steps: tuple[Step, ...]
    found_by: FoundBy
    measured: dict[str, float]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.scheduler.timesteps):
            raise ValueError(
                f"{len(self.steps)} steps for the {len(self.scheduler.timesteps)} model evaluations "
                f"of {self.scheduler.label}; a schedule has one step per evaluation"
            )
        if self.steps[0].forward is not Forward.FULL:
            raise ValueError(
                f"step 0 is `{self.steps[0].forward.value}`, but nothing is cached before the first step. "
                "Make it `full`"
            )
        is_deep = bool({Forward.DEEP, Forward.TOKENS} & set(self.counts))
        if is_deep != (self.deep_start is not None):
            raise ValueError("deep_start is given exactly when a step is `deep` or `tokens`")
        if self.deep_start is not None and self.deep_start < 0:
            raise ValueError(f"deep_start is 0 or more, not {self.deep_start}")
        if (Forward.TOKENS in self.counts) != (self.selector is not None):
            raise ValueError("a selector is given exactly when a step is `tokens`")
        if (Forward.MASKED in self.counts) != (self.mask is not None):
            raise ValueError("a mask is given exactly when a step is `masked`")
        if self.mask is not None:
            check_mask(self.mask)
        num_computed = 0
        for i, step in enumerate(self.steps):
            if step.order >= max(1, num_computed):
                raise ValueError(
                    f"step {i} forecasts by {step.order + 1} full steps, but only {num_computed} come before it. "
                    "Lower the order of its forecast"
                )
            num_computed += step.forward is Forward.FULL

    @property
    def counts(self) -> Counter[Forward]:
        """How often each forward occurs."""
        return Counter(step.forward for step in self.steps)

    @property
    def rhythm(self) -> str:
        """The schedule as a string of letters, as in `FCSCFCSC`."""
        return "".join(step.symbol for step in self.steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The graphs that it takes, each once."""
        return tuple(dict.fromkeys(step.kind for step in self.steps))

    @property
    def order(self) -> int:
        """The highest order of its forecasts."""
        return max(step.order for step in self.steps)

    @property
    def has_block_counts(self) -> bool:
        """Whether some step recomputes other numbers of tokens in other blocks."""
        return any(isinstance(step.tokens, tuple) for step in self.steps)

    @property
    def num_full(self) -> int:
        """How many steps are `full`."""
        return self.counts[Forward.FULL]

    @property
    def summary(self) -> str:
        """The counts in words, as in `17 full, 23 reuse, 10 tokens`."""
        counts = Counter(step.kind for step in self.steps)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())

    def segments(self) -> list[tuple[int, int]]:
        """Run-length form of the segments that each begin with a full step: (length, how many in a row)."""
        lengths = [1 + len(rest) for rest in self.rhythm.split("F")[1:]]
        return [(length, len(list(run))) for length, run in groupby(lengths)]

    def uncached(self) -> Schedule:
        """Return the schedule that computes everything at every step: what this one is measured against."""
        return replace(
            self,
            deep_start=None,
            selector=None,
            mask=None,
            steps=(FULL,) * len(self.steps),
            found_by=replace(self.found_by, strategy="full", arguments={}),
            measured={},
        )


def check_mask(mask: tuple[str, ...]) -> None:
    """Make sure that a mask is one.

    Raises:
        ValueError: it is not.
    """
    letters = {letter for blocks in mask for letter in blocks}
    if len({len(blocks) for blocks in mask}) != 1 or not {COMPUTED} <= letters <= {COMPUTED, CACHED}:
        raise ValueError(
            f"{list(mask)} is no mask: strings of x and . as long as there are blocks, with an x somewhere"
        )


def read_schedule(path: Path) -> Schedule:
    """Read a schedule.

    Raises:
        ScheduleError: there is no such file, or it is not a valid schedule.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ScheduleError(f"cannot read the schedule {path}: {error.strerror}") from error
    try:
        return parse(Schedule, text, path.name)
    except ValueError as error:
        raise ScheduleError(f"{error}. `hemiola search` writes valid schedules") from error


def write_schedule(schedule: Schedule, path: Path) -> None:
    """Write a schedule atomically."""
    write_json(schedule, path)
