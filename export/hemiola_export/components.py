"""The parts of a pipeline beside its transformer, as modules from named tensors to named tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hemiola_export.named_module import NamedModule, Tensors
from hemiola_export.patches import from_patches
from hemiola_runtime.graphs import TensorSpec


class VaeDecoder(NamedModule):
    """diffusers' AutoencoderKL from latents to pictures, with the scaling that diffusers' pipelines do around it.

    Reads latents as patches (B, rows, columns, p, p, C); writes images (B, height, width, channels) in [0, 1].
    """

    def __init__(
        self, vae: Any, patch_size: int, size: tuple[int, int] | None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Open a decoder.

        Args:
            vae: diffusers' module.
            patch_size: p.
            size: (H, W) of the latents; None where they differ in size.
            dtype: that it computes in.
        """
        super().__init__()
        self.vae = vae if vae.dtype == dtype else nn.Module.to(copy.deepcopy(vae), dtype)
        self.patch_size = patch_size
        self.size = size
        self.enlargement = 2 ** (len(vae.config.block_out_channels) - 1)

    def forward(self, tensors: Tensors) -> Tensors:
        patches = tensors["latents"]
        size = (patches.shape[1] * self.patch_size, patches.shape[2] * self.patch_size)
        return {"images": self.decode(from_patches(patches.flatten(3).flatten(1, 2), self.patch_size, size))}

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents (B, C, H, W) into pictures (B, height, width, channels) in [0, 1]."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pictures: Tensor = self.vae.decode(scaled, return_dict=False)[0].float()
        return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        side, channels = self.patch_size, self.vae.config.latent_channels
        grid = ("rows", "columns") if self.size is None else (self.size[0] // side, self.size[1] // side)
        return (TensorSpec("latents", "float32", ("B", *grid, side, side, channels)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        sides = ("height", "width") if self.size is None else tuple(self.enlargement * side for side in self.size)
        return (TensorSpec("images", "float32", ("B", *sides, self.vae.config.out_channels)),)
