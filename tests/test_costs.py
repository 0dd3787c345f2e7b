from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.schedule import DEEP, FULL, MASKED, RESIDUAL, REUSE, Forward, Step, tokens
from hemiola_search.costs import FlopsModel
from hemiola_search.published import RHYTHMS
from hemiola_search.rhythms import steps_from_segments, with_selective_steps
from hemiola_search.strategies import toca, uniform
from labs import DIT_XL_2, paper_problem
from strategies import examples

# D = 2, N = 4, L = 3, one row an image.
#   attention 8·4·2² + 4·4²·2 = 128 + 128 = 256; MLP 16·4·2² = 256; adaLN of all blocks 3·12·2² = 144
SMALL = FlopsModel(width=2, num_tokens=4, num_blocks=3, rows_per_image=1)
SMALL_MASK = (".x.", "xx.")  # one attention, two MLPs


@pytest.mark.parametrize(
    ("step", "flops"),
    [
        (FULL, 3 * (256 + 256) + 144),
        (DEEP, (256 + 256) + 144),
        (tokens(3), 16 * 3 * 4 + 144),  # the MLP of 3 tokens in 1 block
        (tokens(1), 16 * 1 * 4 + 144),
        (tokens(((3,),)), 16 * 3 * 4 + 144),
        (MASKED, 256 + 2 * 256 + 144),
        (REUSE, 144),
        (RESIDUAL, 144),
        (Step(Forward.REUSE, None, (2.0, -1.0)), 144),  # forecasts count nothing
        (Step(Forward.DEEP, None, (2.0, -1.0)), (256 + 256) + 144),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_costs_what_its_formula_says(step: Step, flops: int, rows: int) -> None:
    model = FlopsModel(width=2, num_tokens=4, num_blocks=3, rows_per_image=rows)
    assert model.step(step, 2, SMALL_MASK) == pytest.approx(rows * flops / 1e9, rel=1e-12)


# The same with cross-attention to S = 5 tokens, and modulation that all images share.
#   of one token: MLP 16·2² = 64, queries and output 4·2² = 16, scores and mixing 4·5·2 = 40
@pytest.mark.parametrize(
    ("step", "flops"),
    [
        (FULL, 3 * (256 + 4 * (64 + 16 + 40))),
        (DEEP, 256 + 4 * (64 + 16 + 40)),
        (tokens(3), 3 * (64 + 16 + 40)),
        (tokens(((3,), (2,))), 3 * (16 + 40) + 2 * 64),
        (MASKED, 256 + 2 * 4 * (16 + 40) + 3 * 4 * 64),
        (REUSE, 0),
        (RESIDUAL, 0),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_with_cross_attention_costs_what_its_formula_says(step: Step, flops: int, rows: int) -> None:
    model = FlopsModel(2, num_tokens=4, num_blocks=3, rows_per_image=rows, num_text_tokens=5)
    assert model.step(step, 2, ("..x", "xx.", "xxx")) == pytest.approx(rows * flops / 1e9, rel=1e-12)


def test_blocks_with_counts_of_their_own_cost_what_each_recomputes() -> None:
    # 3 + 1 + 4 tokens in three blocks, 16·2² each
    assert SMALL.step(tokens(((3, 1, 4),)), 0, None) == pytest.approx((8 * 64 + 144) / 1e9, rel=1e-12)


def test_one_forward_of_dit_xl_2_takes_237_gflop_a_row() -> None:
    # METHODS.md §14.1. 24·256·1152² + 4·256²·1152 + 12·1152² = 8.4716 G for a block; times 28
    assert DIT_XL_2.step(FULL, None, None) / 2 == pytest.approx(237.21, abs=0.005)


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
    assert DIT_XL_2.schedule(steps) / 1e3 == pytest.approx(tera_flops, abs=10 ** -(2 if num_full == 50 else 3) / 2)


def test_fora_costs_what_its_paper_says() -> None:
    # its code counts steps down and so begins with a step more: 49, 48, 45, … 3, 0 are 18 full ones; in the order of
    # sampling every third step is 17. METHODS.md §11, §14.1
    down = [FULL if i == 0 or (49 - i) % 3 == 0 else REUSE for i in range(50)]
    assert DIT_XL_2.schedule(down) / 1e3 == pytest.approx(8.568, abs=0.0005)
    assert DIT_XL_2.schedule(uniform.uniform_steps(50, 3)) / 1e3 == pytest.approx(8.094, abs=0.0005)


def test_procaches_released_schedule_costs_what_its_paper_says() -> None:
    plain = steps_from_segments(RHYTHMS[50, 17])
    assert DIT_XL_2.schedule(plain) / 1e3 == pytest.approx(8.094, abs=0.0005)
    # selective steps recompute the MLP of ToCa's K tokens in blocks 21 to 27
    marked = with_selective_steps(plain, tokens(1))
    counts = [toca.token_counts(i, 50, 28, 256, toca.DDIM_50)[0][21:] for i in range(50)]
    steps = [
        tokens((counts[i],)) if step.forward is Forward.TOKENS and min(counts[i]) else plain[i]
        for i, step in enumerate(marked)
    ]
    assert DIT_XL_2.schedule(steps, 21) / 1e3 == pytest.approx(8.211, abs=0.0005)  # the paper says 8.18


def test_a_schedule_costs_the_sum_of_its_steps() -> None:
    # 1680 + 144 + 336 + 656 by the table above
    steps = [FULL, REUSE, tokens(3), DEEP]
    assert SMALL.schedule(steps, 2) == pytest.approx((1680 + 144 + 336 + 656) / 1e9)
    assert SMALL.schedule([]) == 0


def test_without_deep_blocks_nothing_is_recomputed_in_them() -> None:
    assert SMALL.step(DEEP, None, None) == SMALL.step(tokens(4), None, None) == SMALL.step(REUSE, None, None)
    assert SMALL.step(DEEP, 3, None) == SMALL.step(REUSE, 3, None)


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
    model = FlopsModel(16 * heads, num_tokens, num_blocks, 2, num_text_tokens)
    count = data.draw(st.integers(2, num_tokens))
    costs = [model.step(step, deep_start, None) for step in (REUSE, tokens(count - 1), tokens(count), DEEP, FULL)]
    assert costs == sorted(costs)
    assert len(set(costs[:4])) == 4
    assert (costs[3] == costs[4]) == (deep_start == 0)


@given(num_blocks=st.integers(1, 6), has_text=st.booleans(), data=st.data())
@examples(50)
def test_a_mask_costs_the_sum_of_its_layers(num_blocks: int, has_text: bool, data: st.DataObject) -> None:
    model = FlopsModel(32, 16, num_blocks, 2, 8 if has_text else None)
    num_branches = 3 if has_text else 2
    everything = ("x" * num_blocks,) * num_branches
    assert model.step(MASKED, None, everything) == pytest.approx(model.step(FULL, None, None))
    row = st.text("x.", min_size=num_blocks, max_size=num_blocks)
    mask = data.draw(st.tuples(*[row] * num_branches))
    others = tuple(blocks.translate({ord("x"): ".", ord("."): "x"}) for blocks in mask)
    parts = [model.step(MASKED, None, part) - model.step(REUSE, None, None) for part in (mask, others)]
    assert sum(parts) == pytest.approx(model.step(FULL, None, None) - model.step(REUSE, None, None))


@pytest.mark.parametrize(
    ("num_blocks", "deep_ratio", "deep_start"), [(28, 0.25, 21), (12, 0.25, 9), (4, 1.0, 0), (4, 0.0, 4)]
)
def test_a_share_of_the_blocks_is_deep(num_blocks: int, deep_ratio: float, deep_start: int) -> None:
    flops = FlopsModel(32, 16, num_blocks, 2)
    assert paper_problem(4, flops=flops, deep_ratio=deep_ratio).deep_start == deep_start
