"""The PixArt family (Chen et al. 2023, arXiv:2310.00426): diffusers' `PixArtTransformer2DModel`, opened at its seams.

Every block has cross-attention to the prompt between self-attention and MLP, without norm and without gate. Its keys
and values depend on the prompt alone, so conditioning computes them for all steps. adaLN-single: one linear layer
makes the modulation of all blocks from the timestep, each block adds a table of its own; all images of a request share
them. Positions are computed for whatever size is asked for, as diffusers computes them.

diffusers' null prompt is a prompt like any other; its row comes first.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from hemiola_export.families.layers import (
    ORDER,
    Modulator,
    TransformerBlock,
    check_config,
    embed_timesteps,
    leading_channels,
    lower_modulators,
    patch_weights,
    scaled,
)
from hemiola_export.families.seams import (
    ATTENTION,
    CROSS,
    GAIN,
    SHIFT,
    Context,
    Family,
    Read,
    Side,
    modulated,
    vector_name,
)
from hemiola_runtime.graphs import TensorSpec

MASKED: Final = -10000.0  # added to the scores of padding, as in diffusers


class PixArtBlock(TransformerBlock):
    """Self-attention, cross-attention to the prompt, MLP."""

    branches: ClassVar[tuple[str, ...]] = (ATTENTION, CROSS, "mlp")

    def __init__(self, block: Any) -> None:
        super().__init__(block, block.norm1.eps, block.norm2.eps)
        attention = block.attn2
        self.cross_q = scaled(attention.to_q, attention.scale)
        self.cross_k = attention.to_k
        self.cross_v = attention.to_v
        self.cross_out = attention.to_out[0]

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Project embedded prompts (R, S, D) to keys and values, each (R, h, S, d), compute dtype."""
        text = text.to(self.cross_k.weight.dtype)
        return self.heads(self.cross_k(text)), self.heads(self.cross_v(text))

    def branch(self, name: str, x: Tensor, read: Read) -> Tensor:
        if name != CROSS:
            return super().branch(name, x, read)
        attended = F.scaled_dot_product_attention(
            self._cross_queries(x), read["text_keys"], read["text_values"], read["text_bias"], scale=1.0
        )
        out: Tensor = self.cross_out(attended.transpose(1, 2).flatten(2))
        return out  # (R, n, D)

    def cross_attention_map(self, x: Tensor, read: Read) -> Tensor:
        scores = self._cross_queries(x) @ read["text_keys"].transpose(-1, -2) + read["text_bias"]
        return torch.softmax(scores, dim=-1)  # (R, h, N, S)

    def _cross_queries(self, x: Tensor) -> Tensor:
        return self.heads(self.cross_q(x.to(self.cross_q.weight.dtype)))  # (R, h, n, d)


