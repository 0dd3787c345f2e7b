"""How much a schedule may cost: as full steps, as milliseconds or as a speed-up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from hemiola_runtime.schedule import FULL, REUSE
from hemiola_search.costs import Costs
from hemiola_search.errors import SearchError

Unit = Literal["full", "ms", "speedup"]
UNITS: Final[dict[str, Unit]] = {"": "full", "ms": "ms", "x": "speedup", "×": "speedup"}  # by how they are written
WORDS: Final[dict[Unit, str]] = {"full": " full", "ms": " ms", "speedup": "×"}
TOLERANCE: Final = 1e-9  # of sums of costs that are equal


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as it was asked for.

    Attributes:
        amount: full steps, milliseconds for an image, or how many times faster than uncached.
        unit: which of the three.
    """

    amount: float
    unit: Unit

    def __str__(self) -> str:
        return f"{self.amount:g}{WORDS[self.unit]}"

    def limit(self, costs: Costs, num_steps: int) -> float:
        """Return the cost that no schedule may exceed, in the unit of the costs.

        `B` full steps are worth what a schedule costs that computes so many and repeats the cache at all others.

        Raises:
            SearchError: no schedule can meet it; the message names the least that can be asked for.
        """
        uncached = costs.schedule((FULL,) * num_steps)
        least = costs.schedule((FULL, *(REUSE,) * (num_steps - 1)))
        if self.unit == "full":
            count = round(self.amount)
            if count != self.amount or not 1 <= count <= num_steps:
                raise SearchError(f"a budget of {self.amount:g} full steps, where a schedule has 1 to {num_steps}")
            return costs.schedule((FULL,) * count + (REUSE,) * (num_steps - count))
        if self.unit == "ms" and costs.unit != "ms":
            raise SearchError(
                "a budget in milliseconds needs measured costs: build a bundle of this model, run `hemiola measure` on "
                "it and name it with --costs. Or give full steps (17) or a speed-up (2.5x)"
            )
        limit = self.amount if self.unit == "ms" else uncached / self.amount
        if limit < least * (1 - TOLERANCE):
            raise SearchError(
                f"a budget of {self} is beyond caching: one full step of {num_steps} costs {least:.4g} {costs.unit}, "
                f"{math.floor(100 * uncached / least) / 100:g}× less than uncached"
            )
        return limit


def budget_from_text(text: str) -> Budget:
    """Read a budget: `17` full steps, `250ms`, `2.5x`.

    Raises:
        SearchError: it is none of them.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(ms|x|×|)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise SearchError(
            f"{text!r} is no budget: give full steps (17), milliseconds for an image (250ms) or a speed-up (2.5x)"
        )
    return Budget(float(match[1]), UNITS[match[2]])
