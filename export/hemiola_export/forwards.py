"""The forwards, written once over the seams of a family: what search runs in PyTorch is what export turns into ONNX.

Every forward is a module from named tensors to named tensors. The names are those of the graph's inputs and outputs;
an output `next_x` is what `x` becomes for the forwards after it. Each ends with the head, guidance and the solver
update, so that one launch takes the state of one model evaluation to that of the next. `Front` alone is no forward but
the first part of one: followed by `Deep` it does what `Full` does, and no block's weights are in both.

Caches: a branch with a gate leaves its output in each block, since gates change from step to step. What is added
without a gate (cross-attention) is only ever needed as a sum over blocks, and is kept as one, float32: one over the
shallow blocks, one over the deep ones; but where `tokens` writes rows of its own in every deep block, one for each.

Symbols: B images, R rows (2B under guidance, else B), N tokens, P numbers of a patch, D width, L blocks, S deep blocks,
K selected tokens, 1 + k rows of solver state, T model evaluations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor

from hemiola_export.conditioning import ForwardConfig, GraphModule
from hemiola_export.families.seams import ATTENTION, GAIN, GATE, SHIFT, Family, vector_name
from hemiola_export.named_module import Tensors
from hemiola_export.selection import check_selector, compute_and_score, rank, scored_branch
from hemiola_runtime.graphs import TensorSpec
from hemiola_runtime.schedule import Forward

INPUT_SCALE: Final = TensorSpec("input_scale", "float32", ())
Part = Literal["shallow", "deep"]  # of the blocks


def cache_name(branch: str, block: int | Part) -> str:
    """Name the cached output of one branch, (R, N, D) before its gate, in one block or summed over a part of them."""
    return f"{branch}_cache.{block}"


class StepForward(GraphModule):
    """What all forwards of one step share: how it begins, how caches are summed, how it ends."""

    def __init__(self, family: Family, config: ForwardConfig) -> None:
        super().__init__(family, config)
        self.deep_start = len(family.blocks) if config.deep_start is None else config.deep_start
        if config.selector is not None:
            check_selector(config.selector, family, config.num_tokens)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        coefficients = (self.config.state_rows, self.config.state_rows + 1)
        specs = [self._state, TensorSpec("coefficients", "float32", coefficients), INPUT_SCALE]
        if self.config.is_guided:
            specs.append(TensorSpec("guidance", "float32", ("B",)))
        return (*specs, *self._conditions(self._all, self.family.head_vectors), *self.reads)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (_next(self._state), *(_next(spec) for spec in self.writes))

    @property
    def _state(self) -> TensorSpec:
        return TensorSpec("state", "float32", (self.config.state_rows, "B", self.num_tokens, self.family.patch_width))

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

    def _conditions(self, blocks: range, head_vectors: Iterable[str] = ()) -> tuple[TensorSpec, ...]:
        """What conditioning has left for this forward.

        Of some blocks' vectors, gates everywhere and the rest where it computes; contexts where it computes.
        """
        family = self.family
        names = [
            f"{vector_name(branch, kind)}.{index}"
            for index in blocks
            for branch in family.branches
            if branch in family.gated_branches
            for kind in ((SHIFT, GAIN, GATE) if self.computes(index, branch) else (GATE,))
        ]
        shape = (family.vector_rows, 1, family.width)
        vectors = tuple(TensorSpec(name, "float32", shape) for name in (*names, *head_vectors))
        contexts = [
            spec
            for branch in family.branches
            for spec in self._contexts([i for i in blocks if self.computes(i, branch)], [branch])
        ]
        return (*vectors, *family.embedding_inputs(self.num_tokens), *contexts)

    def _read(self, block: int, tensors: Tensors) -> Tensors:
        """Pick what one block reads beside x out of a step's tensors."""
        family = self.family
        contexts = [family.context(branch) for branch in family.branches]
        names = [vector_name(branch, kind) for branch in family.branches for kind in (SHIFT, GAIN, GATE)]
        names += [spec.name for context in contexts for spec in context.of_block]
        shared = [spec.name for context in contexts for spec in context.shared if spec.name in tensors]
        own = {name: tensors[f"{name}.{block}"] for name in names if f"{name}.{block}" in tensors}
        return own | {name: tensors[name] for name in shared}

    def _caches(self, part: Part, branches: Iterable[str]) -> tuple[TensorSpec, ...]:
        """The caches of some branches in one part of the blocks."""
        shape = ("R", self.num_tokens, self.family.width)
        names, blocks = list(branches), self._blocks(part)
        by_block = [branch for branch in names if not self._is_summed(branch, part)]
        specs = [TensorSpec(cache_name(b, block), self.family.cache_dtype, shape) for block in blocks for b in by_block]
        sums = [branch for branch in names if branch not in by_block and blocks]
        return (*specs, *(TensorSpec(cache_name(branch, part), "float32", shape) for branch in sums))

    def _is_summed(self, branch: str, part: Part) -> bool:
        is_gated = branch in self.family.gated_branches
        return not is_gated and (part == "shallow" or self.config.selector is None)

    def _selection(self) -> tuple[TensorSpec, ...]:
        if self.config.selector is None:
            return ()
        shape = (len(self._blocks("deep")), "B", self.num_tokens)
        return TensorSpec("scores", "float32", shape), TensorSpec("staleness", "float32", shape)

    def _blocks(self, part: Part) -> range:
        return range(self.deep_start) if part == "shallow" else range(self.deep_start, len(self.family.blocks))

    def _begin(self, tensors: Tensors) -> Tensor:
        """Embed the sample once; both rows of a guided image begin alike. Returns (R, N, D)."""
        x = self.family.embed(tensors["state"][0] * tensors["input_scale"], tensors)  # (B, N, D)
        return torch.cat([x, x]) if self.config.is_guided else x

    def _add_cached(self, x: Tensor, part: Part, tensors: Tensors) -> Tensor:
        """Add the caches of one part of the blocks to x (R, N, D)."""
        branches = self.family.branches
        for index in self._blocks(part):
            block, read = self.family.block(index), self._read(index, tensors)
            for branch in (branch for branch in branches if not self._is_summed(branch, part)):
                x = x + block.gated(branch, tensors[cache_name(branch, index)], read)
        for branch in (branch for branch in branches if self._is_summed(branch, part) and self._blocks(part)):
            x = x + tensors[cache_name(branch, part)]
        return x

    def _compute(self, x: Tensor, part: Part, tensors: Tensors) -> tuple[Tensor, Tensors]:
        """Run one part of the blocks on all tokens. Returns x (R, N, D) and what it leaves for later steps."""
        written: Tensors = {}
        selector = self.config.selector if part == "deep" else None
        scores = []
        for index in self._blocks(part):
            block, read = self.family.block(index), self._read(index, tensors)
            for branch in block.branches:
                if selector is not None and branch == scored_branch(selector):
                    out, score = compute_and_score(block, index, x, read, selector, self.config.rows_per_image)
                    scores.append(score)
                elif branch == ATTENTION:
                    out = block.attend(*block.queries_keys_values(x, read))
                else:
                    out = block.branch(branch, x, read)
                if self._is_summed(branch, part):
                    name, cache = f"next_{cache_name(branch, part)}", out.float()
                    written[name] = written[name] + cache if name in written else cache
                else:
                    written[f"next_{cache_name(branch, index)}"] = out
                x = x + block.gated(branch, out, read)
        if selector is not None:
            none = x.new_zeros((0, x.shape[0] // self.config.rows_per_image, x.shape[1]))
            written["next_scores"] = torch.stack(scores) if scores else none  # (S, B, N)
            written["next_staleness"] = torch.zeros_like(written["next_scores"])
        return x, written

    def _finish(self, x: Tensor, tensors: Tensors) -> Tensors:
        """Head, guidance and solver update."""
        output = self.family.head(x, tensors)  # (R, N, P)
        if self.config.is_guided:
            rows = output.unflatten(0, (2, -1))  # (2, B, N, P)
            cond, uncond = rows[self.family.conditional_row], rows[1 - self.family.conditional_row]
            output = uncond + tensors["guidance"][:, None, None] * (cond - uncond)  # (B, N, P)
        operands = torch.cat([tensors["state"], output[None]])  # (2 + k, B, N, P)
        return {"next_state": (tensors["coefficients"] @ operands.flatten(1)).unflatten(1, operands.shape[1:])}


class Full(StepForward):
    """Every block on every token."""

    def computes(self, block: int, branch: str) -> bool:
        return True

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        branches = self.family.branches
        return (*self._caches("shallow", branches), *self._caches("deep", branches), *self._selection())

    def forward(self, tensors: Tensors) -> Tensors:
        x, shallow = self._compute(self._begin(tensors), "shallow", tensors)
        x, deep = self._compute(x, "deep", tensors)
        return self._finish(x, tensors) | shallow | deep


class Deep(StepForward):
    """The deep blocks on every token; the shallow ones from the cache."""

    def computes(self, block: int, branch: str) -> bool:
        return block >= self.deep_start

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self._caches("shallow", self.family.branches)

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (*self._caches("deep", self.family.branches), *self._selection())

    def forward(self, tensors: Tensors) -> Tensors:
        x = self._add_cached(self._begin(tensors), "shallow", tensors)
        x, written = self._compute(x, "deep", tensors)
        return self._finish(x, tensors) | written


class Front(StepForward):
    """The shallow blocks on every token, left in the cache; `Deep` goes on from there."""

    def computes(self, block: int, branch: str) -> bool:
        return True

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self._state, INPUT_SCALE, *self._conditions(self._blocks("shallow")))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_next(spec) for spec in self._caches("shallow", self.family.branches))

    def forward(self, tensors: Tensors) -> Tensors:
        _, written = self._compute(self._begin(tensors), "shallow", tensors)
        return written


