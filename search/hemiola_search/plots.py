"""The plots of a report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

COLOURS: Final = {"procache": "#c2410c", "uniform": "#0369a1", "fewer_steps": "#4d7c0f", "full": "#444444"}
OTHER: Final = "#7c3aed"
NAMES: Final = {
    "procache": "ProCache",
    "uniform": "uniform period (FORA)",
    "fewer_steps": "fewer steps",
    "full": "uncached",
}


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One schedule in the plot: milliseconds per image, relative L2 error, and what marks it."""

    strategy: str
    latency_ms: float
    error: float
    is_chosen: bool
    is_minor: bool


def pareto_plot(points: Sequence[ParetoPoint]) -> str:
    """Draw error against latency; schedules of one strategy are joined, the chosen one is ringed."""
    with plt.rc_context(
        {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "hemiola"}
    ):
        figure, axes = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
        for strategy in dict.fromkeys(point.strategy for point in points):
            mine = sorted((p for p in points if p.strategy == strategy), key=lambda p: p.latency_ms)
            colour, name = COLOURS.get(strategy, OTHER), NAMES.get(strategy, strategy)
            major = [p for p in mine if not p.is_minor]
            axes.plot(
                [p.latency_ms for p in major],
                [p.error for p in major],
                "o-",
                color=colour,
                label=name,
                linewidth=1,
                markersize=5,
            )
            minor = [p for p in mine if p.is_minor]
            if minor:
                axes.plot(
                    [p.latency_ms for p in minor],
                    [p.error for p in minor],
                    "o",
                    color=colour,
                    alpha=0.3,
                    markersize=4,
                    label=f"{name}, all candidates",
                    markeredgewidth=0,
                )
            for point in (p for p in mine if p.is_chosen):
                axes.plot(
                    point.latency_ms,
                    point.error,
                    "o",
                    markersize=12,
                    markerfacecolor="none",
                    markeredgecolor=colour,
                    markeredgewidth=1.5,
                )
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("latency, ms per image (sum of measured forwards)")
        axes.set_ylabel("relative L2 error of the final latents")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
