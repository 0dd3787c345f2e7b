"""The DiT family (Peebles & Xie 2022, arXiv:2212.09748): diffusers' `DiTTransformer2DModel`, opened at its seams.

The weights are diffusers' own, rearranged where that saves work: the queries' hold the factor of the softmax,
positions hold the bias of the patches, whose convolution is a matrix product, and the head's rows for learned
variances, which the pipeline throws away, are left out. diffusers gives every block an embedder of timestep and label;
converted checkpoints hold one and the same 28 times, so equal ones are kept, and run, once.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from hemiola_export.errors import ExportError
from hemiola_export.families.seams import GAIN, GATE, SHIFT, Block, Family, Vectors, vector_name

ORDER: Final = tuple(  # of the six vectors in the output of adaLN-Zero's linear layer
    (branch, kind) for branch in ("attention", "mlp") for kind in (SHIFT, GAIN, GATE)
)


class DiTBlock(Block):
    """Self-attention and MLP, each between adaLN-Zero's modulation and gate."""

    branches: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    modulated: ClassVar[frozenset[str]] = frozenset(branches)

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attn1
        self.num_heads = attention.heads
        self.attention_eps = block.norm1.norm.eps
        self.mlp_eps = block.norm3.eps
        self.to_q = _scaled(attention.to_q, attention.scale)
        self.to_k = attention.to_k
        self.to_v = attention.to_v
        self.out = attention.to_out[0]
        self.mlp_in = block.ff.net[0].proj
        self.mlp_out = block.ff.net[2]
        self.gelu = block.ff.net[0].approximate

    def queries_keys_values(self, x: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        x = _modulated(x, self.attention_eps, "attention", vectors).to(self.to_k.weight.dtype)  # (R, N, D)
        return self._heads(self.to_q(x)), self._heads(self.to_k(x)), self._heads(self.to_v(x))

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads  # (R, h, N, d)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.project(F.scaled_dot_product_attention(queries, keys, values, scale=1.0))  # (R, N, D)

    def attention_map(self, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(queries @ keys.transpose(-1, -2), dim=-1)  # (R, h, N, N)

    def project(self, attended: Tensor) -> Tensor:
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return projected  # (R, N, D)

    def branch(self, name: str, x: Tensor, vectors: Vectors) -> Tensor:
        assert name == "mlp", f"DiT has no branch {name}"
        x = _modulated(x, self.mlp_eps, "mlp", vectors).to(self.mlp_in.weight.dtype)  # (R, n, D)
        x = F.gelu(self.mlp_in(x), approximate=self.gelu)  # (R, n, 4D)
        out: Tensor = self.mlp_out(x)
        return out  # (R, n, D)


def _modulated(x: Tensor, eps: float, part: str, vectors: Vectors) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=eps)
    return x * vectors[vector_name(part, GAIN)] + vectors[vector_name(part, SHIFT)]


class DiT(Family):
    """diffusers' `DiTTransformer2DModel`, opened; its weights are shared with the module it was opened from."""

    key: ClassVar[str] = "dit"
    head_vectors: ClassVar[tuple[str, ...]] = (vector_name("head", SHIFT), vector_name("head", GAIN))

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        config = transformer.config
        _check(config)
        channels, size, patch = config.in_channels, config.sample_size, config.patch_size
        self.patch_size = patch
        self.latent_shape = (channels, size, size)
        self.grid = (size // patch, size // patch)
        self.width = transformer.inner_dim
        self.num_heads = config.num_attention_heads
        self.num_classes = config.num_embeds_ada_norm
        embedding = transformer.pos_embed
        self.patches = nn.Parameter(embedding.proj.weight.flatten(1).T.contiguous(), requires_grad=False)
        self.positions = nn.Parameter(embedding.pos_embed + embedding.proj.bias, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(block) for block in transformer.transformer_blocks)
        self.embedders, self.embedder_of = _distinct([block.norm1.emb for block in transformer.transformer_blocks])
        self.modulators = nn.ModuleList(
            _split(block.norm1.linear, [kind for _, kind in ORDER]) for block in transformer.transformer_blocks
        )
        self.head_eps = transformer.norm_out.eps
        self.head_modulators = _split(transformer.proj_out_1, [SHIFT, GAIN])
        self.head_projection = _leading_channels(transformer.proj_out_2, channels, patch)

    def lowered(self, dtype: torch.dtype) -> DiT:
        copied = copy.deepcopy(self)
        copied.compute_dtype = dtype
        copied.blocks.to(dtype)
        for embedder in copied.embedders:
            embedder.get_submodule("timestep_embedder").to(dtype)
        for modulator in copied.modulators.modules():
            if isinstance(modulator, Modulator):
                modulator.weight.data = modulator.weight.to(dtype)
        return copied

    def condition(self, labels: Tensor, timesteps: Tensor, *, is_guided: bool) -> dict[str, Tensor]:
        if is_guided:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])  # (R,)
        conditions = [self._embedded(embedder, labels, timesteps) for embedder in self.embedders]  # (T·R, D) each
        tables: dict[str, Tensor] = {}
        for index in range(len(self.blocks)):
            modulators = self.modulators[index]
            assert isinstance(modulators, nn.ModuleList)
            for (branch, kind), modulator in zip(ORDER, modulators, strict=True):
                tables[f"{vector_name(branch, kind)}.{index}"] = modulator(conditions[self.embedder_of[index]])
        for name, modulator in zip(self.head_vectors, self.head_modulators, strict=True):
            tables[name] = modulator(conditions[self.embedder_of[0]])  # block 0's, as diffusers does
        return tables

    @staticmethod
    def _embedded(embedder: Any, labels: Tensor, timesteps: Tensor) -> Tensor:
        frequencies = embedder.time_proj(timesteps)  # (T, 256)
        mlp = embedder.timestep_embedder
        time = mlp(frequencies.to(mlp.linear_1.weight.dtype)).float()  # (T, D)
        label = embedder.class_embedder.embedding_table(labels)  # (R, D)
        return F.silu(time[:, None] + label).flatten(0, 1)  # (T·R, D)

    def embed(self, sample: Tensor) -> Tensor:
        rows, columns = self.grid
        x = sample.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (B, C, rows, p, columns, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C·p·p)
        tokens: Tensor = x @ self.patches + self.positions
        return tokens  # (B, N, D)

    def head(self, x: Tensor, vectors: Vectors) -> Tensor:
        x = _modulated(x, self.head_eps, "head", vectors)  # (R, N, D)
        x = self.head_projection(x)  # (R, N, p·p·C)
        rows, columns = self.grid
        x = x.unflatten(-1, (self.patch_size, self.patch_size, -1)).unflatten(1, (rows, columns))
        x = x.permute(0, 5, 1, 3, 2, 4)  # (R, C, rows, p, columns, p)
        return x.flatten(4, 5).flatten(2, 3)  # (R, C, H, W)


