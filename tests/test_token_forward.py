"""Token counts of single blocks, of both families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import pytest
import torch
from torch import Tensor

from forward_runs import after, assert_alike, drawn_step, run, tokens_by_hand, with_slots
from hemiola_export.conditioning import ForwardConfig
from hemiola_export.families import Family, open_transformer
from hemiola_export.forwards import Deep, Full
from hemiola_export.named_module import Tensors
from hemiola_export.token_forward import Tokens
from hemiola_runtime.schedule import TokenSelector
from models import NUM_TOKENS, TEXT_TOKENS, tiny_dit, tiny_pixart

BATCH: Final = 2
FAMILIES: Final[dict[str, Family]] = {
    "dit": open_transformer(tiny_dit()),
    "pixart": open_transformer(tiny_pixart(), num_text_tokens=TEXT_TOKENS),
}
SELECTOR: Final = TokenSelector("value_norm", staleness_weight=0.25, spatial_bonus=0.0, spatial_size=1, seed=0)
ONE_COUNT: Final = ForwardConfig(is_guided=True, state_rows=1, deep_start=2, selector=SELECTOR)
OF_BLOCKS: Final = replace(ONE_COUNT, has_block_counts=True)
COUNTS: Final = {  # of the deep blocks, 2 and 3
    "dit": {"K.mlp.2": 5, "K.mlp.3": NUM_TOKENS},
    "pixart": {"K.cross.2": 1, "K.cross.3": 9, "K.mlp.2": NUM_TOKENS, "K.mlp.3": 4},
}


def equal_counts(key: str, count: int) -> dict[str, int]:
    return dict.fromkeys(COUNTS[key], count)


def run_tokens(key: str, config: ForwardConfig, counts: list[tuple[int, Mapping[str, int]]]) -> list[Tensors]:
    """Run `full` and then `tokens` with these counts, each on a sample of its own; returns what each has left."""
    family = FAMILIES[key]
    tensors = drawn_step(family, config, seed=0)
    left = [run(Full(family, config), tensors)]
    for seed, (count, of_blocks) in enumerate(counts, start=1):
        tensors = after(tensors, left[-1]) | drawn_step(family, config, seed=seed)
        left.append(run(Tokens(family, config), with_slots(tensors, count, of_blocks)))
    return left[1:]


@pytest.mark.parametrize("spatial_bonus", [0.0, 0.4])
@pytest.mark.parametrize("key", COUNTS)
def test_equal_counts_of_all_blocks_are_one_count(key: str, spatial_bonus: float) -> None:
    selector = replace(SELECTOR, spatial_bonus=spatial_bonus, spatial_size=2)
    counts = [5, 3, NUM_TOKENS, 4]
    one = run_tokens(key, replace(ONE_COUNT, selector=selector), [(n, {}) for n in counts])
    of_blocks = run_tokens(key, replace(OF_BLOCKS, selector=selector), [(n, equal_counts(key, n)) for n in counts])
    for first, second in zip(one, of_blocks, strict=True):
        num_branches = len(COUNTS[key]) // 2
        history = torch.cat([first.pop("next_staleness")] * num_branches)
        assert torch.equal(second.pop("next_staleness"), history)
        assert first.keys() == second.keys()
        assert_alike(second, first)


def ranks_of(tensors: Tensors, branch: int) -> Tensor:
    """Rank the tokens of the deep blocks (S, B, N) by score and the history of one branch."""
    return tensors["scores"] + 0.25 * tensors["staleness"][2 * branch : 2 * branch + 2]


@pytest.mark.parametrize("key", COUNTS)
def test_each_block_computes_the_first_of_its_own_ranking(key: str) -> None:
    family = FAMILIES[key]
    branches = family.branches[1:]
    first = drawn_step(family, OF_BLOCKS, seed=0)
    tensors = after(first, run(Full(family, OF_BLOCKS), first)) | drawn_step(family, OF_BLOCKS, seed=1)
    generator = torch.Generator().manual_seed(3)
    tensors["staleness"] = torch.randint(0, 9, tensors["staleness"].shape, generator=generator).float()
    chosen = {}
    for c, branch in enumerate(branches):
        counts = torch.tensor([COUNTS[key][f"K.{branch}.{block}"] for block in (2, 3)])[:, None, None]
        places = ranks_of(tensors, c).argsort(dim=-1, descending=True).argsort(dim=-1)  # 0 for the first
        chosen[branch] = places < counts  # (S, B, N)
    found = run(Tokens(family, OF_BLOCKS), with_slots(tensors, NUM_TOKENS, COUNTS[key]))
    assert_alike(found, tokens_by_hand(family, OF_BLOCKS, tensors, chosen))
    history = torch.cat(list(chosen.values()))  # (C·S, B, N)
    assert torch.equal(found["next_staleness"], torch.where(history, torch.zeros(()), tensors["staleness"] + 1))


@pytest.mark.parametrize("key", COUNTS)
def test_each_cache_changes_in_as_many_rows_as_its_block_counts(key: str) -> None:
    family = FAMILIES[key]
    first = drawn_step(family, OF_BLOCKS, seed=0)
    tensors = after(first, run(Full(family, OF_BLOCKS), first)) | drawn_step(family, OF_BLOCKS, seed=1)
    found = run(Tokens(family, OF_BLOCKS), with_slots(tensors, NUM_TOKENS, COUNTS[key]))
    for symbol, count in COUNTS[key].items():
        _, branch, block = symbol.split(".")
        name = f"{branch}_cache.{block}"
        num_changed = (found[f"next_{name}"] != tensors[name]).any(dim=-1).sum(dim=-1)  # (R,)
        assert num_changed.tolist() == [count] * 2 * BATCH


@pytest.mark.parametrize("key", COUNTS)
def test_other_counts_choose_from_the_same_ranking(key: str) -> None:
    """A block that computes fewer tokens computes some of those that it would of more."""
    chosen = {
        count: run_tokens(key, OF_BLOCKS, [(NUM_TOKENS, equal_counts(key, count))])[0]["next_staleness"] == 0
        for count in (2, 5, 11)
    }
    assert [int(of_count[0, 0].sum()) for of_count in chosen.values()] == [2, 5, 11]
    assert (chosen[2] <= chosen[5]).all()
    assert (chosen[5] <= chosen[11]).all()


@pytest.mark.parametrize("forward", [Full, Deep])
def test_the_histories_of_all_branches_begin_anew_where_blocks_are_computed(forward: type[Full | Deep]) -> None:
    family = FAMILIES["pixart"]
    first = drawn_step(family, OF_BLOCKS, seed=0)
    tensors = after(first, run(Full(family, OF_BLOCKS), first))
    tensors["staleness"] = torch.ones_like(tensors["staleness"])
    written = run(forward(family, OF_BLOCKS), tensors)["next_staleness"]
    assert written.shape == (2 * 2, BATCH, NUM_TOKENS)  # cross-attention and MLP of two blocks
    assert not written.any()
