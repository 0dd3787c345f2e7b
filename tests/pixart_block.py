"""A block shaped like PixArt-α's, for builders: self-attention, cross-attention to masked text, MLP.

Text keys and values are inputs, as the runtime will hoist them; padding is an additive bias on the scores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hemiola_export.named_module import NamedModule, Tensors
from hemiola_runtime.graphs import DType, TensorSpec

NUM_TOKENS = 64
TEXT_LENGTH = 40


class PixArtBlock(NamedModule):
    """One block: x (R, N, D) and modulation (R, 6, D) float32, text (R, h, S, d) in the compute dtype."""

    def __init__(self, dtype: torch.dtype, num_heads: int = 4, head_width: int = 72) -> None:
        super().__init__()
        self.dtype = dtype
        self.num_heads = num_heads
        self.head_width = head_width
        width = num_heads * head_width
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.out = nn.Linear(width, width, dtype=dtype)
        self.cross_q = nn.Linear(width, width, dtype=dtype)
        self.cross_out = nn.Linear(width, width, dtype=dtype)
        self.mlp_in = nn.Linear(width, 4 * width, dtype=dtype)
        self.mlp_out = nn.Linear(4 * width, width, dtype=dtype)

    def forward(self, tensors: Tensors) -> Tensors:
        x = tensors["x"]  # (R, N, D)
        shift, gain, gate, mlp_shift, mlp_gain, mlp_gate = (
            tensors["modulation"].unsqueeze(2).unbind(1)
        )  # (R, 1, D) each
        queries, keys, values = self.qkv(self._modulated(x, gain, shift)).chunk(3, dim=-1)
        attended = self._attend(self._heads(queries), self._heads(keys), self._heads(values))
        x = x + gate * self.out(attended).float()
        queries = self._heads(self.cross_q(x.to(self.dtype)))
        attended = self._attend(queries, tensors["text_keys"], tensors["text_values"], tensors["text_bias"])
        x = x + self.cross_out(attended).float()
        hidden = F.gelu(self.mlp_in(self._modulated(x, mlp_gain, mlp_shift)), approximate="tanh")
        return {"next_x": x + mlp_gate * self.mlp_out(hidden).float()}

    def _modulated(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * gain + shift).to(self.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
        return heads  # (R, h, N, d)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        scale = 1 / math.sqrt(self.head_width)
        return F.scaled_dot_product_attention(queries, keys, values, bias, scale=scale).transpose(1, 2).flatten(2)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        width = self.num_heads * self.head_width
        dtype: DType = "float16" if self.dtype == torch.float16 else "bfloat16"
        text = ("R", self.num_heads, TEXT_LENGTH, self.head_width)
        return (
            TensorSpec("x", "float32", ("R", NUM_TOKENS, width)),
            TensorSpec("modulation", "float32", ("R", 6, width)),
            TensorSpec("text_keys", dtype, text),
            TensorSpec("text_values", dtype, text),
            TensorSpec("text_bias", dtype, ("R", 1, 1, TEXT_LENGTH)),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("next_x", "float32", ("R", NUM_TOKENS, self.num_heads * self.head_width)),)
