"""Bundles for the tests that run engines; each is made once per test session, by the fixtures of conftest.py."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from hemiola_engines.build import build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_export.export import export_pipeline
from hemiola_export.families import Family
from hemiola_export.model import Model, load_model
from hemiola_export.sizes import Sizes
from hemiola_export.solver import scheduler_identity
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import DEEP, FULL, MASKED, RESIDUAL, REUSE, FoundBy, Schedule, Step, TokenSelector, tokens

DIGITS: Final = Path(__file__).parents[1] / "examples" / "digits"
RELEASED_RHYTHM: Final = "FCSCFCSCFCSCFCSCFCSCFCSCFCSFCSFCSFCSFCFCFCFCFCFCFC"  # ProCache's for DiT-XL/2, DDIM-50
SELECTOR: Final = TokenSelector("value_norm", staleness_weight=0.0625, spatial_bonus=0.6, spatial_size=2, seed=0)


@dataclass(frozen=True, slots=True)
class Made:
    """A model folder, what was exported from it, and the bundle that was built."""

    model: Path
    graphs: Path
    bundle: Path


def extrapolation(step: int, places: Sequence[int]) -> tuple[float, ...]:
    """Return the weights by which values at some steps add up to the polynomial through them at another."""
    return tuple(math.prod((step - other) / (place - other) for other in places if other != place) for place in places)


def checkered_mask(family: Family) -> tuple[str, ...]:
    """Make a mask in which every other branch is computed."""
    num_blocks = len(family.blocks)
    return tuple("".join(".x"[(i + j) % 2] for j in range(num_blocks)) for i in range(len(family.branches)))


def schedule_from_rhythm(
    model: Model,
    scheduler: Any,
    rhythm: str,
    *,
    num_inference_steps: int | None = None,
    num_tokens: int | tuple[tuple[int, ...], ...] = 4,
    deep_start: int = 2,
    guidance: Literal["classifier_free", "none"] = "classifier_free",
    selector: TokenSelector = SELECTOR,
) -> Schedule:
    """Make a schedule for a model from letters.

    F full, D deep, M masked, S tokens, C reuse; d, m and s with a forecast of order 1, 1 and 2 reuse with one of that
    order, and ¹ and ² the residual, as the polynomial through the last full steps is continued.
    """
    forwards = set(rhythm.upper())
    return Schedule(
        schema=2,
        model=model.identity,
        scheduler=scheduler_identity(scheduler, num_inference_steps or len(rhythm)),
        guidance=guidance,
        deep_start=deep_start if forwards & {"D", "S"} else None,
        selector=selector if "S" in forwards else None,
        mask=checkered_mask(model.family) if "M" in forwards else None,
        steps=tuple(_step(rhythm, i, num_tokens) for i in range(len(rhythm))),
        found_by=FoundBy("by_hand", {}, 0, MadeBy.here()),
        measured={},
    )


def _step(rhythm: str, index: int, num_tokens: int | tuple[tuple[int, ...], ...]) -> Step:
    plain = {"F": FULL, "D": DEEP, "M": MASKED, "S": tokens(num_tokens), "C": REUSE}
    letter = rhythm[index]
    if letter in plain:
        return plain[letter]
    order = unicodedata.digit(letter, 1)
    full = [i for i in range(index) if rhythm[i] == "F"][: -order - 2 : -1]  # the last order + 1, newest first
    cached = REUSE if letter.isascii() else RESIDUAL
    return replace(plain.get(letter.upper(), cached), forecast=extrapolation(index, full))


def make_bundle(
    folder: Path, model: Path, schedules: dict[str, Schedule], max_batch_size: int, sizes: Sizes | None = None
) -> Made:
    """Export and build."""
    graphs, bundle = folder / "graphs", folder / "bundle"
    export_pipeline(load_model(str(model)), schedules, graphs, sizes=sizes)
    build_bundle(graphs, bundle, BuildOptions("onnxruntime", max_batch_size))
    return Made(model, graphs, bundle)


def rebound(schedule: Schedule, **changes: Any) -> Schedule:
    """Return a schedule that claims to be made for another model."""
    return replace(schedule, model=replace(schedule.model, **changes))
