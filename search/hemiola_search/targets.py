"""Quality as the constraint: how good the images have to be, where a budget says how much they may cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from hemiola_search.errors import SearchError

FIGURES: Final = ("relative_l2", "psnr", "ssim", "agreement")
NUMBER: Final = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e-?[0-9]+)?"
TOLERANCE: Final = 1e-9  # of means that are equal, as 38 of 40 images and 1 of 40 less than 39


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure.

    Attributes:
        figure: its name.
        sign: whether the figure may be at most or at least the bound.
        bound: the number; added to the uncached figure if that is what it refers to.
        is_relative: whether it refers to the uncached figure.
    """

    figure: str
    sign: Literal["<=", ">="]
    bound: float
    is_relative: bool

    def __str__(self) -> str:
        reference = f"uncached{self.bound:+g}" if self.is_relative else f"{self.bound:g}"
        return f"{self.figure} {self.sign} {reference}"

    def is_met(self, quality: dict[str, float], uncached: dict[str, float]) -> bool:
        """Tell whether a schedule's figures keep to it.

        Raises:
            SearchError: they do not hold the figure.
        """
        if self.figure not in quality:
            raise SearchError(
                f"{self.figure} cannot be a target: there is no judge, or none that knows what its prompts show. Name "
                "one with --judge"
            )
        bound = self.bound + (uncached[self.figure] if self.is_relative else 0.0)
        value = quality[self.figure]
        return value <= bound + TOLERANCE if self.sign == "<=" else value >= bound - TOLERANCE


def target_from_text(text: str) -> Target:
    """Read a target: `relative_l2<=0.05`, `psnr>=40`, `agreement>=uncached-0.005`.

    Raises:
        SearchError: it is none.
    """
    match = re.fullmatch(rf"\s*(\w+)\s*(<=|>=)\s*(?:(uncached)\s*([+-]\s*{NUMBER})?|([+-]?{NUMBER}))\s*", text)
    if match is None or match[1] not in FIGURES:
        raise SearchError(
            f"{text!r} is no target: one of {', '.join(FIGURES)} with <= or >= and a number, as in relative_l2<=0.05, "
            "or with the uncached figure, as in agreement>=uncached-0.005"
        )
    bound = float((match[4] or match[5] or "0").replace(" ", ""))
    sign: Literal["<=", ">="] = "<=" if match[2] == "<=" else ">="
    return Target(match[1], sign, bound, match[3] is not None)
