"""Model families: each opens one kind of diffusers transformer at its seams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from hemiola_export.errors import ExportError
from hemiola_export.families.dit import DiT
from hemiola_export.families.pixart import PixArt
from hemiola_export.families.seams import Block, Family

__all__ = ["FAMILIES", "Block", "Family", "open_transformer"]

FAMILIES: Final[dict[str, Callable[..., Family]]] = {
    "DiTTransformer2DModel": DiT,
    "PixArtTransformer2DModel": PixArt,
}


def open_transformer(transformer: Any, **settings: Any) -> Family:
    """Open a diffusers transformer at its seams, in evaluation mode.

    Args:
        transformer: a diffusers module.
        settings: what its family asks for beside, as PixArt's `num_text_tokens`.

    Raises:
        ExportError: no family knows this class, or it is configured in a way that the family does not support.
    """
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ExportError(f"no family opens a {name}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name](transformer, **settings).eval().requires_grad_(False)
