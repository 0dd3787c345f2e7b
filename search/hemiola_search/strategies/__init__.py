"""Strategies: one file each, behind one signature. Each returns all that it tried, the best first."""

from __future__ import annotations

from typing import Final

from hemiola_search.problem import Strategy
from hemiola_search.strategies import fewer_steps, procache, published, uniform

STRATEGIES: Final[dict[str, Strategy]] = {
    "procache": procache.search,
    "uniform": uniform.search,
    "fewer_steps": fewer_steps.search,
    "published": published.search,
}
BASELINES: Final = ("uniform", "fewer_steps")  # which every report holds
