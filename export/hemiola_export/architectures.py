"""Known architectures with random weights: for measuring speed, size and memory where no checkpoint is at hand.

Images drawn with them are noise, and so is every judgement of a schedule on them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import diffusers
import torch
from torch import nn

from hemiola_export.errors import ExportError
from hemiola_export.families import open_transformer
from hemiola_export.model import Model
from hemiola_runtime.schedule import ModelIdentity

DIT_XL_2: Final[dict[str, Any]] = {  # facebook/DiT-XL-2-256 (Peebles & Xie 2022, arXiv:2212.09748)
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
}
ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "dit-xl-2": DIT_XL_2,
    "dit-xl-2-512": DIT_XL_2 | {"sample_size": 64},
}
VAE: Final[dict[str, Any]] = {  # the decoder of Stable Diffusion, which DiT's latents are made for
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


def random_model(name: str, seed: int = 0) -> Model:
    """Make a model of a known architecture with random weights.

    Every block gets the embedder of the first, as checkpoints that were converted to diffusers have it.

    Raises:
        ExportError: no architecture has this name.
    """
    if name not in ARCHITECTURES:
        raise ExportError(f"no architecture is called {name!r}; known are {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[name]
    transformer: Any = diffusers.DiTTransformer2DModel(**config)
    for block in transformer.transformer_blocks:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb
    family = open_transformer(draw_weights(transformer, seed))
    vae: Any = diffusers.AutoencoderKL(**VAE, sample_size=8 * config["sample_size"])
    vae.encoder, vae.quant_conv = None, None  # only the decoder is of use
    digest = hashlib.sha256(json.dumps([config, seed], sort_keys=True).encode()).hexdigest()
    return Model(
        identity=ModelIdentity(family.key, f"{name} with random weights", digest, family.latent_shape),
        transformer=transformer,
        family=family,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vae=draw_weights(vae, seed),
        labels={str(label): str(label) for label in range(family.num_classes)},
    )


def draw_weights(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew: matrices keep the size of what passes through, vectors are small, embeddings large.

    No weight is zero, those of adaLN included: a fresh DiT would be the identity, on which every cache is right.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:  # biases; and gains, which stand around 1
                drawn = 0.1 * drawn + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif "embedding_table" not in name:
                drawn = drawn / (weight[0].numel() ** 0.5)
            weight.copy_(drawn)
    return module.eval().requires_grad_(False)
