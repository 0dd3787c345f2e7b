"""Latents as patches: the state that steps hand on, in which no step has to cut or to put together anything.

A patch is a square of p × p latents, all channels of one latent next to each other, as the heads of transformers
write them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_patches(latents: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """Cut latents (…, C, H, W) into patches (…, N, p·p·C), row by row."""
    *outer, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    cut = latents.reshape(*outer, channels, rows, patch_size, columns, patch_size)
    by_patch = np.moveaxis(np.moveaxis(cut, -5, -1), -3, -4)  # (…, rows, columns, p, p, C)
    return by_patch.reshape(*outer, rows * columns, patch_size * patch_size * channels)


def from_patches(patches: NDArray[Any], patch_size: int, size: tuple[int, int]) -> NDArray[Any]:
    """Put patches (…, N, p·p·C) together to latents (…, C, H, W) of `size` (H, W)."""
    *outer, _, _ = patches.shape
    rows, columns = size[0] // patch_size, size[1] // patch_size
    cut = patches.reshape(*outer, rows, columns, patch_size, patch_size, -1)
    whole = np.moveaxis(np.moveaxis(cut, -3, -4), -1, -5)  # (…, C, rows, p, columns, p)
    return np.ascontiguousarray(whole).reshape(*outer, whole.shape[-5], *size)
