"""Model families: each opens one kind of diffusers transformer at its seams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from hemiola_export.errors import ExportError
from hemiola_export.families.dit import DiT
from hemiola_export.families.seams import Block, Family

__all__ = ["FAMILIES", "Block", "Family", "open_transformer"]

FAMILIES: Final[dict[str, Callable[[Any], Family]]] = {
    "DiTTransformer2DModel": DiT,
}


def open_transformer(transformer: Any) -> Family:
    """Open a diffusers transformer at its seams, in evaluation mode.

    Raises:
        ExportError: no family knows this class, or it is configured in a way that the family does not support.
    """
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ExportError(f"no family opens a {name}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name](transformer).eval().requires_grad_(False)
