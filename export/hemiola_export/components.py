"""The parts of a pipeline beside its transformer, as modules from named tensors to named tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hemiola_export.named_module import NamedModule, Tensors
from hemiola_runtime.graphs import TensorSpec


class VaeDecoder(NamedModule):
    """diffusers' AutoencoderKL from latents to pictures, with the scaling that diffusers' pipelines do around it.

    Reads latents (B, C, H, W); writes images (B, height, width, channels) in [0, 1].
    """

    def __init__(self, vae: Any, latent_shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.vae = vae if vae.dtype == dtype else nn.Module.to(copy.deepcopy(vae), dtype)
        self.latent_shape = latent_shape
        self.enlargement = 2 ** (len(vae.config.block_out_channels) - 1)

    def forward(self, tensors: Tensors) -> Tensors:
        scaled = (tensors["latents"] / self.vae.config.scaling_factor).to(self.vae.dtype)
        pictures = self.vae.decode(scaled, return_dict=False)[0].float()
        return {"images": (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one picture."""
        _, height, width = self.latent_shape
        return height * self.enlargement, width * self.enlargement, self.vae.config.out_channels

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("latents", "float32", ("B", *self.latent_shape)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("images", "float32", ("B", *self.image_shape)),)
