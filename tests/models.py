"""Tiny models with random weights, for every test that needs a model and none that needs a good one.

transformer = tiny_dit(seed=0)                    # diffusers' DiTTransformer2DModel, 4 blocks, width 32
family = open_transformer(tiny_dit(seed=0))       # the same, opened at its seams
folder = save_tiny_model(tmp_path / "model")      # a diffusers folder, as `load_model` takes it
folder = save_tiny_text_model(tmp_path / "model") # the same of a PixArt with its text encoder
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from hemiola_export.architectures import draw_weights

NUM_CLASSES: Final = 10
LATENT_CHANNELS: Final = 4
SAMPLE_SIZE: Final = 8  # side of the latents
NUM_TOKENS: Final = 16  # (8 / 2)², by the patch size
TEXT_TOKENS: Final = 8  # of a prompt, the end of it included
TEXT_WIDTH: Final = 24
WORDS: Final = (
    *("<pad>", "</s>", "<unk>", "a", "red", "green", "blue", "circle", "square", "triangle"),
    *("left", "right", "of", "above", "below"),
)


def tiny_dit(
    seed: int = 0,
    *,
    num_blocks: int = 4,
    num_heads: int = 4,
    head_width: int = 8,
    channels: int = LATENT_CHANNELS,
    sample_size: int = SAMPLE_SIZE,
    patch_size: int = 2,
    num_classes: int = NUM_CLASSES,
    has_learned_sigma: bool = True,
    activation_fn: str = "gelu-approximate",
    has_attention_bias: bool = True,
) -> Any:
    """Make a random diffusers `DiTTransformer2DModel` in evaluation mode; the same seed gives the same weights.

    By default 4 blocks, width 4 · 8 = 32, latents (4, 8, 8), 16 tokens, 10 classes, learned sigma (8 output channels).
    No weight is zero, those of adaLN included: a fresh DiT would be the identity, on which every cache is right.
    """
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_width,
        in_channels=channels,
        out_channels=2 * channels if has_learned_sigma else channels,
        num_layers=num_blocks,
        attention_bias=has_attention_bias,
        sample_size=sample_size,
        patch_size=patch_size,
        activation_fn=activation_fn,
        num_embeds_ada_norm=num_classes,
    )
    return draw_weights(transformer, seed)


def tiny_vae(seed: int = 0) -> Any:
    """Make a random diffusers `AutoencoderKL`, 4 latent channels; latents of side 8 become RGB pictures of side 16."""
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=2 * SAMPLE_SIZE,
    )
    return draw_weights(vae, seed)


def save_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    transformer: Any | None = None,
    scheduler: Any | None = None,
    has_vae: bool = True,
    labels: Mapping[int, str] | None = None,
) -> Path:
    """Write a diffusers folder: `model_index.json`, `transformer/`, `scheduler/`, and `vae/` if it has one.

    Args:
        folder: made if it is missing.
        seed: of all weights.
        transformer: None for `tiny_dit(seed)`; without a VAE one of pixels, 1 channel and no learned sigma.
        scheduler: None for DDIM without clipping.
        has_vae: whether the model is one of latents.
        labels: class → name, as `id2label`; None for `class 0`, `class 1`, …

    Returns:
        The folder.
    """
    if transformer is None:
        transformer = tiny_dit(seed) if has_vae else tiny_dit(seed, channels=1, has_learned_sigma=False)
    if scheduler is None:
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
    if labels is None:
        labels = {label: f"class {label}" for label in range(transformer.config.num_embeds_ada_norm)}
    folder.mkdir(parents=True, exist_ok=True)
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    if has_vae:
        tiny_vae(seed).save_pretrained(folder / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(label): name for label, name in labels.items()},
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", type(transformer).__name__],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder


def tiny_pixart(
    seed: int = 0,
    *,
    num_blocks: int = 4,
    num_heads: int = 4,
    head_width: int = 12,
    channels: int = LATENT_CHANNELS,
    sample_size: int = SAMPLE_SIZE,
    patch_size: int = 2,
    has_learned_sigma: bool = True,
    reads_size: bool = False,
    interpolation_scale: int | None = None,
) -> Any:
    """Make a random diffusers `PixArtTransformer2DModel` in evaluation mode: 4 blocks, width 48, 16 tokens.

    `reads_size`: with the conditions on resolution and aspect ratio of PixArt-α 1024.
    """
    width = num_heads * head_width
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_width,
        in_channels=channels,
        out_channels=2 * channels if has_learned_sigma else channels,
        num_layers=num_blocks,
        cross_attention_dim=width,
        sample_size=sample_size,
        patch_size=patch_size,
        interpolation_scale=interpolation_scale,
        use_additional_conditions=reads_size,
        caption_channels=TEXT_WIDTH,
    )
    return draw_weights(transformer, seed)


def tiny_t5(seed: int = 0) -> Any:
    """Make a random T5 encoder of two blocks, width TEXT_WIDTH, for the words of `save_words`."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def save_words(folder: Path) -> None:
    """Write a tokenizer of whole words, which takes prompts of TEXT_TOKENS tokens."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    ).save_pretrained(folder)


def save_tiny_text_model(
    folder: Path,
    *,
    seed: int = 0,
    transformer: Any | None = None,
    scheduler: Any | None = None,
    has_vae: bool = True,
) -> Path:
    """Write a diffusers folder of a PixArt pipeline: transformer, text encoder, tokenizer, scheduler, perhaps a VAE.

    Args:
        folder: made if it is missing.
        seed: of all weights.
        transformer: None for `tiny_pixart(seed)`; without a VAE one of pixels, 3 channels and no learned sigma.
        scheduler: None for DPM-Solver++ 2M, which predicts v.
        has_vae: whether the model is one of latents.

    Returns:
        The folder.
    """
    if transformer is None:
        transformer = tiny_pixart(seed) if has_vae else tiny_pixart(seed, channels=3, has_learned_sigma=False)
    if scheduler is None:
        scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")
    folder.mkdir(parents=True, exist_ok=True)
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    tiny_t5(seed).save_pretrained(folder / "text_encoder")
    save_words(folder / "tokenizer")
    if has_vae:
        tiny_vae(seed).save_pretrained(folder / "vae")
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", type(transformer).__name__],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return folder
