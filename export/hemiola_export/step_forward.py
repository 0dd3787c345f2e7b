"""What all forwards of one step share: how they begin, what they read of earlier steps, how they end.

Caches: a branch with a gate leaves its output in each block, since gates change from step to step. What is added
without a gate (cross-attention) is only ever needed as a sum over blocks, and is kept as one, float32: one over the
shallow blocks, one over the deep ones; but where `tokens` writes rows of its own in every deep block, one for each,
and where `masked` computes some blocks alone.

A forward of order o > 0 takes a weighted sum of what the last o + 1 full steps left wherever another takes the cache as
it is (the forecasts of TaylorSeer, arXiv:2503.06923, are such sums). The weights are an input. What such a forward
computes anew it writes back as a correction: into the newest cache goes the value with which the forecast of this step
is what was computed. For two full steps that is the line through the older one and this step. Between two full steps,
forecasts of one order so agree; one of another order takes a correction for what a full step left.

Symbols as in `forwards`.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Final, Literal

import torch
from torch import Tensor

from hemiola_export.conditioning import ForwardConfig, GraphModule
from hemiola_export.errors import ExportError
from hemiola_export.families.seams import ATTENTION, GAIN, GATE, SHIFT, Block, Family, Read, vector_name
from hemiola_export.named_module import Tensors
from hemiola_export.selection import check_selector, compute_and_score, scored_branch
from hemiola_runtime.graphs import TensorSpec

INPUT_SCALE: Final = TensorSpec("input_scale", "float32", ())
RESIDUAL_CACHE: Final = "residual_cache.all"
Part = Literal["shallow", "deep"]  # of the blocks


def cache_name(branch: str, block: int | str, age: int = 0) -> str:
    """Name the cached output of one branch, (R, N, D) before its gate, in one block or summed over a part of them.

    `age` tells how many full steps before the last it was left.
    """
    return f"{branch}_cache.{block}.{age}" if age else f"{branch}_cache.{block}"


def next_of(spec: TensorSpec) -> TensorSpec:
    """Describe the output that replaces a tensor."""
    return replace(spec, name=f"next_{spec.name}")


def computed(block: Block, branch: str, x: Tensor, read: Read) -> Tensor:
    """Compute a branch of a block on all tokens x (R, N, D): (R, N, D) compute dtype, before its gate."""
    if branch == ATTENTION:
        return block.attend(*block.queries_keys_values(x, read))
    return block.branch(branch, x, read)


def stacked(tensor: Tensor, times: int) -> Tensor:
    """Repeat a tensor along its first side."""
    return tensor if times == 1 else torch.cat([tensor] * times)


class StepForward(GraphModule):
    """What all forwards of one step share: how it begins, how caches are summed, how it ends."""

    def __init__(self, family: Family, config: ForwardConfig, order: int = 0) -> None:
        super().__init__(family, config)
        self.order = order
        self.deep_start = len(family.blocks) if config.deep_start is None else config.deep_start
        if config.selector is not None:
            check_selector(config.selector, family, config.num_tokens)
        if config.mask is not None:
            check_mask_of(config.mask, family)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        coefficients = (self.config.state_rows, self.config.state_rows + 1)
        specs = [self._state, TensorSpec("coefficients", "float32", coefficients), INPUT_SCALE]
        if self.config.is_guided:
            specs.append(TensorSpec("guidance", "float32", ("B",)))
        if self.order:
            specs.append(TensorSpec("forecast", "float32", (self.order + 1,)))
        return (*specs, *self._conditions(self._summed, self.family.head_vectors), *self.reads)

    @property
    def _summed(self) -> range:
        """The blocks whose layers it adds up."""
        return self._all

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (next_of(self._state), *(next_of(spec) for spec in self.writes))

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

    def _written(self, part: Part, branches: Iterable[str]) -> tuple[TensorSpec, ...]:
        """The caches of some branches in one part of the blocks, as the last step left them."""
        shape = ("R", self.num_tokens, self.family.width)
        names, blocks = list(branches), self._blocks(part)
        by_block = [branch for branch in names if not self._is_summed(branch, part)]
        specs = [TensorSpec(cache_name(b, block), self.family.cache_dtype, shape) for block in blocks for b in by_block]
        sums = [branch for branch in names if branch not in by_block and blocks]
        return (*specs, *(TensorSpec(cache_name(branch, part), "float32", shape) for branch in sums))

    def _older(self, caches: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        """Some caches, as the `order` full steps before the last left them."""
        newest = tuple(caches)
        return tuple(replace(spec, name=f"{spec.name}.{age}") for age in range(1, self.order + 1) for spec in newest)

    def _read_caches(self, part: Part) -> tuple[TensorSpec, ...]:
        """All caches of one part of the blocks, as the last `order` + 1 full steps left them."""
        newest = self._written(part, self.family.branches)
        return (*newest, *self._older(newest))

    def _is_summed(self, branch: str, part: Part) -> bool:
        is_by_block = self.config.mask is not None or (part == "deep" and self.config.selector is not None)
        return branch not in self.family.gated_branches and not is_by_block

    def _residual(self) -> tuple[TensorSpec, ...]:
        """What all layers together add to the embedded tokens, where it is kept."""
        shape = ("R", self.num_tokens, self.family.width)
        return (TensorSpec(RESIDUAL_CACHE, "float32", shape),) if self.config.keeps_residual else ()

    def _residual_of(self, x: Tensor, begun: Tensor, tensors: Tensors) -> Tensors:
        """Return what is left of x_L and x_0, (R, N, D) each."""
        return {f"next_{spec.name}": self._replacing(spec.name, x - begun, tensors) for spec in self._residual()}

    def _selection(self) -> tuple[TensorSpec, ...]:
        """Scores of the deep blocks; staleness likewise, of each branch where each chooses for itself."""
        if self.config.selector is None:
            return ()
        num_blocks, num_chosen = len(self._blocks("deep")), len(self._chosen)
        return (
            TensorSpec("scores", "float32", (num_blocks, "B", self.num_tokens)),
            TensorSpec("staleness", "float32", (num_blocks * num_chosen, "B", self.num_tokens)),
        )

    @property
    def _chosen(self) -> tuple[str, ...]:
        """The branches for which tokens are chosen: each by itself, or one for all that are recomputed."""
        recomputed = tuple(branch for branch in self.family.branches if branch != ATTENTION)
        return recomputed if self.config.has_block_counts else recomputed[:1]

    def _blocks(self, part: Part) -> range:
        return range(self.deep_start) if part == "shallow" else range(self.deep_start, len(self.family.blocks))

    def _begin(self, tensors: Tensors) -> Tensor:
        """Embed the sample once; both rows of a guided image begin alike. Returns (R, N, D)."""
        x = self.family.embed(tensors["state"][0] * tensors["input_scale"], tensors)  # (B, N, D)
        return torch.cat([x, x]) if self.config.is_guided else x

    def _cached(self, branch: str, block: int | str, tensors: Tensors) -> Tensor:
        """Return a cache (R, N, D) as the last step left it; or its forecast, float32."""
        newest = tensors[cache_name(branch, block)]
        if not self.order:
            return newest
        return tensors["forecast"][0] * newest.float() + self._share_of_older(branch, block, tensors)

    def _share_of_older(self, branch: str, block: int | str, tensors: Tensors) -> Tensor:
        """Return what caches older than the newest add to a forecast, (R, N, D) float32."""
        ages = range(1, self.order + 1)
        terms = [tensors["forecast"][age] * tensors[cache_name(branch, block, age)].float() for age in ages]
        return functools.reduce(torch.add, terms)

    def _corrected(self, fresh: Tensor, share_of_older: Tensor, tensors: Tensors) -> Tensor:
        """Return what the newest cache has to be for this step's forecast to be what was computed, both (…, D)."""
        return ((fresh.float() - share_of_older) / tensors["forecast"][0]).to(fresh.dtype)

    def _add_cached(self, x: Tensor, part: Part, tensors: Tensors) -> Tensor:
        """Add the caches of one part of the blocks to x (R, N, D)."""
        branches = self.family.branches
        for index in self._blocks(part):
            block, read = self.family.block(index), self._read(index, tensors)
            for branch in (branch for branch in branches if not self._is_summed(branch, part)):
                x = x + block.gated(branch, self._cached(branch, index, tensors), read)
        for branch in (branch for branch in branches if self._is_summed(branch, part) and self._blocks(part)):
            x = x + self._cached(branch, part, tensors)
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
                else:
                    out = computed(block, branch, x, read)
                if self._is_summed(branch, part):
                    name, cache = cache_name(branch, part), out.float()
                    written[name] = written[name] + cache if name in written else cache
                else:
                    written[cache_name(branch, index)] = out
                x = x + block.gated(branch, out, read)
        left = {f"next_{name}": self._replacing(name, fresh, tensors) for name, fresh in written.items()}
        if selector is not None:
            none = x.new_zeros((0, x.shape[0] // self.config.rows_per_image, x.shape[1]))
            left["next_scores"] = torch.stack(scores) if scores else none  # (S, B, N)
            left["next_staleness"] = stacked(torch.zeros_like(left["next_scores"]), len(self._chosen))
        return x, left

    def _replacing(self, name: str, fresh: Tensor, tensors: Tensors) -> Tensor:
        """Return what goes into a whole cache that was computed anew."""
        if not self.order:
            return fresh
        branch, _, block = name.partition("_cache.")
        return self._corrected(fresh, self._share_of_older(branch, block, tensors), tensors)

    def _finish(self, x: Tensor, tensors: Tensors) -> Tensors:
        """Head, guidance and solver update."""
        output = self.family.head(x, tensors)  # (R, N, P)
        if self.config.is_guided:
            rows = output.unflatten(0, (2, -1))  # (2, B, N, P)
            cond, uncond = rows[self.family.conditional_row], rows[1 - self.family.conditional_row]
            output = uncond + tensors["guidance"][:, None, None] * (cond - uncond)  # (B, N, P)
        operands = torch.cat([tensors["state"], output[None]])  # (2 + k, B, N, P)
        return {"next_state": (tensors["coefficients"] @ operands.flatten(1)).unflatten(1, operands.shape[1:])}


def check_mask_of(mask: tuple[str, ...], family: Family) -> None:
    """Make sure that a mask is one of a model.

    Raises:
        ExportError: it has other branches or blocks.
    """
    if len(mask) != len(family.branches) or len(mask[0]) != len(family.blocks):
        raise ExportError(
            f"the mask has {len(mask)} branches of {len(mask[0])} blocks, but the model has "
            f"{len(family.branches)} ({', '.join(family.branches)}) of {len(family.blocks)}"
        )
