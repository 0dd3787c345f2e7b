from __future__ import annotations

import copy
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from hemiola_export.conditioning import Conditioning, ForwardConfig
from hemiola_export.errors import ExportError
from hemiola_export.families import Family, open_transformer
from hemiola_export.families.seams import GAIN, GATE, SHIFT, Side, vector_name
from hemiola_export.forwards import Full
from hemiola_export.selection import check_selector, compute_and_score, random_scores, rank, scored_branch
from hemiola_export.token_forward import Tokens
from hemiola_runtime.program import tokens_by_square
from hemiola_runtime.schedule import TokenSelector
from models import NUM_TOKENS, tiny_dit, tiny_pixart
from strategies import examples

Array = NDArray[np.float64]

TRANSFORMER: Final = tiny_dit()
FAMILY: Final = open_transformer(TRANSFORMER)
BLOCK: Final = 2
SQUARES: Final = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])  # 2 × 2, of 4 × 4 tokens
BATCH: Final = 3


def selector(score: Any = "value_norm", *, staleness_weight: float = 0.0, spatial_bonus: float = 0.0) -> TokenSelector:
    return TokenSelector(score, staleness_weight, spatial_bonus, spatial_size=2, seed=5)


def block_inputs(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw tokens (R, N, D) and a block's modulation."""
    generator = torch.Generator().manual_seed(0)
    names = [vector_name(branch, kind) for branch in ("attention", "mlp") for kind in (SHIFT, GAIN, GATE)]
    vectors = {name: torch.randn((rows, 1, FAMILY.width), generator=generator) for name in names}
    return torch.randn((rows, NUM_TOKENS, FAMILY.width), generator=generator), vectors


def attention_by_hand(x: Tensor, vectors: dict[str, Tensor]) -> tuple[Array, Array, Array]:
    """Compute from diffusers' weights: softmax map (R, h, N, N), values (R, h, N, d), output (R, N, D)."""
    attention = TRANSFORMER.transformer_blocks[BLOCK].attn1
    tokens = x.double().numpy()
    spread = np.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-6)  # AdaLayerNormZero's epsilon
    normed = (tokens - tokens.mean(axis=-1, keepdims=True)) / spread
    normed = normed * vectors["attention_gain"].double().numpy() + vectors["attention_shift"].double().numpy()

    def project(layer: Any, inputs: Array) -> Array:
        out: Array = inputs @ layer.weight.double().numpy().T + layer.bias.double().numpy()
        return out

    def heads(layer: Any) -> Array:
        return project(layer, normed).reshape(*tokens.shape[:2], attention.heads, -1).swapaxes(1, 2)

    queries, keys, values = heads(attention.to_q), heads(attention.to_k), heads(attention.to_v)
    logits = queries @ keys.swapaxes(-1, -2) / np.sqrt(queries.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = (weights @ values).swapaxes(1, 2).reshape(tokens.shape)
    return weights, values, project(attention.to_out[0], mixed)


def scores_by_hand(score: str, x: Tensor, vectors: dict[str, Tensor]) -> Array:
    """Compute one score for each row and token, (R, N), before anything is normalised."""
    weights, values, output = attention_by_hand(x, vectors)
    by_name: dict[str, Array] = {
        "attention": weights.mean(axis=(1, 2)),  # over heads and queries: how much a token is attended to
        "value_norm": np.sqrt((values**2).sum(axis=-1)).sum(axis=1),
        "output_norm": np.sqrt((output**2).sum(axis=-1)),
    }
    return by_name[score]


@pytest.mark.parametrize("rows_per_image", [1, 2])
@pytest.mark.parametrize("score", ["attention", "value_norm", "output_norm"])
def test_a_score_is_its_definition_averaged_over_the_rows_of_an_image_and_normalised(
    score: str, rows_per_image: int
) -> None:
    x, vectors = block_inputs(BATCH * rows_per_image)
    found = compute_and_score(FAMILY.block(BLOCK), BLOCK, x, vectors, selector(score), rows_per_image)[1]
    # conditional rows first: image b is rows b and B + b
    mean = scores_by_hand(score, x, vectors).reshape(rows_per_image, BATCH, NUM_TOKENS).mean(axis=0)
    expected = mean / np.sqrt((mean**2).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)  # float32 against float64


@pytest.mark.parametrize("score", ["attention", "value_norm", "output_norm", "random"])
def test_the_attention_branch_is_the_same_whatever_scores_it(score: str) -> None:
    x, vectors = block_inputs(2 * BATCH)
    found = compute_and_score(FAMILY.block(BLOCK), BLOCK, x, vectors, selector(score), 2)[0]
    expected = attention_by_hand(x, vectors)[2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_random_scores_are_the_same_for_every_image_and_differ_between_blocks_and_seeds() -> None:
    x, vectors = block_inputs(2 * BATCH)
    scores = compute_and_score(FAMILY.block(BLOCK), BLOCK, x, vectors, selector("random"), 2)[1]
    assert torch.equal(scores, random_scores(5, BLOCK, NUM_TOKENS).expand(BATCH, -1))
    others = [random_scores(5, BLOCK + 1, NUM_TOKENS), random_scores(6, BLOCK, NUM_TOKENS)]
    assert not any(torch.equal(scores[0], other) for other in others)


def test_random_scores_are_numpys_philox_so_that_every_machine_draws_the_same() -> None:
    scores = random_scores(seed=5, block=2, num_tokens=NUM_TOKENS)
    expected = np.random.Generator(np.random.Philox(key=[5, 2])).random(NUM_TOKENS, dtype=np.float32)
    assert scores.numpy().tolist() == expected.tolist()
    assert ((scores >= 0) & (scores < 1)).all()
    assert len(set(scores.tolist())) == NUM_TOKENS


# METHODS §14.4 (a): uniform attention gives equal scores, and ties are broken alike every time


def test_uniform_attention_scores_all_tokens_alike() -> None:
    x, vectors = block_inputs(BATCH)
    # gain 0 makes every token the shift alone: equal queries and keys, so a uniform softmax map
    vectors["attention_gain"] = torch.zeros_like(vectors["attention_gain"])
    scores = compute_and_score(FAMILY.block(BLOCK), BLOCK, x, vectors, selector("attention"), 1)[1]
    # sixteen equal numbers of norm 1: each is 1 / sqrt(16) = 0.25
    np.testing.assert_allclose(scores.numpy(), np.full((BATCH, NUM_TOKENS), 0.25), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 5, NUM_TOKENS])
def test_ties_are_broken_alike_every_time(count: int) -> None:
    ranks = rank(torch.ones(2, BATCH, NUM_TOKENS), torch.zeros(2, BATCH, NUM_TOKENS), selector(), None)
    first = ranks.topk(count, dim=-1).indices
    assert torch.equal(ranks.clone().topk(count, dim=-1).indices, first)
    assert all(len(set(chosen)) == count for chosen in first.flatten(0, 1).tolist())


# METHODS §14.4 (b): where nothing but staleness tells tokens apart, they are visited in turn


def tokens_chosen_over_time(chosen_by: TokenSelector, count: int, num_steps: int) -> list[set[int]]:
    """Run `tokens` again and again on one image whose scores are all equal; returns what each step recomputed."""
    config = ForwardConfig(is_guided=False, state_rows=1, deep_start=3, selector=chosen_by)
    tables = Conditioning(FAMILY, config)({"labels": torch.tensor([4]), "timesteps": torch.tensor([500.0])})
    tensors = {name: table[:, None] for name, table in tables.items()} | {
        "state": torch.randn((1, 1, NUM_TOKENS, FAMILY.patch_width), generator=torch.Generator().manual_seed(0)),
        "coefficients": torch.tensor([[1.0, 0.0]]),
        "input_scale": torch.tensor(1.0),
        "token_slots": torch.arange(count),
    }
    written = Full(FAMILY, config)(tensors)
    tensors |= {name.removeprefix("next_"): tensor for name, tensor in written.items()}
    tensors["scores"] = torch.full((1, 1, NUM_TOKENS), 0.25)
    chosen = []
    for _ in range(num_steps):
        written = Tokens(FAMILY, config)(tensors)
        tensors["staleness"] = written["next_staleness"]
        chosen.append(set((tensors["staleness"] == 0).flatten().nonzero().flatten().tolist()))
    return chosen


@pytest.mark.parametrize("count", [1, 4, 8])
def test_with_equal_scores_staleness_visits_all_tokens_in_turn(count: int) -> None:
    round_length = NUM_TOKENS // count
    chosen = tokens_chosen_over_time(selector(staleness_weight=0.25), count, 2 * round_length)
    first, second = chosen[:round_length], chosen[round_length:]
    # a round visits every token, and since it visits each of them once, all steps together visit 16
    assert set().union(*first) == set().union(*second) == set(range(NUM_TOKENS))
    assert sum(map(len, first)) == sum(map(len, second)) == NUM_TOKENS


@pytest.mark.parametrize("count", [3, 5, 7])
def test_with_equal_scores_no_token_waits_longer_than_a_round(count: int) -> None:
    # ceil(16 / K) steps suffice to visit every token, wherever one begins to count
    round_length = -(-NUM_TOKENS // count)
    chosen = tokens_chosen_over_time(selector(staleness_weight=0.25), count, 3 * round_length)
    for start in range(2 * round_length):
        assert set().union(*chosen[start : start + round_length]) == set(range(NUM_TOKENS))


def test_without_staleness_the_same_tokens_are_chosen_again() -> None:
    chosen = tokens_chosen_over_time(selector(staleness_weight=0.0), 4, 3)
    assert chosen[0] == chosen[1] == chosen[2]


def test_ranks_are_scores_and_weighted_staleness() -> None:
    scores = torch.tensor([[[0.5, 0.25, 0.125, 0.0]]])
    staleness = torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
    ranks = rank(scores, staleness, selector(staleness_weight=0.25), None)
    # 0.5 + 0, 0.25 + 0.25, 0.125 + 0.5, 0 + 1
    assert ranks.tolist() == [[[0.5, 0.5, 0.625, 1.0]]]


# METHODS §14.4 (c): in each square only the best token is raised


def test_the_best_token_of_each_square_is_raised_and_no_other() -> None:
    # a 4 × 4 grid in squares of 2 × 2; the best of each square is marked by its size
    scores = torch.tensor([1.0, 2.0, 3.0, 8.0, 5.0, 4.0, 7.0, 6.0, 9.0, 10.0, 16.0, 11.0, 13.0, 12.0, 14.0, 15.0])
    ranks = rank(scores[None, None], torch.zeros(1, 1, 16), selector(spatial_bonus=0.5), SQUARES)
    # squares {1 2 5 4}, {3 8 7 6}, {9 10 13 12}, {16 11 14 15}: 5, 8, 13 and 16 become 7.5, 12, 19.5 and 24
    expected = [1.0, 2.0, 3.0, 12.0, 7.5, 4.0, 7.0, 6.0, 9.0, 10.0, 24.0, 11.0, 19.5, 12.0, 14.0, 15.0]
    assert ranks.flatten().tolist() == expected


@examples(25)
@given(
    size=st.integers(1, 3),
    squares=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    order=st.randoms(use_true_random=False),
    bonus=st.floats(0.25, 2),
)
def test_one_token_of_each_square_is_raised_by_the_bonus(
    size: int, squares: tuple[int, int], order: Any, bonus: float
) -> None:
    grid = (size * squares[0], size * squares[1])
    numbers = [float(number) for number in range(1, grid[0] * grid[1] + 1)]
    order.shuffle(numbers)
    chosen_by = TokenSelector("value_norm", 0.0, bonus, size, 0)
    order_of_squares = torch.tensor(tokens_by_square(grid, size)) if size > 1 else None
    ranks = rank(torch.tensor(numbers)[None, None], torch.zeros(1, 1, len(numbers)), chosen_by, order_of_squares)
    before, raised = np.array(numbers).reshape(grid), ranks.numpy().reshape(grid)
    expected = before.copy()
    for row in range(0, grid[0], size):
        for column in range(0, grid[1], size):
            square = (slice(row, row + size), slice(column, column + size))
            if size > 1:  # a square of one token raises all alike: left out
                expected[square][before[square] == before[square].max()] *= 1 + bonus
    np.testing.assert_allclose(raised, expected, rtol=1e-6)


def test_blocks_and_images_are_ranked_apart() -> None:
    scores = torch.rand((3, BATCH, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    staleness = torch.randint(0, 4, scores.shape, generator=torch.Generator().manual_seed(2)).float()
    chosen_by = selector(staleness_weight=0.25, spatial_bonus=0.5)
    ranks = rank(scores, staleness, chosen_by, SQUARES)
    for block in range(3):
        for image in range(BATCH):
            alone = (slice(block, block + 1), slice(image, image + 1))
            assert torch.equal(rank(scores[alone], staleness[alone], chosen_by, SQUARES), ranks[alone])


def family_of_grid(grid: tuple[int, int], family: Family = FAMILY) -> Family:
    """Return a family that is configured for pictures of so many tokens; of it nothing else is used."""
    copied = copy.copy(family)
    copied.latent_shape = (1, grid[0] * family.patch_size, grid[1] * family.patch_size)
    return copied


@pytest.mark.parametrize(("size", "grid"), [(3, (16, 16)), (2, (3, 4)), (2, (4, 3)), (5, (4, 4))])
def test_squares_must_tile_the_token_grid(size: int, grid: tuple[int, int]) -> None:
    with pytest.raises(ExportError, match=f"spatial_size {size} does not divide the token grid {grid[0]}×{grid[1]}"):
        check_selector(TokenSelector("value_norm", 0.0, 0.5, size, 0), family_of_grid(grid), None)


@pytest.mark.parametrize(("bonus", "size", "grid"), [(0.5, 2, (16, 16)), (0.5, 1, (3, 3)), (0.0, 3, (16, 16))])
def test_squares_that_tile_the_grid_or_are_not_used_pass(bonus: float, size: int, grid: tuple[int, int]) -> None:
    chosen_by = TokenSelector("value_norm", 0.0, bonus, size, 0)
    check_selector(chosen_by, family_of_grid(grid), None)
    assert chosen_by.has_squares == (bonus > 0 and size > 1)


@pytest.mark.parametrize("num_tokens", [None, "N"])
def test_the_entropy_of_cross_attention_needs_cross_attention(num_tokens: Side | None) -> None:
    chosen_by = selector("cross_attention_entropy")
    with pytest.raises(ExportError, match="cross_attention_entropy needs cross-attention, which dit has not"):
        check_selector(chosen_by, FAMILY, num_tokens)
    check_selector(chosen_by, open_transformer(tiny_pixart()), num_tokens)


def test_random_scores_are_for_one_size_of_pictures() -> None:
    with pytest.raises(ExportError, match="random has numbers for one size of pictures; export for one size alone"):
        check_selector(selector("random"), FAMILY, "N")
    for num_tokens in (None, NUM_TOKENS):
        check_selector(selector("random"), FAMILY, num_tokens)


@pytest.mark.parametrize("score", ["attention", "value_norm", "output_norm", "random"])
def test_scores_of_self_attention_are_for_any_family_and_size(score: Any) -> None:
    for transformer in (tiny_dit(num_blocks=1), tiny_pixart(num_blocks=1)):
        family = open_transformer(transformer)
        check_selector(selector(score), family, None if score == "random" else "N")
        assert scored_branch(selector(score)) == "attention"
