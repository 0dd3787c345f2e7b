"""The forward that computes a few tokens anew, chosen by the scores that `full` and `deep` left.

Symbols as in `forwards`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hemiola_export.families.seams import ATTENTION
from hemiola_export.named_module import Tensors
from hemiola_export.selection import rank
from hemiola_export.step_forward import StepForward, cache_name, stacked
from hemiola_runtime.graphs import TensorSpec, slots_name


class Tokens(StepForward):
    """In the deep blocks, all branches but self-attention anew for the K highest-ranked tokens, the rest cached.

    What is computed is written back into the cache (ProCache's selective computation, arXiv:2512.17298; with all blocks
    deep it is ToCa's, arXiv:2410.05317). K is the length of the input `token_slots`, which counts from 0. Each block
    chooses its own tokens. Its branches choose the same, since they would rank them alike: by one score, one K and one
    history. But with a count for each block and branch, the length of `token_slots.mlp.3`, each has a history of its
    own, and K is the largest of them.
    """

    def computes(self, block: int, branch: str) -> bool:
        return block >= self.deep_start and branch != ATTENTION

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (
            *self._slots,
            *self._squares,
            *self._read_caches("shallow"),
            *self._read_caches("deep"),
            *self._older(self._residual()),
            *self._selection(),
        )

    @property
    def _slots(self) -> tuple[TensorSpec, ...]:
        symbols = ["K"]
        if self.config.has_block_counts:
            symbols += [f"K.{branch}.{index}" for branch in self._chosen for index in self._blocks("deep")]
        return tuple(TensorSpec(slots_name(symbol), "int64", (symbol,)) for symbol in symbols)

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
        return (*self._written("deep", recomputed), *self._residual(), self._selection()[1])

    def forward(self, tensors: Tensors) -> Tensors:
        begun = self._begin(tensors)
        x = self._add_cached(begun, "shallow", tensors)
        staleness, places = self._choose(tensors, x.shape[1])
        written = {"next_staleness": staleness}
        for index in self._blocks("deep"):
            block, read = self.family.block(index), self._read(index, tensors)
            for branch in block.branches:
                out = self._cached(branch, index, tensors)
                if branch != ATTENTION:
                    name = cache_name(branch, index)
                    here = places[branch if self.config.has_block_counts else self._chosen[0], index]  # (R·K,)
                    rows = _rows(x, here).unflatten(0, (x.shape[0], -1))  # (R, K, D)
                    fresh = block.branch(branch, rows, read).flatten(0, 1)  # (R·K, D)
                    if self.order:
                        share = self._share_of_older(branch, index, tensors)
                        kept = self._corrected(fresh, _rows(share, here), tensors)
                        written[f"next_{name}"] = _with_rows(tensors[name], here, kept)
                    out = _with_rows(out, here, fresh)
                    written.setdefault(f"next_{name}", out)
                x = x + block.gated(branch, out, read)
        return self._finish(x, tensors) | written | self._residual_of(x, begun, tensors)

    def _choose(self, tensors: Tensors, num_tokens: int) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """Choose tokens.

        Returns:
            Staleness from now on; and by choosing branch and deep block, where the chosen tokens lie among those of all
            rows laid end to end, (R·K,).
        """
        selector = self.config.selector
        assert selector is not None, "`tokens` needs a selector"
        staleness = tensors["staleness"]
        scores = stacked(tensors["scores"], len(self._chosen))
        ranks = rank(scores, staleness, selector, tensors.get("token_squares"))  # (C·S, B, N), C branches that choose
        best = ranks.topk(tensors["token_slots"].shape[0], dim=-1).indices  # (C·S, B, K), in order
        keys = [(branch, index) for branch in self._chosen for index in self._blocks("deep")]
        if not self.config.has_block_counts:
            places = self._places(best, num_tokens)  # (S, R·K)
            return (staleness + 1).scatter(-1, best, 0.0), dict(zip(keys, places, strict=True))
        slots = [tensors[spec.name] for spec in self._slots[1:]]
        chosen = [row[None].index_select(-1, these) for row, these in zip(best, slots, strict=True)]  # (1, B, K) each
        aged = [(old[None] + 1).scatter(-1, row, 0.0) for old, row in zip(staleness, chosen, strict=True)]
        return torch.cat(aged), {key: self._places(row, num_tokens)[0] for key, row in zip(keys, chosen, strict=True)}

    def _places(self, chosen: Tensor, num_tokens: int) -> Tensor:
        """Turn the chosen tokens (S, B, K) into places among all rows' tokens laid end to end, (S, R·K)."""
        by_row = torch.cat([chosen] * self.config.rows_per_image, dim=1)  # (S, R, K)
        first = num_tokens * torch.arange(by_row.shape[1], device=chosen.device)
        return (by_row + first[:, None]).flatten(1)


def _rows(tensor: Tensor, places: Tensor) -> Tensor:
    """Return the rows (R·K, D) of a tensor (R, N, D) at some places of all tokens laid end to end."""
    return tensor.flatten(0, 1).index_select(0, places)


def _with_rows(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """Return a cache (R, N, D) with other rows (R·K, D) at some places of all tokens laid end to end."""
    flat = cache.flatten(0, 1)
    changed: Tensor = flat.index_put((places,), rows.to(flat.dtype)).unflatten(0, cache.shape[:2])
    return changed
