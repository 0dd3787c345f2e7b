"""Strategies: one file each, behind one signature. Each returns what it tried, the best first.

They run in the order of this table: the later ones begin at what the earlier ones found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hemiola_search.lab import Lab
from hemiola_search.problem import Effort, Scored
from hemiola_search.strategies import (
    duca,
    fewer_steps,
    learning_to_cache,
    magcache,
    optimised,
    procache,
    shortest_path,
    smoothcache,
    taylorseer,
    toca,
    uniform,
)

Strategy = Callable[[Lab], list[Scored]]

STRATEGIES: Final[dict[str, Strategy]] = {
    "fewer_steps": fewer_steps.search,
    "uniform": uniform.search,
    "procache": procache.search,
    "toca": toca.search,
    "duca": duca.search,
    "smoothcache": smoothcache.search,
    "magcache": magcache.search,
    "learning_to_cache": learning_to_cache.search,
    "taylorseer": taylorseer.search,
    "shortest_path": shortest_path.search,
    "optimised": optimised.search,
}
EXPECTED: Final[
    dict[str, dict[Effort, int]]
] = {  # schedules that each scores, about, for telling the time that is left
    **{name: {"quick": 1, "thorough": 1} for name in STRATEGIES},
    "procache": {"quick": 12, "thorough": 40},
    "toca": {"quick": 2, "thorough": 2},
    "learning_to_cache": {"quick": 3, "thorough": 3},
    "taylorseer": {"quick": 4, "thorough": 4},
    "shortest_path": {"quick": 10, "thorough": 10},
    "optimised": {effort: optimised.ROUNDS[effort] * optimised.TRIALS[effort] for effort in optimised.ROUNDS},
}
