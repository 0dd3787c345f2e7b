"""Parts that families are made of: weights of diffusers' modules, rearranged where that saves work."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hemiola_export.errors import ExportError
from hemiola_export.families.seams import ATTENTION, GAIN, GATE, SHIFT, Block, Read, modulated

ORDER: Final = tuple(  # of the six vectors that adaLN's linear layer makes for a block
    (branch, kind) for branch in (ATTENTION, "mlp") for kind in (SHIFT, GAIN, GATE)
)


class TransformerBlock(Block):
    """Self-attention and MLP of diffusers' `BasicTransformerBlock`, each between modulation and gate.

    The queries' weights hold the factor of the softmax.
    """

    branches: ClassVar[tuple[str, ...]] = (ATTENTION, "mlp")
    gated_branches: ClassVar[frozenset[str]] = frozenset(branches)

    def __init__(self, block: Any, attention_eps: float, mlp_eps: float) -> None:
        super().__init__()
        attention = block.attn1
        self.num_heads: int = attention.heads
        self.attention_eps = attention_eps
        self.mlp_eps = mlp_eps
        self.to_q = scaled(attention.to_q, attention.scale)
        self.to_k = attention.to_k
        self.to_v = attention.to_v
        self.out = attention.to_out[0]
        self.mlp_in = block.ff.net[0].proj
        self.mlp_out = block.ff.net[2]
        self.gelu = block.ff.net[0].approximate

    def queries_keys_values(self, x: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        x = modulated(x, self.attention_eps, ATTENTION, read).to(self.to_k.weight.dtype)  # (R, N, D)
        return self.heads(self.to_q(x)), self.heads(self.to_k(x)), self.heads(self.to_v(x))

    def heads(self, x: Tensor) -> Tensor:
        """Cut x (R, n, D) into heads (R, h, n, d)."""
        return torch.transpose(x.unflatten(-1, (self.num_heads, -1)), 1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.project(F.scaled_dot_product_attention(queries, keys, values, scale=1.0))  # (R, N, D)

    def attention_map(self, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(queries @ keys.transpose(-1, -2), dim=-1)  # (R, h, N, N)

    def project(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return projected  # (R, N, D)

    def branch(self, name: str, x: Tensor, read: Read) -> Tensor:
        assert name == "mlp", f"{type(self).__name__} has no branch {name}"
        x = modulated(x, self.mlp_eps, "mlp", read).to(self.mlp_in.weight.dtype)  # (R, n, D)
        x = F.gelu(self.mlp_in(x), approximate=self.gelu)  # (R, n, 4D)
        out: Tensor = self.mlp_out(x)
        return out  # (R, n, D)


class Modulator(nn.Module):
    """A linear layer that makes one modulation vector; its product has the compute dtype, its bias and sum float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, condition: Tensor) -> Tensor:
        return F.linear(condition.to(self.weight.dtype), self.weight).float() + self.bias


def lower_modulators(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights of all modulators within a module another dtype."""
    for modulator in module.modules():
        if isinstance(modulator, Modulator):
            modulator.weight.data = modulator.weight.to(dtype)


def embed_timesteps(embedder: Any, timesteps: Tensor) -> Tensor:
    """Embed timesteps (T,) by `time_proj` and `timestep_embedder` of a diffusers embedder: (T, D) float32."""
    mlp = embedder.timestep_embedder
    embedded: Tensor = mlp(embedder.time_proj(timesteps).to(mlp.linear_1.weight.dtype))
    return embedded.float()


def patch_weights(convolution: nn.Conv2d) -> nn.Parameter:
    """Turn the convolution of a patch embedding, whose stride is its size, into a matrix (P, D)."""
    weights = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()  # from (D, C, p, p)
    return nn.Parameter(weights, requires_grad=False)


def scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    """Return the layer with its output multiplied by `factor`."""
    changed = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    with torch.no_grad():
        changed.weight.copy_(layer.weight * factor)
        if layer.bias is not None:
            changed.bias.copy_(layer.bias * factor)
    return changed


def leading_channels(layer: nn.Linear, channels: int, patch_size: int) -> nn.Linear:
    """Keep only the first `channels` of each pixel that a head predicts: the rest are variances."""
    kept = nn.Linear(layer.in_features, patch_size * patch_size * channels, dtype=layer.weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(layer.weight.unflatten(0, (patch_size * patch_size, -1))[:, :channels].flatten(0, 1))
        kept.bias.copy_(layer.bias.unflatten(0, (patch_size * patch_size, -1))[:, :channels].flatten())
    return kept


def check_config(name: str, config: Any) -> None:
    """Refuse what no family supports.

    Raises:
        ExportError: the configuration asks for it.
    """
    if config.activation_fn not in ("gelu-approximate", "gelu"):
        raise ExportError(
            f"{name} with activation_fn = {config.activation_fn!r} is not supported; gelu and gelu-approximate are"
        )
    if config.norm_elementwise_affine or config.upcast_attention:
        raise ExportError(f"{name} with norm_elementwise_affine or upcast_attention is not supported")
    if config.sample_size % config.patch_size:
        raise ExportError(f"sample_size {config.sample_size} is no multiple of patch_size {config.patch_size}")
    out_channels = config.out_channels or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ExportError(
            f"{out_channels} output channels for {config.in_channels} input channels: neither the "
            "prediction alone nor prediction and variance"
        )
