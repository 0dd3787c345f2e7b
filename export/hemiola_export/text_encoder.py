"""A T5 encoder and the projection of what it writes, opened at their seams so that half precision stays finite.

transformers' modules lend their weights; their forward is written anew, because `.half()` breaks T5: what its branches
add to the tokens grows beyond 65504, float16's largest number, in the feed-forward's second matrix first. Here tokens,
norms, softmax and activations are float32, as are the scores, which T5 does not divide by √d: attention among some
hundred tokens costs next to nothing beside the weights. The products with weights alone have the compute dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5EncoderModel

from hemiola_export.errors import ExportError
from hemiola_export.named_module import NamedModule, Tensors
from hemiola_runtime.graphs import TensorSpec

MASKED: Final = 1e9  # taken from the scores of padding: beyond all others, and far from float32's largest number
SMALLEST: Final = 1e-30  # a token of zeros is divided by it, and stays zero
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {  # by transformers' names
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class Product(nn.Module):
    """A linear layer between float32 tokens (…, in) and (…, out), whose matrix and product have the compute dtype.

    In float16 every token is divided by its largest channel before the product and multiplied by it after, so that
    neither it nor any sum on the way to the result leaves float16's range, whatever the tokens hold.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _stored(layer.weight, dtype)
        self.bias = None if layer.bias is None else _stored(layer.bias, torch.float32)
        self.largest_input: float | None = None  # for which no sum can overflow; None where none ever does
        if dtype == torch.float16:
            largest_sum = self.weight.abs().sum(dim=-1, dtype=torch.float32).max().item()
            self.largest_input = min(1.0, torch.finfo(dtype).max / 2 / max(largest_sum, SMALLEST))

    def forward(self, x: Tensor) -> Tensor:
        if self.largest_input is None:
            out = F.linear(x.to(self.weight.dtype), self.weight).float()  # (…, out)
        else:
            scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST) / self.largest_input  # (…, 1)
            out = F.linear((x / scale).to(self.weight.dtype), self.weight).float() * scale  # (…, out)
        return out if self.bias is None else out + self.bias


class RMSNorm(nn.Module):
    """T5's norm: float32 tokens (…, C) over their root mean square, times a gain. No mean is taken off."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gain = _stored(norm.weight, torch.float32)
        self.eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * self.gain
        return normed  # (…, C)


class T5Layer(nn.Module):
    """One block of the encoder: attention, then feed-forward, gated or not; each is normed first and added after."""

    def __init__(self, block: Any, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        self.num_heads = config.num_heads
        self.attention_norm = RMSNorm(block.layer[0].layer_norm)
        self.to_q = Product(attention.q, dtype)
        self.to_k = Product(attention.k, dtype)
        self.to_v = Product(attention.v, dtype)
        self.out = Product(attention.o, dtype)
        self.mlp_norm = RMSNorm(block.layer[1].layer_norm)
        self.activation = ACTIVATIONS[config.dense_act_fn]
        self.mlp_in = Product(mlp.wi_0 if config.is_gated_act else mlp.wi, dtype)
        self.mlp_gate = Product(mlp.wi_1, dtype) if config.is_gated_act else None
        self.mlp_out = Product(mlp.wo, dtype)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (1, S, C), with what is added to their scores (1, h, S, S), to tokens (1, S, C)."""
        normed = self.attention_norm(x)  # (1, S, C)
        scores = self._heads(self.to_q(normed)) @ self._heads(self.to_k(normed)).transpose(-1, -2)  # (1, h, S, S)
        attended = torch.softmax(scores + bias, dim=-1) @ self._heads(self.to_v(normed))  # (1, h, S, d)
        x = x + self.out(attended.transpose(1, 2).flatten(2))  # (1, S, C)
        normed = self.mlp_norm(x)  # (1, S, C)
        hidden = self.activation(self.mlp_in(normed))  # (1, S, F)
        if self.mlp_gate is not None:
            hidden = hidden * self.mlp_gate(normed)  # (1, S, F)
        added: Tensor = self.mlp_out(hidden)
        return x + added  # (1, S, C)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads  # (1, h, S, d)