class Reuse(StepForward):
    """Nothing but the gated sum of the caches: x_L = x_0 + Σ_l (g1_l · a_l + c_l + g2_l · m_l), then the head."""

    def computes(self, block: int, branch: str) -> bool:
        return False

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self._caches("shallow", self.family.branches), *self._caches("deep", self.family.branches))

    def forward(self, tensors: Tensors) -> Tensors:
        x = self._add_cached(self._begin(tensors), "shallow", tensors)
        return self._finish(self._add_cached(x, "deep", tensors), tensors)


class Tokens(StepForward):
    """In the deep blocks, all branches but self-attention anew for the K highest-ranked tokens, the rest cached.

    What is computed is written back into the cache (ProCache's selective computation, arXiv:2512.17298). K is the
    length of the input `token_slots`, whose numbers do not matter. Each block chooses its own tokens; its branches
    choose the same, since they would rank them alike: by one score, one K and one history.
    """

    def computes(self, block: int, branch: str) -> bool:
        return block >= self.deep_start and branch != ATTENTION

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        slots = TensorSpec("token_slots", "int64", ("K",))
        branches = self.family.branches
        return (
            slots,
            *self._squares,
            *self._caches("shallow", branches),
            *self._caches("deep", branches),
            *self._selection(),
        )

    @property
    def _squares(self) -> tuple[TensorSpec, ...]:
        """The tokens in the order of the squares that the spatial bonus is for."""
        selector = self.config.selector
        has_bonus = selector is not None and selector.has_squares
        return (TensorSpec("token_squares", "int64", (self.num_tokens,)),) if has_bonus else ()

    @property
    def example_sizes(self) -> dict[str, int]:
        selector = self.config.selector
        return {} if selector is None else {"N": 16 * selector.spatial_size**2}

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        recomputed = [branch for branch in self.family.branches if branch != ATTENTION]
        return (*self._caches("deep", recomputed), self._selection()[1])

    def forward(self, tensors: Tensors) -> Tensors:
        selector = self.config.selector
        assert selector is not None, "`tokens` needs a selector"
        staleness = tensors["staleness"]
        ranks = rank(tensors["scores"], staleness, selector, tensors.get("token_squares"))  # (S, B, N)
        chosen = ranks.topk(tensors["token_slots"].shape[0], dim=-1).indices  # (S, B, K)
        written = {"next_staleness": (staleness + 1).scatter(-1, chosen, 0.0)}
        x = self._add_cached(self._begin(tensors), "shallow", tensors)
        places = self._places(chosen, x.shape[1])  # (S, R·K)
        for index in self._blocks("deep"):
            block, read = self.family.block(index), self._read(index, tensors)
            here = places[index - self.deep_start]  # (R·K,)
            for branch in block.branches:
                out = tensors[cache_name(branch, index)]
                if branch != ATTENTION:
                    rows = x.flatten(0, 1).index_select(0, here).unflatten(0, (x.shape[0], -1))  # (R, K, D)
                    fresh = block.branch(branch, rows, read).flatten(0, 1)  # (R·K, D)
                    out = out.flatten(0, 1).index_put((here,), fresh).unflatten(0, x.shape[:2])  # (R, N, D)
                    written[f"next_{cache_name(branch, index)}"] = out
                x = x + block.gated(branch, out, read)
        return self._finish(x, tensors) | written

    def _places(self, chosen: Tensor, num_tokens: int) -> Tensor:
        """Turn the chosen tokens (S, B, K) into places among all rows' tokens laid end to end, (S, R·K)."""
        by_row = torch.cat([chosen] * self.config.rows_per_image, dim=1)  # (S, R, K)
        first = num_tokens * torch.arange(by_row.shape[1], device=chosen.device)
        return (by_row + first[:, None]).flatten(1)


FORWARDS: Final[dict[Forward, type[StepForward]]] = {
    Forward.FULL: Full,
    Forward.DEEP: Deep,
    Forward.TOKENS: Tokens,
    Forward.REUSE: Reuse,
}


def _next(spec: TensorSpec) -> TensorSpec:
    return replace(spec, name=f"next_{spec.name}")
