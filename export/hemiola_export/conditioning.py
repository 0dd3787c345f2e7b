"""What all graphs of a transformer share, and the first of them: all that does not depend on the latents.

Symbols as in `forwards`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch.nn.functional as F

from hemiola_export.families.seams import GAIN, GATE, SHIFT, Family, Side, vector_name
from hemiola_export.named_module import NamedModule, Tensors
from hemiola_runtime.graphs import STEP_TABLE, TensorSpec
from hemiola_runtime.schedule import TokenSelector

ALIGNED_WIDTH: Final = 64  # of a table's entries: 256 bytes of float32


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """What the forwards of one export have in common.

    Attributes:
        is_guided: classifier-free guidance; every image is two rows.
        state_rows: 1 + k.
        deep_start: first deep block; None if no schedule asks for `deep` or `tokens`.
        selector: how tokens are ranked; None if no schedule asks for `tokens`.
        num_tokens: N, or its symbol where pictures differ in size; None for the size that the model is configured for.
        mask: what `masked` computes, as in a schedule; None if no schedule asks for `masked`.
        has_block_counts: whether `tokens` takes a token count for each block and branch, in place of one for all.
        keeps_layers: whether some forward reads what single layers left.
        keeps_residual: whether some forward reads the residual of the whole model.
    """

    is_guided: bool
    state_rows: int
    deep_start: int | None = None
    selector: TokenSelector | None = None
    num_tokens: Side | None = None
    mask: tuple[str, ...] | None = None
    has_block_counts: bool = False
    keeps_layers: bool = True
    keeps_residual: bool = False

    @property
    def rows_per_image(self) -> int:
        """2 under guidance, else 1."""
        return 2 if self.is_guided else 1


class GraphModule(NamedModule):
    """What all graphs of a transformer share: the family, and the sizes they are made for."""

    def __init__(self, family: Family, config: ForwardConfig) -> None:
        super().__init__()
        self.family = family
        self.config = config

    @property
    def num_tokens(self) -> Side:
        """N, a number or a symbol."""
        return self.family.num_tokens if self.config.num_tokens is None else self.config.num_tokens

    @property
    def _all(self) -> range:
        return range(len(self.family.blocks))

    def _contexts(self, blocks: Iterable[int], branches: Iterable[str]) -> tuple[TensorSpec, ...]:
        """What conditioning leaves for some branches of some blocks, each tensor once."""
        numbers = list(blocks)
        specs: list[TensorSpec] = []
        for context in (self.family.context(branch) for branch in branches):
            specs += [replace(spec, name=f"{spec.name}.{i}") for i in numbers for spec in context.of_block]
            specs += context.shared if numbers else ()
        return tuple(dict.fromkeys(specs))


class Conditioning(GraphModule):
    """Everything that does not depend on the latents, for all steps at once.

    Reads timesteps (T,) and what the family's `condition_inputs` names; writes one table per modulation vector, with an
    entry for each step, and whatever else the family computes once per request: positions, text keys and values.
    """

    def forward(self, tensors: Tensors) -> Tensors:
        written = self.family.condition(tensors, is_guided=self.config.is_guided)
        padding = self._table_width - self.family.width
        if padding:
            tables = [spec.name for spec in self.outputs if spec.shape[0] == "T"]
            written |= {name: F.pad(written[name], (0, padding)) for name in tables}
        return written

    @property
    def _table_width(self) -> int:
        """D, and as much more as lets each step's entry begin where every backend can read it."""
        width = self.family.width
        return width if self.family.vector_rows == "R" else -(-width // ALIGNED_WIDTH) * ALIGNED_WIDTH

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        given = self.family.condition_inputs(self.config.rows_per_image, self.num_tokens)
        return (*given, TensorSpec("timesteps", "float32", ("T",)))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        family = self.family
        names = [
            f"{vector_name(branch, kind)}.{index}"
            for index in self._all
            for branch in family.branches
            if branch in family.gated_branches
            for kind in (SHIFT, GAIN, GATE)
        ]
        steps = STEP_TABLE if family.vector_rows == "R" else "T"
        shape = (steps, self._table_width)
        tables = tuple(TensorSpec(name, "float32", shape) for name in (*names, *family.head_vectors))
        return (*tables, *family.embedding_inputs(self.num_tokens), *self._contexts(self._all, family.branches))
