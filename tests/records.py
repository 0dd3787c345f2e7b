"""Records of searches, small and made by hand: figures that can be told apart in tables and plots."""

from __future__ import annotations

from typing import Final, Literal

from hemiola_runtime.artifacts import MadeBy
from hemiola_search.record import CostSource, Point, SearchRecord

MADE_BY: Final = MadeBy("hemiola search tiny", {"python": "3.11.0", "torch": "2.11.0"}, "abcdef012345")
BUDGET: Final = "3 full"
RHYTHMS: Final = {
    "full": "FFFFFF",
    "fewer_steps": "FFF",
    "uniform": "FCFCFC",
    "procache": "FCSCFC",
    "learning_to_cache": "FMMFMM",
    "taylorseer": "FF1F11",
}
ERRORS: Final = {  # with 10 % to both sides as the interval
    "fewer_steps": 0.2,
    "uniform": 0.05,
    "procache": 0.0525,
    "learning_to_cache": 0.08,
    "taylorseer": 0.01,
}
FIGURES: Final = {"psnr": 31.27, "ssim": 0.9876}


def point(
    strategy: str,
    images: Literal["searched", "held_out"] = "held_out",
    *,
    error: float | None = None,
    budget: str = BUDGET,
    name: str = "as named",
    rhythm: str | None = None,
    key: str | None = None,
    cost: float = 30.0,
    quality: dict[str, float] = FIGURES,
) -> Point:
    """Make a point; what is held out has an interval of 10 % to both sides, and a path that grows to its error."""
    letters = RHYTHMS[strategy] if rhythm is None else rhythm
    value = ERRORS[strategy] if error is None else error
    is_held_out = images == "held_out"
    steps = len(letters)
    return Point(
        budget=budget,
        strategy=strategy,
        name=name,
        key=key or f"{budget} {letters} {name}",
        num_steps=steps,
        rhythm=letters,
        max_tokens=4 if "S" in letters else 0,
        images=images,
        quality={"relative_l2": value, **quality},
        intervals={"relative_l2": (0.9 * value, 1.1 * value)} if is_held_out else {},
        path=tuple(value * i / (steps - 1) for i in range(steps)) if is_held_out and steps == 6 else (),
        cost=cost,
        tera_flops=0.0415,
    )


def uncached() -> Point:
    """Make the point of the uncached run."""
    quality = {"psnr": 100.0, "ssim": 1.0}
    return point("full", error=0.0, budget="", name="uncached", cost=60.0, quality=quality)


def record(*points: Point, chosen: str | None = None, **changed: object) -> SearchRecord:
    """Make a record; without points, of one schedule by each strategy at one budget, TaylorSeer's chosen."""
    found = points or tuple(point(strategy, images) for strategy in ERRORS for images in ("searched", "held_out"))
    best = min((p for p in found if p.images == "held_out"), key=lambda p: p.quality["relative_l2"])
    fields: dict[str, object] = {
        "schema": 3,
        "model": "tiny",
        "sampler": "DDIM-6",
        "guidance_scale": 3.5,
        "num_images": 20,
        "num_held_out": 60,
        "effort": "quick",
        "costs": CostSource("ms", "onnxruntime 1.23.0, fp32, batch 2, A Processor", ("masked",)),
        "limits": dict.fromkeys((p.budget for p in found), 31.0),
        "chosen": chosen or best.key,
        "points": (uncached(), *found),
        "failures": {},
        "made_by": MADE_BY,
        "prompts": (),
    }
    return SearchRecord(**fields | changed)  # type: ignore[arg-type]
