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
from hemiola_export.model import Model, Text
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
PIXART_XL_2: Final[dict[str, Any]] = {  # PixArt-alpha/PixArt-XL-2-512x512 (Chen et al. 2023, arXiv:2310.00426)
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "caption_channels": 4096,
}
T5_XXL: Final[dict[str, Any]] = {  # one block of the 24 of T5 v1.1 XXL, for characters in place of its words
    "vocab_size": 128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 1,
    "feed_forward_proj": "gated-gelu",
}
ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "dit-xl-2": DIT_XL_2,
    "dit-xl-2-512": DIT_XL_2 | {"sample_size": 64},
    "pixart-xl-2-256": PIXART_XL_2 | {"sample_size": 32},
    "pixart-xl-2-512": PIXART_XL_2,
    "pixart-xl-2-1024": PIXART_XL_2 | {"sample_size": 128},
}
VAE: Final[dict[str, Any]] = {  # the decoder of Stable Diffusion, which DiT's and PixArt's latents are made for
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}


def random_model(name: str, seed: int = 0) -> Model:
    """Make a model of a known architecture with random weights.

    Of a text encoder there is one block. Every DiT block gets the embedder of the first, as checkpoints that were
    converted to diffusers have it.

    Raises:
        ExportError: no architecture has this name.
    """
    if name not in ARCHITECTURES:
        raise ExportError(f"no architecture is called {name!r}; known are {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[name]
    transformer: Any
    text = None
    if "caption_channels" in config:
        transformer = draw_weights(diffusers.PixArtTransformer2DModel(**config), seed)
        text = _random_text(transformer, seed)
        scheduler: Any = diffusers.DPMSolverMultistepScheduler()
    else:
        transformer = diffusers.DiTTransformer2DModel(**config)
        for block in transformer.transformer_blocks:
            block.norm1.emb = transformer.transformer_blocks[0].norm1.emb
        draw_weights(transformer, seed)
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
    family = open_transformer(transformer)
    vae: Any = diffusers.AutoencoderKL(**VAE, sample_size=8 * config["sample_size"])
    vae.encoder, vae.quant_conv = None, None  # only the decoder is of use
    digest = hashlib.sha256(json.dumps([config, seed], sort_keys=True).encode()).hexdigest()
    return Model(
        identity=ModelIdentity(family.key, f"{name} with random weights", digest, family.latent_shape),
        transformer=transformer,
        family=family,
        scheduler=scheduler,
        vae=draw_weights(vae, seed),
        labels={str(label): str(label) for label in range(family.num_classes)},
        text=text,
    )


def _random_text(transformer: Any, seed: int) -> Text:
    """Make a text encoder as wide as PixArt's, which reads a prompt character by character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel

    from hemiola_export.tokenizer import PIXART_TOKENS, PromptTokenizer

    characters = ["<pad>", "</s>", "<unk>", *map(chr, range(ord(" "), ord("~") + 1))]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(PIXART_TOKENS)
    tokenizer.enable_padding(length=PIXART_TOKENS, pad_id=0, pad_token="<pad>")
    encoder = draw_weights(T5EncoderModel(T5Config(**T5_XXL)), seed)
    read = PromptTokenizer(tokenizer.to_str().encode(), PIXART_TOKENS, len(characters))
    return Text(read, encoder, transformer.caption_projection)


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
