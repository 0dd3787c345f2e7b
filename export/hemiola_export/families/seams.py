"""The seams at which a family module opens a transformer; the forwards are written over these and know no model.

Shapes: T model evaluations, B images, R rows (2B under guidance, else B), N tokens, n of them, P = p·p·C numbers of a
token's patch of latents, D width, L blocks, h heads of d channels, S tokens of a prompt.

Latents are patches throughout: (B, N, P), which are cut before the first step and put together behind the last.

Precision: matrix products and what they leave in the caches have the compute dtype (float32 unless a family was
lowered, see `Family.lowered`); tokens x between the branches, norms, modulation and gates are float32 always. The
softmax has the compute dtype in the graph, since casts around it would keep backends from fusing attention; fused
attention computes it in float32 inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hemiola_runtime.graphs import DType, TensorSpec

ATTENTION: Final = "attention"
CROSS: Final = "cross"  # attention to the prompt
SHIFT: Final = "shift"
GAIN: Final = "gain"  # 1 + scale: the 1 is added once per request, not at every step
GATE: Final = "gate"

Side = int | str  # a number, or the symbol of a dynamic one
Read = Mapping[str, Tensor]  # what a block or the head reads beside x, by name, without the number of the block


def vector_name(part: str, kind: str) -> str:
    """Name one modulation vector of a branch or of the head, as in `mlp_gate`."""
    return f"{part}_{kind}"


def modulated(x: Tensor, eps: float, part: str, read: Read) -> Tensor:
    """Norm x (R, n, D) float32 over D, and apply gain and shift of a branch or of the head."""
    x = F.layer_norm(x, x.shape[-1:], eps=eps)
    return x * read[vector_name(part, GAIN)] + read[vector_name(part, SHIFT)]


@dataclass(frozen=True, slots=True)
class Context:
    """What a branch reads that stays the same through all steps: conditioning writes it.

    Attributes:
        of_block: tensors that each block has of its own; its number follows their names.
        shared: tensors that all blocks share.
    """

    of_block: tuple[TensorSpec, ...] = ()
    shared: tuple[TensorSpec, ...] = ()


class Block(nn.Module, ABC):
    """One transformer block as a chain of residual branches, the first of which is self-attention."""

    branches: ClassVar[tuple[str, ...]]  # in the order in which they are added; `attention` comes first
    gated_branches: ClassVar[frozenset[str]]  # those that have shift, gain and gate; the others are added as they are

    @abstractmethod
    def queries_keys_values(self, x: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
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
    def branch(self, name: str, x: Tensor, read: Read) -> Tensor:
        """Compute a branch other than attention for tokens x (R, n, D) float32; tokens do not interact.

        Returns:
            (R, n, D) compute dtype, before the gate.
        """

    def cross_attention_map(self, x: Tensor, read: Read) -> Tensor:
        """Return the softmax map of cross-attention, x (R, N, D) float32 by tokens of the prompt: (R, h, N, S)."""
        raise NotImplementedError(f"{type(self).__name__} has no cross-attention")

    def gated(self, name: str, out: Tensor, read: Read) -> Tensor:
        """Multiply a branch's output (R, n, D) by its gate, if it has one; returns float32."""
        out = out.float()
        return read[vector_name(name, GATE)] * out if name in self.gated_branches else out


class Family(nn.Module, ABC):
    """A transformer opened at its seams: conditioning, embedding, blocks, head.

    Attributes:
        key: of the family, as in `dit`.
        conditional_row: which of the two rows of a guided image is the conditional one, as diffusers orders them.
        has_sizes: whether it draws pictures of other sizes than the one it was configured for.
        vector_rows: rows of a modulation vector: `R` where it depends on the image, 1 where all share it.
        blocks: L of them.
        latent_shape: (C, H, W) of the size it was configured for.
        patch_size: p.
        width: D.
        num_heads: h.
        num_classes: class labels are 0 … num_classes - 1; 0 where images are drawn of prompts.
        head_vectors: names of the vectors that modulate the head.
        compute_dtype: of matrix products and caches.
    """

    key: ClassVar[str]
    conditional_row: ClassVar[Literal[0, 1]]
    has_sizes: ClassVar[bool]
    vector_rows: ClassVar[Side]
    head_vectors: ClassVar[tuple[str, ...]] = (vector_name("head", SHIFT), vector_name("head", GAIN))
    blocks: nn.ModuleList
    latent_shape: tuple[int, int, int]
    patch_size: int
    width: int
    num_heads: int
    num_classes: int
    compute_dtype: torch.dtype = torch.float32

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens at the size the model was configured for."""
        _, height, width = self.latent_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N at that size."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_width(self) -> int:
        """P."""
        return self.patch_size**2 * self.latent_shape[0]

    @property
    def cache_dtype(self) -> DType:
        """The compute dtype by its name in graphs."""
        name: Any = str(self.compute_dtype).removeprefix("torch.")
        return name  # type: ignore[no-any-return]

    def block(self, index: int) -> Block:
        """Return one block."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of every block."""
        return self.block(0).branches

    @property
    def gated_branches(self) -> frozenset[str]:
        """Those of them that have shift, gain and gate."""
        return self.block(0).gated_branches

    @abstractmethod
    def lowered(self, dtype: torch.dtype) -> Family:
        """Return a copy that computes its matrix products in `dtype`; what they leave in the caches has it too."""

    @abstractmethod
    def condition_inputs(self, rows_per_image: int, num_tokens: Side) -> tuple[TensorSpec, ...]:
        """What conditioning reads beside timesteps: what a request gives for each image, and where tokens lie."""

    def context(self, branch: str) -> Context:
        """What conditioning leaves for a branch of every block."""
        return Context()

    def embedding_inputs(self, num_tokens: Side) -> tuple[TensorSpec, ...]:
        """What conditioning leaves for `embed`."""
        return ()

    @abstractmethod
    def condition(self, read: Read, *, is_guided: bool) -> dict[str, Tensor]:
        """Compute all that does not depend on the latents, for all timesteps.

        Args:
            read: `timesteps` (T,) float32, and what `condition_inputs` names.
            is_guided: whether every image is two rows.

        Returns:
            Each modulation vector for all steps and rows, (T·R, D) or (T, D), steps outermost: by `vector_name` and
            block, as in `mlp_gate.3`, and by name for the head; and what `context` and `embedding_inputs` name.
        """

    @abstractmethod
    def embed(self, patches: Tensor, read: Read) -> Tensor:
        """Turn patches (B, N, P) into tokens (B, N, D)."""

    @abstractmethod
    def head(self, x: Tensor, read: Read) -> Tensor:
        """Turn tokens (R, N, D) into the model output (R, N, P), without learned variances."""
