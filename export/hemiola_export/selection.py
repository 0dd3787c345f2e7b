"""Token selection: which tokens of a deep block are worth computing anew.

Scores are taken where attention is computed (`full`, `deep`), ranked where tokens are chosen (`tokens`). Both rows of a
guided image choose the same tokens, by the mean of their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hemiola_export.errors import ExportError
from hemiola_export.families.seams import Block, Vectors
from hemiola_runtime.schedule import TokenSelector

Attended = tuple[Tensor, Tensor]  # what the attention branch gives (R, N, D), and a score for each token (R, N)
Scorer = Callable[[Block, Tensor, Tensor, Tensor], Attended]


def _by_attention(block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
    """Score by how much a token is attended to. Materialises the softmax map, so attention cannot be fused."""
    weights = block.attention_map(queries, keys)  # (R, h, N, N)
    return block.project(weights @ values), weights.float().mean(dim=(1, 2))


def _by_value_norm(block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
    return block.attend(queries, keys, values), values.float().norm(dim=-1).sum(dim=1)


def _by_output_norm(block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> Attended:
    attended = block.attend(queries, keys, values)
    return attended, attended.float().norm(dim=-1)


SCORERS: Final[Mapping[str, Scorer]] = {
    "attention": _by_attention,
    "value_norm": _by_value_norm,
    "output_norm": _by_output_norm,
}


def random_scores(seed: int, block: int, num_tokens: int) -> Tensor:
    """Return fixed scores (N,) in [0, 1) for the `random` selector: the same for every image, step and machine."""
    generator = np.random.Generator(np.random.Philox(key=[seed, block]))
    return torch.from_numpy(generator.random(num_tokens, dtype=np.float32))


def attend_and_score(
    block: Block, index: int, x: Tensor, vectors: Vectors, selector: TokenSelector, rows_per_image: int
) -> Attended:
    """Compute the attention branch of a block and the scores of its tokens.

    Args:
        block: the block.
        index: its number.
        x: (R, N, D).
        vectors: the block's modulation at this step.
        selector: which score.
        rows_per_image: 2 under guidance, else 1.

    Returns:
        The branch (R, N, D) before its gate, and scores (B, N).
    """
    projections = block.queries_keys_values(x, vectors)
    if selector.score == "random":
        attended = block.attend(*projections)
        fixed = random_scores(selector.seed, index, x.shape[1]).to(x.device)
        return attended, fixed.expand(x.shape[0], -1).unflatten(0, (rows_per_image, -1))[0]
    attended, scores = SCORERS[selector.score](block, *projections)
    return attended, F.normalize(scores.unflatten(0, (rows_per_image, -1)).mean(dim=0), dim=-1)


def rank(scores: Tensor, staleness: Tensor, selector: TokenSelector, grid: tuple[int, int]) -> Tensor:
    """Combine score, staleness and place into the number by which tokens are chosen (ToCa §3.3, arXiv:2410.05317).

    Args:
        scores: (S, B, N) as taken when the blocks were last computed.
        staleness: (S, B, N), `tokens` steps since each token was last computed.
        selector: the weights.
        grid: rows and columns of tokens.

    Returns:
        (S, B, N), larger is chosen first.
    """
    ranks = scores + selector.staleness_weight * staleness
    size = selector.spatial_size
    if selector.spatial_bonus == 0 or size == 1:
        return ranks
    rows, columns = grid[0] // size, grid[1] // size
    squares = ranks.unflatten(-1, (rows, size, columns, size))  # (S, B, rows, size, columns, size)
    best = squares.amax(dim=(-3, -1), keepdim=True)
    return torch.where(squares >= best, squares * (1 + selector.spatial_bonus), squares).flatten(-4)


def check_selector(selector: TokenSelector, grid: tuple[int, int]) -> None:
    """Make sure that the squares of the spatial bonus tile the token grid.

    Raises:
        ExportError: they do not.
    """
    if selector.spatial_bonus and any(side % selector.spatial_size for side in grid):
        raise ExportError(f"spatial_size {selector.spatial_size} does not divide the token grid {grid[0]}×{grid[1]}")
