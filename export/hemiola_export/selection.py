"""Token selection: which tokens of a deep block are worth computing anew.

Scores are taken where the branch that they are about is computed (`full`, `deep`), ranked where tokens are chosen
(`tokens`). Both rows of a guided image choose the same tokens, by the mean of their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hemiola_export.errors import ExportError
from hemiola_export.families.seams import ATTENTION, CROSS, Block, Family, Read, Side
from hemiola_runtime.schedule import TokenSelector

Scored = tuple[Tensor, Tensor]  # what the branch gives (R, N, D), and a score for each token (B, N)
Scorer = Callable[[Block, Tensor, Read, int], Scored]  # of a block, x (R, N, D), what it reads, rows per image


def _by_image(scores: Tensor, rows_per_image: int) -> Tensor:
    """Take the mean over the rows of an image: (R, …) to (B, …)."""
    return torch.mean(scores.unflatten(0, (rows_per_image, -1)), dim=0)


def _by_attention(block: Block, x: Tensor, read: Read, rows_per_image: int) -> Scored:
    """Score by how much a token is attended to. Materialises the softmax map, so attention cannot be fused."""
    queries, keys, values = block.queries_keys_values(x, read)
    weights = block.attention_map(queries, keys)  # (R, h, N, N)
    return block.project(weights @ values), _by_image(weights.float().mean(dim=(1, 2)), rows_per_image)


def _by_value_norm(block: Block, x: Tensor, read: Read, rows_per_image: int) -> Scored:
    queries, keys, values = block.queries_keys_values(x, read)
    norms = values.float().norm(dim=-1).sum(dim=1)  # (R, N)
    return block.attend(queries, keys, values), _by_image(norms, rows_per_image)


def _by_output_norm(block: Block, x: Tensor, read: Read, rows_per_image: int) -> Scored:
    attended = block.attend(*block.queries_keys_values(x, read))
    return attended, _by_image(attended.float().norm(dim=-1), rows_per_image)


def _by_cross_attention_entropy(block: Block, x: Tensor, read: Read, rows_per_image: int) -> Scored:
    """Score by how evenly a token looks at the prompt, of heads and rows together (ToCa s2, arXiv:2410.05317 §3.2)."""
    weights = block.cross_attention_map(x, read).float().mean(dim=1)  # (R, N, S)
    weights = _by_image(weights, rows_per_image)  # (B, N, S)
    return block.branch(CROSS, x, read), 1 - (weights * (weights + 1e-7).log()).sum(dim=-1)


SCORERS: Final[Mapping[str, tuple[str, Scorer]]] = {  # the branch that a score is about, and what takes it
    "attention": (ATTENTION, _by_attention),
    "value_norm": (ATTENTION, _by_value_norm),
    "output_norm": (ATTENTION, _by_output_norm),
    "cross_attention_entropy": (CROSS, _by_cross_attention_entropy),
}


def scored_branch(selector: TokenSelector) -> str:
    """Name the branch with which scores are taken."""
    return SCORERS[selector.score][0] if selector.score in SCORERS else ATTENTION


def random_scores(seed: int, block: int, num_tokens: int) -> Tensor:
    """Return fixed scores (N,) in [0, 1) for the `random` selector: the same for every image, step and machine."""
    generator = np.random.Generator(np.random.Philox(key=[seed, block]))
    return torch.from_numpy(generator.random(num_tokens, dtype=np.float32))


def compute_and_score(
    block: Block, index: int, x: Tensor, read: Read, selector: TokenSelector, rows_per_image: int
) -> Scored:
    """Compute the scored branch of a block and the scores of its tokens.

    Args:
        block: the block.
        index: its number.
        x: (R, N, D).
        read: what the block reads at this step.
        selector: which score.
        rows_per_image: 2 under guidance, else 1.

    Returns:
        The branch (R, N, D) before its gate, and scores (B, N).
    """
    if selector.score == "random":
        attended = block.attend(*block.queries_keys_values(x, read))
        fixed = random_scores(selector.seed, index, x.shape[1]).to(x.device)
        return attended, fixed.expand(x.shape[0], -1).unflatten(0, (rows_per_image, -1))[0]
    out, scores = SCORERS[selector.score][1](block, x, read, rows_per_image)
    return out, F.normalize(scores, dim=-1)


def rank(scores: Tensor, staleness: Tensor, selector: TokenSelector, squares: Tensor | None) -> Tensor:
    """Combine score, staleness and place into the number by which tokens are chosen (ToCa §3.3, arXiv:2410.05317).

    Args:
        scores: (S, B, N) as taken when the blocks were last computed.
        staleness: (S, B, N), `tokens` steps since each token was last computed.
        selector: the weights.
        squares: (N,) int64, the tokens in the order of the squares of the spatial bonus, one square behind the other;
            None without a bonus.

    Returns:
        (S, B, N), larger is chosen first.
    """
    ranks = scores + selector.staleness_weight * staleness
    if squares is None:
        return ranks
    by_square = ranks.index_select(-1, squares).unflatten(-1, (-1, selector.spatial_size**2))  # (S, B, squares, size²)
    best = by_square.amax(dim=-1, keepdim=True)
    raised = torch.where(by_square >= best, by_square * (1 + selector.spatial_bonus), by_square).flatten(-2)
    return torch.zeros_like(ranks).scatter(-1, squares.expand(ranks.shape), raised)


def check_selector(selector: TokenSelector, family: Family, num_tokens: Side | None) -> None:
    """Make sure that a selector can rank the tokens of a model.

    Raises:
        ExportError: it cannot.
    """
    if scored_branch(selector) not in family.branches:
        raise ExportError(f"the selector {selector.score} needs cross-attention, which {family.key} has not")
    if selector.score == "random" and isinstance(num_tokens, str):
        raise ExportError("the selector random has numbers for one size of pictures; export for one size alone")
    if selector.has_squares and any(side % selector.spatial_size for side in family.grid):
        rows, columns = family.grid
        raise ExportError(f"spatial_size {selector.spatial_size} does not divide the token grid {rows}×{columns}")