class PixArt(Family):
    """diffusers' `PixArtTransformer2DModel`, opened; its weights are shared with the module it was opened from.

    Attributes:
        num_text_tokens: S.
    """

    key: ClassVar[str] = "pixart"
    conditional_row: ClassVar[Literal[0, 1]] = 1
    has_sizes: ClassVar[bool] = True
    vector_rows: ClassVar[Side] = 1

    def __init__(self, transformer: PixArtTransformer2DModel, num_text_tokens: int = 120) -> None:
        super().__init__()
        config = transformer.config
        check_config("PixArt", config)
        channels, size, patch = config.in_channels, config.sample_size, config.patch_size
        self.num_text_tokens = num_text_tokens
        self.patch_size = patch
        self.latent_shape = (channels, size, size)
        self.width = transformer.inner_dim
        self.num_heads = config.num_attention_heads
        self.num_classes = 0
        embedding = transformer.pos_embed
        self.patches = patch_weights(embedding.proj)
        self.patch_bias = embedding.proj.bias
        self.base_side = embedding.base_size / embedding.interpolation_scale  # of the grid that sines are counted in
        frequencies = 1 / 10000 ** (torch.arange(self.width // 4, dtype=torch.float64) / (self.width / 4))
        self.frequencies = nn.Parameter(frequencies.float(), requires_grad=False)
        self.blocks = nn.ModuleList(PixArtBlock(block) for block in transformer.transformer_blocks)
        self.embedder = transformer.adaln_single.emb
        self.reads_size: bool = transformer.use_additional_conditions
        linear = transformer.adaln_single.linear
        self.modulator = Modulator(linear.weight.detach(), linear.bias.detach())
        self.tables = nn.ParameterList(_with_gain(b.scale_shift_table, ORDER) for b in transformer.transformer_blocks)
        self.head_table = _with_gain(transformer.scale_shift_table, (("head", SHIFT), ("head", GAIN)))
        self.head_eps = transformer.norm_out.eps
        self.head_projection = leading_channels(transformer.proj_out, channels, patch)

    def lowered(self, dtype: torch.dtype) -> PixArt:
        copied = copy.deepcopy(self)
        copied.compute_dtype = dtype
        copied.blocks.to(dtype)
        copied.embedder.to(dtype)
        lower_modulators(copied, dtype)
        return copied

    def condition_inputs(self, rows_per_image: int, num_tokens: Side) -> tuple[TensorSpec, ...]:
        prompts = ("B", rows_per_image, self.num_text_tokens)
        return (
            TensorSpec("text_embeddings", "float32", (*prompts, self.width)),
            TensorSpec("text_mask", "float32", prompts),
            TensorSpec("token_places", "float32", (num_tokens, 2)),
            *((TensorSpec("picture_size", "float32", (2,)),) if self.reads_size else ()),
        )

    def context(self, branch: str) -> Context:
        if branch != CROSS:
            return Context()
        dtype, tokens = self.cache_dtype, self.num_text_tokens
        heads = ("R", self.num_heads, tokens, self.width // self.num_heads)
        return Context(
            (TensorSpec("text_keys", dtype, heads), TensorSpec("text_values", dtype, heads)),
            (TensorSpec("text_bias", dtype, ("R", 1, 1, tokens)),),
        )

    def embedding_inputs(self, num_tokens: Side) -> tuple[TensorSpec, ...]:
        return (TensorSpec("positions", "float32", (num_tokens, self.width)),)

    def condition(self, read: Read, *, is_guided: bool) -> dict[str, Tensor]:
        written = {"positions": self._positions(read["token_places"])}
        time = embed_timesteps(self.embedder, read["timesteps"])  # (T, D)
        if self.reads_size:
            time = time + self._embedded_size(read["picture_size"])
        shared = self.modulator(F.silu(time)).unflatten(-1, (len(ORDER), -1))  # (T, 6, D)
        # Rows lie one prompt's after the other's: all unconditional ones first.
        text = read["text_embeddings"].transpose(0, 1).flatten(0, 1)  # (R, S, D)
        mask = read["text_mask"].transpose(0, 1).flatten(0, 1)  # (R, S)
        written["text_bias"] = ((1 - mask) * MASKED).to(self.compute_dtype)[:, None, None]
        for index, table in enumerate(self.tables):
            vectors = (shared + table).unbind(1)
            written |= {f"{vector_name(*part)}.{index}": v for part, v in zip(ORDER, vectors, strict=True)}
            block = self.block(index)
            assert isinstance(block, PixArtBlock)
            written[f"text_keys.{index}"], written[f"text_values.{index}"] = block.text_keys_values(text)
        head = (time[:, None] + self.head_table).unbind(1)  # (T, D) each
        return written | dict(zip(self.head_vectors, head, strict=True))

    def _positions(self, places: Tensor) -> Tensor:
        """Turn places (N, 2), row and column as shares of the sides, into positions (N, D) with the patches' bias.

        Columns come first, and sines before cosines, as in diffusers' `get_2d_sincos_pos_embed`.
        """
        angles = places.flip(1)[:, :, None] * self.base_side * self.frequencies  # (N, 2, D / 4)
        positions: Tensor = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1) + self.patch_bias
        return positions

    def _embedded_size(self, size: Tensor) -> Tensor:
        """Embed a picture's size (2,), height and width in pixels, with its aspect ratio: (1, D)."""
        sides = torch.cat([size, size[:1] / size[1:]])  # height, width, height / width
        waves = self.embedder.additional_condition_proj(sides)  # (3, 256)
        side, ratio = self.embedder.resolution_embedder, self.embedder.aspect_ratio_embedder
        dtype = side.linear_1.weight.dtype
        parts = torch.cat([side(waves[:2].to(dtype)).flatten(), ratio(waves[2:].to(dtype)).flatten()])
        return torch.unsqueeze(parts.float(), 0)

    def embed(self, patches: Tensor, read: Read) -> Tensor:
        tokens: Tensor = patches @ self.patches + read["positions"]
        return tokens  # (B, N, D)

    def head(self, x: Tensor, read: Read) -> Tensor:
        out: Tensor = self.head_projection(modulated(x, self.head_eps, "head", read))
        return out  # (R, N, P)


def _with_gain(table: Tensor, order: tuple[tuple[str, str], ...]) -> nn.Parameter:
    """Add the 1 of gains to a table (vectors, D)."""
    ones = torch.tensor([float(kind == GAIN) for _, kind in order], dtype=table.dtype)
    return nn.Parameter(table.detach() + ones[:, None], requires_grad=False)
