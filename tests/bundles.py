"""Bundles for the tests that run engines; each is made once per test session, by the fixtures of conftest.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from hemiola_engines.build import build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_export.export import export_pipeline
from hemiola_export.model import Model, load_model
from hemiola_export.sizes import Sizes
from hemiola_export.solver import scheduler_identity
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import DEEP, FULL, REUSE, FoundBy, Schedule, Step, TokenSelector, tokens

DIGITS: Final = Path(__file__).parents[1] / "examples" / "digits"
RELEASED_RHYTHM: Final = "FCSCFCSCFCSCFCSCFCSCFCSCFCSFCSFCSFCSFCFCFCFCFCFCFC"  # ProCache's for DiT-XL/2, DDIM-50
SELECTOR: Final = TokenSelector("value_norm", staleness_weight=0.0625, spatial_bonus=0.6, spatial_size=2, seed=0)


@dataclass(frozen=True, slots=True)
class Made:
    """A model folder, what was exported from it, and the bundle that was built."""

    model: Path
    graphs: Path
    bundle: Path


def schedule_from_rhythm(
    model: Model,
    scheduler: Any,
    rhythm: str,
    *,
    num_inference_steps: int | None = None,
    num_tokens: int = 4,
    deep_start: int = 2,
    guidance: Literal["classifier_free", "none"] = "classifier_free",
    selector: TokenSelector = SELECTOR,
) -> Schedule:
    """Make a schedule for a model from letters."""
    steps: dict[str, Step] = {"F": FULL, "D": DEEP, "S": tokens(num_tokens), "C": REUSE}
    return Schedule(
        schema=1,
        model=model.identity,
        scheduler=scheduler_identity(scheduler, num_inference_steps or len(rhythm)),
        guidance=guidance,
        deep_start=deep_start if set(rhythm) & {"D", "S"} else None,
        selector=selector if "S" in rhythm else None,
        steps=tuple(steps[letter] for letter in rhythm),
        found_by=FoundBy("by_hand", {}, 0, MadeBy.here()),
        measured={},
    )


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
