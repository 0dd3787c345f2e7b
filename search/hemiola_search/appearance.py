"""How strategies and figures are named, written and drawn: the same everywhere. Standard library alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Look:
    """How one strategy is shown.

    Attributes:
        name: as people call it.
        colour: of lines and markers.
        marker: as matplotlib writes it; tells what colours alone do not.
        is_baseline: whether it is what caching has to beat; drawn dashed.
    """

    name: str
    colour: str
    marker: str
    is_baseline: bool = False


# Black and grey for the baselines; the others are Paul Tol's qualitative scheme "muted" (SRON/EPS/TN/09-002), darkened
# and spread until the nearest two are 14 apart in CIELAB under protanopia and deuteranopia (Machado et al. 2009).
LOOKS: Final[dict[str, Look]] = {
    "full": Look("uncached", "#1c1917", "h", is_baseline=True),
    "fewer_steps": Look("fewer steps", "#1c1917", "s", is_baseline=True),
    "uniform": Look("uniform (FORA)", "#8a8a8a", "o", is_baseline=True),
    "procache": Look("ProCache", "#332288", "D"),
    "toca": Look("ToCa", "#55b6eb", "^"),
    "duca": Look("DuCa", "#259aaa", "v"),
    "smoothcache": Look("SmoothCache", "#117733", "P"),
    "magcache": Look("MagCache", "#979123", "X"),
    "learning_to_cache": Look("Learning-to-Cache", "#dda71b", "p"),
    "taylorseer": Look("TaylorSeer", "#974099", "<"),
    "shortest_path": Look("shortest path", "#dc505d", ">"),
    "optimised": Look("optimised", "#881038", "*"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure of quality beside the error is shown.

    Attributes:
        name: as people call it.
        write: makes its number a text.
        unit: behind the number; empty where it has none.
    """

    name: str
    write: Callable[[float], str]
    unit: str = ""


FIGURES: Final[dict[str, Figure]] = {
    "psnr": Figure("PSNR", "{:.1f}".format, "dB"),
    "ssim": Figure("SSIM", "{:.4f}".format),
    "agreement": Figure("agreement", "{:.1%}".format),
    "frechet": Figure("Fréchet", "{:.4g}".format),
    "lpips": Figure("LPIPS", "{:.4f}".format),
    "clip_score": Figure("CLIP score", "{:.2f}".format),
    "fid": Figure("FID", "{:.4g}".format),
}


def look_of(strategy: str) -> Look:
    """Return how a strategy is shown; one that is not known by its own name, as a hexagon."""
    return LOOKS.get(strategy, Look(strategy, "#57534e", "h"))


def significant(value: float) -> str:
    """Write a number with three significant digits, zeros at its end included."""
    return f"{value:#.3g}".rstrip(".") if value else "0"


def amount(cost: float) -> str:
    """Write a cost with four significant digits."""
    return f"{cost:#.4g}".rstrip(".")


def interval_text(interval: tuple[float, float]) -> str:
    """Write an interval, as in `0.00965–0.0121`."""
    return "–".join(map(significant, interval))