def _check(config: Any) -> None:
    if config.activation_fn not in ("gelu-approximate", "gelu"):
        raise ExportError(
            f"DiT with activation_fn = {config.activation_fn!r} is not supported; gelu and gelu-approximate are"
        )
    if config.norm_elementwise_affine or config.upcast_attention:
        raise ExportError("DiT with norm_elementwise_affine or upcast_attention is not supported")
    if config.sample_size % config.patch_size:
        raise ExportError(f"sample_size {config.sample_size} is no multiple of patch_size {config.patch_size}")
    out_channels = config.out_channels or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ExportError(
            f"{out_channels} output channels for {config.in_channels} input channels: neither the "
            "prediction alone nor prediction and variance"
        )


def _scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    """Return the layer with its output multiplied by `factor`."""
    scaled = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    with torch.no_grad():
        scaled.weight.copy_(layer.weight * factor)
        if layer.bias is not None:
            scaled.bias.copy_(layer.bias * factor)
    return scaled


class Modulator(nn.Module):
    """A linear layer that makes one modulation vector; its product has the compute dtype, its bias and sum float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, condition: Tensor) -> Tensor:
        return F.linear(condition.to(self.weight.dtype), self.weight).float() + self.bias


def _split(layer: nn.Linear, kinds: list[str]) -> nn.ModuleList:
    """Cut a linear layer into one for each vector that it makes; gains get their 1 here."""
    weights, biases = layer.weight.chunk(len(kinds)), layer.bias.chunk(len(kinds))
    return nn.ModuleList(
        Modulator(weight, bias + 1 if kind == GAIN else bias)
        for kind, weight, bias in zip(kinds, weights, biases, strict=True)
    )


def _distinct(modules: list[nn.Module]) -> tuple[nn.ModuleList, list[int]]:
    """Keep one of several modules with equal weights; returns those that differ, and which stands for each."""
    kept: list[nn.Module] = []
    stands_for = []
    for module in modules:
        equal = (i for i, other in enumerate(kept) if _equal(module, other))
        stands_for.append(next(equal, len(kept)))
        if stands_for[-1] == len(kept):
            kept.append(module)
    return nn.ModuleList(kept), stands_for


def _equal(module: nn.Module, other: nn.Module) -> bool:
    weights, others = module.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def _leading_channels(layer: nn.Linear, channels: int, patch_size: int) -> nn.Linear:
    """Keep only the first `channels` of each pixel that a head predicts: the rest are variances."""
    kept = nn.Linear(layer.in_features, patch_size * patch_size * channels, dtype=layer.weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(layer.weight.unflatten(0, (patch_size * patch_size, -1))[:, :channels].flatten(0, 1))
        kept.bias.copy_(layer.bias.unflatten(0, (patch_size * patch_size, -1))[:, :channels].flatten())
    return kept
