"""The forwards, written once over the seams of a family: what search runs in PyTorch is what export turns into ONNX.

Every forward is a module from named tensors to named tensors. The names are those of the graph's inputs and outputs;
an output `next_x` is what `x` becomes for the forwards after it. Each ends with the head, guidance and the solver
update, so that one launch takes the state of one model evaluation to that of the next. `Front` alone is no forward but
the first part of one: followed by `Deep` it does what `Full` does, and no block's weights are in both.

Symbols: B images, R rows (2B under guidance, else B), N tokens, D width, L blocks, S deep blocks, K selected tokens,
1 + k rows of solver state, T model evaluations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hemiola_export.families.seams import ATTENTION, GAIN, GATE, SHIFT, Family, vector_name
from hemiola_export.named_module import NamedModule, Tensors
from hemiola_export.selection import attend_and_score, check_selector, rank
from hemiola_runtime.graphs import STEP_TABLE, TensorSpec
from hemiola_runtime.schedule import Forward, TokenSelector

INPUT_SCALE: Final = TensorSpec("input_scale", "float32", ())


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """What the forwards of one export have in common.

    Attributes:
        is_guided: classifier-free guidance; every image is two rows.
        state_rows: 1 + k.
        deep_start: first deep block; None if no schedule asks for `deep` or `tokens`.
        selector: how tokens are ranked; None if no schedule asks for `tokens`.
    """

    is_guided: bool
    state_rows: int
    deep_start: int | None = None
    selector: TokenSelector | None = None

    @property
    def rows_per_image(self) -> int:
        """2 under guidance, else 1."""
        return 2 if self.is_guided else 1


def cache_name(branch: str, block: int) -> str:
    """Name the cached output of one branch of one block, (R, N, D), before its gate."""
    return f"{branch}_cache.{block}"


class Conditioning(NamedModule):
    """Everything that does not depend on the latents, for all steps at once: the modulation of blocks and head.

    Reads labels (B,) and timesteps (T,); writes one table per vector, with an entry of (R, 1, D) for each step.
    """

    def __init__(self, family: Family, config: ForwardConfig) -> None:
        super().__init__()
        self.family = family
        self.config = config

    def forward(self, tensors: Tensors) -> Tensors:
        return self.family.condition(tensors["labels"], tensors["timesteps"], is_guided=self.config.is_guided)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return TensorSpec("labels", "int64", ("B",)), TensorSpec("timesteps", "float32", ("T",))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        blocks = range(len(self.family.blocks))
        names = [
            f"{vector_name(branch, kind)}.{index}"
            for index in blocks
            for branch in self.family.branches
            if branch in self.family.block(index).modulated
            for kind in (SHIFT, GAIN, GATE)
        ]
        return tuple(
            TensorSpec(name, "float32", (STEP_TABLE, self.family.width)) for name in (*names, *self.family.head_vectors)
        )


class StepForward(NamedModule):
    """What all forwards of one step share: how it begins, how caches are summed, how it ends."""

    def __init__(self, family: Family, config: ForwardConfig) -> None:
        super().__init__()
        self.family = family
        self.config = config
        self.deep_start = len(family.blocks) if config.deep_start is None else config.deep_start
        if config.selector is not None:
            check_selector(config.selector, family.grid)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        coefficients = (self.config.state_rows, self.config.state_rows + 1)
        specs = [self._state, TensorSpec("coefficients", "float32", coefficients), INPUT_SCALE]
        if self.config.is_guided:
            specs.append(TensorSpec("guidance", "float32", ("B",)))
        return (*specs, *self._modulation(self._all, self.family.head_vectors), *self.reads)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (_next(self._state), *(_next(spec) for spec in self.writes))

    @property
    def _state(self) -> TensorSpec:
        return TensorSpec("state", "float32", (self.config.state_rows, "B", *self.family.latent_shape))

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """What this forward needs of earlier steps."""
        return ()

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        """What this forward leaves for later steps, under the names they read it by."""
        return ()

    @abstractmethod
    def computes(self, block: int, branch: str) -> bool:
        """Tell whether this forward computes a branch anew, for some tokens or all."""

    def _modulation(self, blocks: Iterable[int], others: Iterable[str] = ()) -> tuple[TensorSpec, ...]:
        """The vectors that some blocks need, gates everywhere and the rest where they compute; and `others`."""
        names = [
            f"{vector_name(branch, kind)}.{index}"
            for index in blocks
            for branch in self.family.branches
            if branch in self.family.block(index).modulated
            for kind in ((SHIFT, GAIN, GATE) if self.computes(index, branch) else (GATE,))
        ]
        return tuple(TensorSpec(name, "float32", ("R", 1, self.family.width)) for name in (*names, *others))

    def _vectors(self, block: int, tensors: Tensors) -> Tensors:
        """Pick one block's vectors out of a step's tensors."""
        names = [vector_name(branch, kind) for branch in self.family.branches for kind in (SHIFT, GAIN, GATE)]
        return {name: tensors[f"{name}.{block}"] for name in names if f"{name}.{block}" in tensors}

    def _caches(self, blocks: Iterable[int], branches: Iterable[str]) -> tuple[TensorSpec, ...]:
        shape = ("R", self.family.num_tokens, self.family.width)
        names = list(branches)
        dtype: Any = str(self.family.compute_dtype).removeprefix("torch.")
        return tuple(TensorSpec(cache_name(b, block), dtype, shape) for block in blocks for b in names)

    def _selection(self) -> tuple[TensorSpec, ...]:
        if self.config.selector is None:
            return ()
        shape = (len(self._deep), "B", self.family.num_tokens)
        return TensorSpec("scores", "float32", shape), TensorSpec("staleness", "float32", shape)

    @property
    def _all(self) -> range:
        return range(len(self.family.blocks))

    @property
    def _shallow(self) -> range:
        return range(self.deep_start)

    @property
    def _deep(self) -> range:
        return range(self.deep_start, len(self.family.blocks))

    def _begin(self, tensors: Tensors) -> Tensor:
        """Embed the sample once; both rows of a guided image begin alike. Returns (R, N, D)."""
        x = self.family.embed(tensors["state"][0] * tensors["input_scale"])  # (B, N, D)
        return torch.cat([x, x]) if self.config.is_guided else x

    def _add_cached(self, x: Tensor, blocks: Iterable[int], tensors: Tensors) -> Tensor:
        """Add the gated caches of some blocks to x (R, N, D)."""
        for index in blocks:
            block, vectors = self.family.block(index), self._vectors(index, tensors)
            for branch in block.branches:
                x = x + block.gated(branch, tensors[cache_name(branch, index)], vectors)
        return x

    def _compute(self, x: Tensor, blocks: Iterable[int], tensors: Tensors) -> tuple[Tensor, Tensors]:
        """Run some blocks on all tokens. Returns x (R, N, D) and what they leave for later steps."""
        written: Tensors = {}
        scores = []
        for index in blocks:
            block, vectors = self.family.block(index), self._vectors(index, tensors)
            for branch in block.branches:
                if branch != ATTENTION:
                    out = block.branch(branch, x, vectors)
                elif self.config.selector is None or index < self.deep_start:
                    out = block.attend(*block.queries_keys_values(x, vectors))
                else:
                    out, score = attend_and_score(
                        block, index, x, vectors, self.config.selector, self.config.rows_per_image
                    )
                    scores.append(score)
                written[f"next_{cache_name(branch, index)}"] = out
                x = x + block.gated(branch, out, vectors)
        if self.config.selector is not None:
            none = x.new_zeros((0, x.shape[0] // self.config.rows_per_image, x.shape[1]))
            written["next_scores"] = torch.stack(scores) if scores else none  # (S, B, N)
            written["next_staleness"] = torch.zeros_like(written["next_scores"])
        return x, written

    def _finish(self, x: Tensor, tensors: Tensors) -> Tensors:
        """Head, guidance and solver update."""
        output = self.family.head(x, tensors)  # (R, C, H, W)
        if self.config.is_guided:
            cond, uncond = output.unflatten(0, (2, -1)).unbind(0)  # (B, C, H, W) each
            output = uncond + tensors["guidance"][:, None, None, None] * (cond - uncond)
        operands = torch.cat([tensors["state"], output[None]])  # (2 + k, B, C, H, W)
        return {"next_state": (tensors["coefficients"] @ operands.flatten(1)).unflatten(1, operands.shape[1:])}


class Full(StepForward):
    """Every block on every token."""

    def computes(self, block: int, branch: str) -> bool:
        return True

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (*self._caches(self._all, self.family.branches), *self._selection())

    def forward(self, tensors: Tensors) -> Tensors:
        x, written = self._compute(self._begin(tensors), self._all, tensors)
        return self._finish(x, tensors) | written


class Deep(StepForward):
    """The deep blocks on every token; the shallow ones from the cache."""

    def computes(self, block: int, branch: str) -> bool:
        return block >= self.deep_start

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self._caches(self._shallow, self.family.branches)

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (*self._caches(self._deep, self.family.branches), *self._selection())

    def forward(self, tensors: Tensors) -> Tensors:
        x = self._add_cached(self._begin(tensors), self._shallow, tensors)
        x, written = self._compute(x, self._deep, tensors)
        return self._finish(x, tensors) | written


class Front(StepForward):
    """The shallow blocks on every token, left in the cache; `Deep` goes on from there."""

    def computes(self, block: int, branch: str) -> bool:
        return True

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self._state, INPUT_SCALE, *self._modulation(self._shallow))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_next(spec) for spec in self._caches(self._shallow, self.family.branches))

    def forward(self, tensors: Tensors) -> Tensors:
        _, written = self._compute(self._begin(tensors), self._shallow, tensors)
        return {spec.name: written[spec.name] for spec in self.outputs}


class Reuse(StepForward):
    """Nothing but the gated sum of the caches: x_L = x_0 + Σ_l (g1_l · a_l + g2_l · m_l), then the head."""

    def computes(self, block: int, branch: str) -> bool:
        return False

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self._caches(self._all, self.family.branches)

    def forward(self, tensors: Tensors) -> Tensors:
        return self._finish(self._add_cached(self._begin(tensors), self._all, tensors), tensors)


class Tokens(StepForward):
    """In the deep blocks, all branches but self-attention anew for the K highest-ranked tokens, the rest cached.

    What is computed is written back into the cache (ProCache's selective computation, arXiv:2512.17298). K is the
    length of the input `token_slots`, whose numbers do not matter.
    """

    def computes(self, block: int, branch: str) -> bool:
        return block >= self.deep_start and branch != ATTENTION

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        slots = TensorSpec("token_slots", "int64", ("K",))
        return (slots, *self._caches(self._all, self.family.branches), *self._selection())

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        recomputed = [branch for branch in self.family.branches if branch != ATTENTION]
        return (*self._caches(self._deep, recomputed), self._selection()[1])

    def forward(self, tensors: Tensors) -> Tensors:
        selector = self.config.selector
        assert selector is not None, "`tokens` needs a selector"
        staleness = tensors["staleness"]
        ranks = rank(tensors["scores"], staleness, selector, self.family.grid)  # (S, B, N)
        chosen = ranks.topk(tensors["token_slots"].shape[0], dim=-1).indices  # (S, B, K)
        written = {"next_staleness": (staleness + 1).scatter(-1, chosen, 0.0)}
        x = self._add_cached(self._begin(tensors), self._shallow, tensors)
        places = self._places(chosen)  # (S, R·K)
        for index in self._deep:
            block, vectors = self.family.block(index), self._vectors(index, tensors)
            here = places[index - self.deep_start]  # (R·K,)
            for branch in block.branches:
                out = tensors[cache_name(branch, index)]
                if branch != ATTENTION:
                    rows = x.flatten(0, 1).index_select(0, here).unflatten(0, (x.shape[0], -1))  # (R, K, D)
                    fresh = block.branch(branch, rows, vectors).flatten(0, 1)  # (R·K, D)
                    out = out.flatten(0, 1).index_put((here,), fresh).unflatten(0, x.shape[:2])  # (R, N, D)
                    written[f"next_{cache_name(branch, index)}"] = out
                x = x + block.gated(branch, out, vectors)
        return self._finish(x, tensors) | written

    def _places(self, chosen: Tensor) -> Tensor:
        """Turn the chosen tokens (S, B, K) into places among all rows' tokens laid end to end, (S, R·K)."""
        by_row = torch.cat([chosen] * self.config.rows_per_image, dim=1)  # (S, R, K)
        first = self.family.num_tokens * torch.arange(by_row.shape[1], device=chosen.device)
        return (by_row + first[:, None]).flatten(1)


FORWARDS: Final[dict[Forward, type[StepForward]]] = {
    Forward.FULL: Full,
    Forward.DEEP: Deep,
    Forward.TOKENS: Tokens,
    Forward.REUSE: Reuse,
}


def _next(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(f"next_{spec.name}", spec.dtype, spec.shape)
