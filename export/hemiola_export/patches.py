"""Latents as patches in PyTorch, as `hemiola_runtime.patches` has them in numpy."""

from __future__ import annotations

import torch
from torch import Tensor


def to_patches(latents: Tensor, patch_size: int) -> Tensor:
    """Cut latents (…, C, H, W) into patches (…, N, p·p·C), row by row."""
    height, width = latents.shape[-2:]
    cut = latents.unflatten(-1, (width // patch_size, patch_size))
    cut = cut.unflatten(-3, (height // patch_size, patch_size))  # (…, C, rows, p, columns, p)
    by_patch = torch.movedim(cut, -5, -1).transpose(-4, -3)  # (…, rows, columns, p, p, C)
    return torch.flatten(by_patch, -3).flatten(-3, -2)


def from_patches(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Put patches (…, N, p·p·C) together to latents (…, C, H, W) of `size` (H, W)."""
    rows, columns = size[0] // patch_size, size[1] // patch_size
    cut = patches.unflatten(-1, (patch_size, patch_size, -1)).unflatten(-4, (rows, columns))
    whole = cut.transpose(-4, -3).movedim(-1, -5)  # (…, C, rows, p, columns, p)
    return torch.flatten(whole, -2).flatten(-3, -2)
