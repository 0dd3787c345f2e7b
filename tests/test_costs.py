from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.schedule import DEEP, FULL, REUSE, Step, tokens
from hemiola_search.costs import FlopsModel
from strategies import examples

# DiT-XL/2 at 256²: 28 blocks of width 1152, 16 × 16 tokens; a quarter of the blocks is deep.
DIT_XL_2 = FlopsModel(width=1152, num_tokens=256, num_blocks=28, deep_start=21, rows_per_image=2)

# D = 2, N = 4, L = 3, one deep block, one row an image.
#   attention 8·4·2² + 4·4²·2 = 128 + 128 = 256; MLP 16·4·2² = 256; adaLN of all blocks 3·12·2² = 144
SMALL = FlopsModel(width=2, num_tokens=4, num_blocks=3, deep_start=2, rows_per_image=1)


@pytest.mark.parametrize(
    ("step", "flops"),
    [
        (FULL, 3 * (256 + 256) + 144),
        (DEEP, (256 + 256) + 144),
        (tokens(3), 16 * 3 * 4 + 144),  # the MLP of 3 tokens in 1 block
        (tokens(1), 16 * 1 * 4 + 144),
        (REUSE, 144),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_costs_what_its_formula_says(step: Step, flops: int, rows: int) -> None:
    model = FlopsModel(width=2, num_tokens=4, num_blocks=3, deep_start=2, rows_per_image=rows)
    assert model.step(step) == rows * flops


# The same with cross-attention to S = 5 tokens, and modulation that all images share.
#   of one token: MLP 16·2² = 64, queries and output 4·2² = 16, scores and mixing 4·5·2 = 40
@pytest.mark.parametrize(
    ("step", "flops"),
    [
        (FULL, 3 * (256 + 4 * (64 + 16 + 40))),
        (DEEP, 256 + 4 * (64 + 16 + 40)),
        (tokens(3), 3 * (64 + 16 + 40)),
        (REUSE, 0),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_with_cross_attention_costs_what_its_formula_says(step: Step, flops: int, rows: int) -> None:
    model = FlopsModel(2, num_tokens=4, num_blocks=3, deep_start=2, rows_per_image=rows, num_text_tokens=5)
    assert model.step(step) == rows * flops


def test_one_forward_of_dit_xl_2_takes_237_gflop_a_row() -> None:
    # METHODS.md §14.1. 24·256·1152² + 4·256²·1152 + 12·1152² = 8.4716 G for a block; times 28
    assert DIT_XL_2.step(FULL) / 2 == pytest.approx(237.21e9, abs=0.005e9)


@pytest.mark.parametrize(
    ("num_full", "tera_flops"),
    [  # of 50 DDIM steps with guidance, the others reuse (METHODS.md §14.1)
        (50, 23.72),  # uncached; the paper counts 23.74
        (18, 8.568),  # FORA with N = 3
        (17, 8.094),  # ProCache's released rhythm without its selective steps
        (13, 6.200),
        (11, 5.253),
    ],
)
def test_ddim_50_on_dit_xl_2_costs_what_the_papers_tables_say(num_full: int, tera_flops: float) -> None:
    steps = [FULL] * num_full + [REUSE] * (50 - num_full)
    assert DIT_XL_2.schedule(steps) / 1e12 == pytest.approx(tera_flops, abs=10 ** -(2 if num_full == 50 else 3) / 2)


def test_a_schedule_costs_the_sum_of_its_steps() -> None:
    # 1680 + 144 + 336 + 656 by the table above
    assert SMALL.schedule([FULL, REUSE, tokens(3), DEEP]) == 1680 + 144 + 336 + 656
    assert SMALL.schedule([]) == 0


def test_without_deep_blocks_deep_steps_cost_as_much_as_reuse() -> None:
    model = FlopsModel(width=2, num_tokens=4, num_blocks=3, deep_start=None, rows_per_image=1)
    assert model.step(DEEP) == model.step(tokens(4)) == model.step(REUSE)


@given(
    heads=st.integers(1, 8),
    num_tokens=st.integers(2, 64),
    num_blocks=st.integers(1, 8),
    num_text_tokens=st.none() | st.integers(1, 300),
    data=st.data(),
)
@examples(50)
def test_the_less_a_forward_computes_the_less_it_costs(
    heads: int, num_tokens: int, num_blocks: int, num_text_tokens: int | None, data: st.DataObject
) -> None:
    deep_start = data.draw(st.integers(0, num_blocks - 1))
    model = FlopsModel(16 * heads, num_tokens, num_blocks, deep_start, 2, num_text_tokens)
    count = data.draw(st.integers(2, num_tokens))
    costs = [model.step(step) for step in (REUSE, tokens(count - 1), tokens(count), DEEP, FULL)]
    assert costs == sorted(costs)
    assert len(set(costs[:4])) == 4
    assert (costs[3] == costs[4]) == (deep_start == 0)