class TextEncoder(NamedModule):
    """transformers' T5EncoderModel, then the transformer's projection of captions, for one prompt of S tokens.

    Reads token_ids (1, S) int64 and text_mask (1, S) float32, 1 for a token and 0 for padding; writes
    text_embeddings (1, S, D) float32. What it writes for padding is finite and means nothing.

    Attributes:
        num_tokens: S.
        width: D.
    """

    def __init__(
        self,
        encoder: T5EncoderModel,
        projection: nn.Module,
        num_tokens: int,
        width: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Open an encoder. The modules given are left as they are; in float32 their weights are shared, not copied.

        Args:
            encoder: on the CPU.
            projection: from (…, C), what T5 writes, to (…, D); torch.nn.Identity() for a model that has none.
            num_tokens: S.
            width: D.
            dtype: of the products with weights, and of the weights.

        Raises:
            ExportError: the encoder is no T5 of a known activation, its weights do not fit into `dtype`, or the
                projection does not write D channels.
        """
        super().__init__()
        _check(encoder)
        stack: Any = encoder.encoder
        self.num_tokens = num_tokens
        self.width = width
        self.embedding = _stored(encoder.get_input_embeddings().weight, dtype)
        with torch.no_grad():
            # Which depends on no input: it is computed here, once.
            bias = stack.block[0].layer[0].SelfAttention.compute_bias(num_tokens, num_tokens)
        self.position_bias = _stored(bias.contiguous(), torch.float32)  # (1, h, S, S)
        self.layers = nn.ModuleList(T5Layer(block, encoder.config, dtype) for block in stack.block)
        self.norm = RMSNorm(stack.final_layer_norm)
        self.projection = _with_products(copy.deepcopy(projection).float(), dtype)
        with torch.no_grad():
            written = self.projection(torch.zeros(1, 1, encoder.config.d_model)).shape[-1]
        if written != width:
            raise ExportError(f"the text encoder and its projection write {written} channels where {width} are read")
        self.eval().requires_grad_(False)

    def forward(self, tensors: Tensors) -> Tensors:
        padding = (tensors["text_mask"] - 1).unflatten(-1, (1, 1, -1)) * MASKED  # (1, 1, 1, S)
        bias = self.position_bias + padding  # (1, h, S, S)
        x = F.embedding(tensors["token_ids"], self.embedding).float()  # (1, S, C)
        for layer in self.layers:
            x = layer(x, bias)  # (1, S, C)
        return {"text_embeddings": self.projection(self.norm(x))}  # (1, S, D)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        shape = (1, self.num_tokens)
        return (TensorSpec("token_ids", "int64", shape), TensorSpec("text_mask", "float32", shape))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("text_embeddings", "float32", (1, self.num_tokens, self.width)),)


def _check(encoder: T5EncoderModel) -> None:
    if not isinstance(encoder, T5EncoderModel):
        raise ExportError(f"the text encoder is a {type(encoder).__name__}; Hemiola opens transformers' T5EncoderModel")
    if encoder.config.dense_act_fn not in ACTIVATIONS:
        raise ExportError(
            f"T5 with dense_act_fn = {encoder.config.dense_act_fn!r} is not supported; {', '.join(ACTIVATIONS)} are"
        )


def _with_products(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put products in the place of all linear layers within a module, which is changed."""
    if isinstance(module, nn.Linear):
        return Product(module, dtype)
    for name, child in module.named_children():
        setattr(module, name, _with_products(child, dtype))
    return module


def _stored(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    stored = weight.detach().to(dtype)
    if not stored.isfinite().all():
        largest = weight.detach().abs().max().item()
        raise ExportError(
            f"a weight of the text encoder is {largest:g}, which is no number of {str(dtype).removeprefix('torch.')}. "
            "Export it in bf16 or fp32"
        )
    return nn.Parameter(stored, requires_grad=False)
