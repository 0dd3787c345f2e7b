"""The DiT family (Peebles & Xie 2022, arXiv:2212.09748): diffusers' `DiTTransformer2DModel`, opened at its seams.

The weights are diffusers' own, rearranged where that saves work: positions hold the bias of the patches, whose
convolution is a matrix product, and the head's rows for learned variances, which the pipeline throws away, are left
out. diffusers gives every block an embedder of timestep and label; converted checkpoints hold one and the same 28
times, so equal ones are kept, and run, once.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
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
)
from hemiola_export.families.seams import GAIN, SHIFT, Family, Read, Side, modulated, vector_name
from hemiola_runtime.graphs import TensorSpec


class DiT(Family):
    """diffusers' `DiTTransformer2DModel`, opened; its weights are shared with the module it was opened from."""

    key: ClassVar[str] = "dit"
    conditional_row: ClassVar[Literal[0, 1]] = 0
    has_sizes: ClassVar[bool] = False
    vector_rows: ClassVar[Side] = "R"

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        config = transformer.config
        check_config("DiT", config)
        channels, size, patch = config.in_channels, config.sample_size, config.patch_size
        self.patch_size = patch
        self.latent_shape = (channels, size, size)
        self.width = transformer.inner_dim
        self.num_heads = config.num_attention_heads
        self.num_classes = config.num_embeds_ada_norm
        embedding = transformer.pos_embed
        self.patches = patch_weights(embedding.proj)
        self.positions = nn.Parameter(embedding.pos_embed + embedding.proj.bias, requires_grad=False)
        blocks = transformer.transformer_blocks
        self.blocks = nn.ModuleList(TransformerBlock(b, b.norm1.norm.eps, b.norm3.eps) for b in blocks)
        self.embedders, self.embedder_of = _distinct([block.norm1.emb for block in blocks])
        self.modulators = nn.ModuleList(_split(block.norm1.linear, [kind for _, kind in ORDER]) for block in blocks)
        self.head_eps = transformer.norm_out.eps
        self.head_modulators = _split(transformer.proj_out_1, [SHIFT, GAIN])
        self.head_projection = leading_channels(transformer.proj_out_2, channels, patch)

    def lowered(self, dtype: torch.dtype) -> DiT:
        copied = copy.deepcopy(self)
        copied.compute_dtype = dtype
        copied.blocks.to(dtype)
        for embedder in copied.embedders:
            embedder.get_submodule("timestep_embedder").to(dtype)
        lower_modulators(copied.modulators, dtype)
        return copied

    def condition_inputs(self, rows_per_image: int, num_tokens: Side) -> tuple[TensorSpec, ...]:
        return (TensorSpec("labels", "int64", ("B",)),)

    def condition(self, read: Read, *, is_guided: bool) -> dict[str, Tensor]:
        labels = read["labels"]
        if is_guided:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])  # (R,)
        conditions = [self._embedded(embedder, labels, read["timesteps"]) for embedder in self.embedders]  # (T·R, D)
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
        time = embed_timesteps(embedder, timesteps)  # (T, D)
        label = embedder.class_embedder.embedding_table(labels)  # (R, D)
        return F.silu(time[:, None] + label).flatten(0, 1)  # (T·R, D)

    def embed(self, patches: Tensor, read: Read) -> Tensor:
        tokens: Tensor = patches @ self.patches + self.positions
        return tokens  # (B, N, D)

    def head(self, x: Tensor, read: Read) -> Tensor:
        out: Tensor = self.head_projection(modulated(x, self.head_eps, "head", read))
        return out  # (R, N, P)


def _split(layer: nn.Linear, kinds: list[str]) -> nn.ModuleList:
    """Cut a linear layer into one for each vector that it makes; gains get their 1 here."""
    weights, biases = layer.weight.chunk(len(kinds)), layer.bias.chunk(len(kinds))
    return nn.ModuleList(
        Modulator(weight.detach(), bias.detach() + (kind == GAIN))
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
