"""The seams at which a family module opens a transformer; the forwards are written over these and know no model.

Shapes: T model evaluations, B images, R rows (2B under guidance, else B), N tokens, n of them, D width, L blocks,
h heads of d channels.

Precision: matrix products and what they leave in the caches have the compute dtype (float32 unless a family was
lowered, see `Family.lowered`); tokens x between the branches, norms, modulation and gates are float32 always. The
softmax has the compute dtype in the graph, since casts around it would keep backends from fusing attention; fused
attention computes it in float32 inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

ATTENTION: Final = "attention"
SHIFT: Final = "shift"
GAIN: Final = "gain"  # 1 + scale: the 1 is added once per request, not at every step
GATE: Final = "gate"

Vectors = Mapping[str, Tensor]  # a step's modulation of one block or of the head, each (R, 1, D), by `vector_name`


def vector_name(part: str, kind: str) -> str:
    """Name one modulation vector of a branch or of the head, as in `mlp_gate`."""
    return f"{part}_{kind}"


class Block(nn.Module, ABC):
    """One transformer block as a chain of residual branches, the first of which is self-attention."""

    branches: ClassVar[tuple[str, ...]]  # in the order in which they are added; `attention` comes first
    modulated: ClassVar[frozenset[str]]  # the branches that have shift, gain and gate

    @abstractmethod
    def queries_keys_values(self, x: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, modulate and project x (R, N, D) float32 to queries, keys and values, each (R, h, N, d), compute dtype.

        The queries hold the factor of the softmax, 1/√d.
        """

    @abstractmethod
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend and project: (R, N, D) compute dtype, before the gate. May be fused, without a softmax map."""

    @abstractmethod
    def attention_map(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the softmax map (R, h, N, N), queries by keys."""

    @abstractmethod
    def project(self, attended: Tensor) -> Tensor:
        """Project attended values (R, h, N, d) to (R, N, D), before the gate."""

    @abstractmethod
    def branch(self, name: str, x: Tensor, vectors: Vectors) -> Tensor:
        """Compute a branch other than attention for tokens x (R, n, D) float32; tokens do not interact.

        Returns:
            (R, n, D) compute dtype, before the gate.
        """

    def gated(self, name: str, out: Tensor, vectors: Vectors) -> Tensor:
        """Multiply a branch's output (R, N, D) by its gate, if it has one; returns float32."""
        out = out.float()
        return vectors[vector_name(name, GATE)] * out if name in self.modulated else out


class Family(nn.Module, ABC):
    """A transformer opened at its seams: conditioning, embedding, blocks, head.

    Attributes:
        key: of the family, as in `dit`.
        blocks: L of them.
        latent_shape: (C, H, W).
        grid: (rows, columns) of tokens; N is their product.
        width: D.
        num_heads: h.
        num_classes: class labels are 0 … num_classes - 1.
        head_vectors: names of the vectors that modulate the head.
        compute_dtype: of matrix products and caches.
    """

    key: ClassVar[str]
    head_vectors: ClassVar[tuple[str, ...]]
    blocks: nn.ModuleList
    latent_shape: tuple[int, int, int]
    grid: tuple[int, int]
    width: int
    num_heads: int
    num_classes: int
    compute_dtype: torch.dtype = torch.float32

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    def block(self, index: int) -> Block:
        """Return one block."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of every block."""
        return self.block(0).branches

    @abstractmethod
    def lowered(self, dtype: torch.dtype) -> Family:
        """Return a copy that computes its matrix products in `dtype`; what they leave in the caches has it too."""

    @abstractmethod
    def condition(self, labels: Tensor, timesteps: Tensor, *, is_guided: bool) -> dict[str, Tensor]:
        """Compute the modulation of every block and of the head for all timesteps.

        Args:
            labels: (B,) int64.
            timesteps: (T,) float32.
            is_guided: whether every image is two rows, conditional first, as diffusers orders DiT's.

        Returns:
            Each vector for all steps and rows, (T·R, D), steps outermost: by `vector_name` and block, as in
            `mlp_gate.3`, and by name for the head.
        """

    @abstractmethod
    def embed(self, sample: Tensor) -> Tensor:
        """Turn latents (B, C, H, W) into tokens (B, N, D)."""

    @abstractmethod
    def head(self, x: Tensor, vectors: Vectors) -> Tensor:
        """Turn tokens (R, N, D) into the model output (R, C, H, W), without learned variances."""
