"""Forecasts, corrections and masks, of both families."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
import torch

from forward_runs import DTYPES, after, assert_alike, drawn_step, relative, run, with_slots
from hemiola_export.conditioning import ForwardConfig
from hemiola_export.errors import ExportError
from hemiola_export.families import Family, open_transformer
from hemiola_export.forwards import FORWARDS, Deep, Full, Masked, Residual, Reuse
from hemiola_export.named_module import Tensors
from hemiola_export.step_forward import StepForward, computed
from hemiola_export.token_forward import Tokens
from hemiola_runtime.graphs import PRECISIONS, Precision
from hemiola_runtime.schedule import Forward, TokenSelector
from models import NUM_TOKENS, TEXT_TOKENS, tiny_dit, tiny_pixart

NUM_BLOCKS: Final = 4
FAMILIES: Final[dict[str, Family]] = {
    "dit": open_transformer(tiny_dit()),
    "pixart": open_transformer(tiny_pixart(), num_text_tokens=TEXT_TOKENS),
}
MASKS: Final = {"dit": (".x.x", "xx.."), "pixart": (".x.x", "x..x", "xx..")}
SELECTOR: Final = TokenSelector("value_norm", staleness_weight=0.25, spatial_bonus=0.4, spatial_size=2, seed=0)
PLAIN: Final = ForwardConfig(is_guided=True, state_rows=1, deep_start=2)  # sums of cross-attention, where there is any
WEIGHTS: Final = {1: (1.5, -0.5), 2: (3.0, -3.0, 1.0)}
CASES: Final = [
    (family, forward, config)
    for family, mask in MASKS.items()
    for config in (PLAIN, replace(PLAIN, selector=SELECTOR), replace(PLAIN, selector=SELECTOR, mask=mask))
    for forward in (Deep, Masked, Tokens, Reuse)
    if (forward is not Tokens or config.selector is not None) and (forward is not Masked or config.mask is not None)
]
of_each_case: Final = pytest.mark.parametrize(
    ("key", "forward", "config"),
    CASES,
    ids=[
        f"{family} {forward.__name__}{' by block' if config.selector else ''}{' masked' if config.mask else ''}"
        for family, forward, config in CASES
    ],
)


def caches_of(family: Family, config: ForwardConfig) -> list[str]:
    return [spec.name for spec in Full(family, config).writes if "_cache." in spec.name]


def after_full_steps(family: Family, config: ForwardConfig, order: int, num_chosen: int = 5) -> Tensors:
    """Make what a forecasting step reads: a sample of its own, the caches of full steps before, and the weights."""
    tensors: Tensors = {}
    for age in reversed(range(order + 1)):
        written = run(Full(family, config), drawn_step(family, config, seed=age))
        aged = {f"{name}.{age}" if age else name: written[f"next_{name}"] for name in caches_of(family, config)}
        others = {name.removeprefix("next_"): tensor for name, tensor in written.items() if "_cache." not in name}
        tensors |= aged | others
    tensors |= drawn_step(family, config, seed=10)
    if order:
        tensors["forecast"] = torch.tensor(WEIGHTS[order])
    return with_slots(tensors, num_chosen)


@pytest.mark.parametrize("order", [1, 2])
@of_each_case
def test_a_forecast_by_the_newest_cache_alone_is_that_cache(
    key: str, forward: type[StepForward], config: ForwardConfig, order: int
) -> None:
    family = FAMILIES[key]
    tensors = after_full_steps(family, config, order) | {"forecast": torch.tensor([1.0] + [0.0] * order)}
    found, expected = run(forward(family, config, order), tensors), run(forward(family, config), tensors)
    assert found.keys() == expected.keys()
    assert_alike(found, {name: tensor for name, tensor in expected.items() if tensor.any()})


@pytest.mark.parametrize("order", [1, 2])
@of_each_case
def test_caches_that_are_a_polynomial_of_the_step_are_forecast_exactly(
    key: str, forward: type[StepForward], config: ForwardConfig, order: int
) -> None:
    """At steps 2, 1 and 0 (the newest), continued to step -1: weights 2, -1 or 3, -3, 1."""
    family = FAMILIES[key]
    tensors = after_full_steps(family, config, order)
    terms = [{name: torch.randn_like(tensors[name]) for name in caches_of(family, config)} for _ in range(order + 1)]

    def at(step: int) -> Tensors:
        return {name: sum(term[name] * step**k for k, term in enumerate(terms)) for name in terms[0]}

    for age in range(order + 1):
        tensors |= {f"{name}.{age}" if age else name: tensor for name, tensor in at(age).items()}
    tensors["forecast"] = torch.tensor([2.0, -1.0] if order == 1 else [3.0, -3.0, 1.0])
    found = run(forward(family, config, order), tensors)["next_state"]
    expected = run(forward(family, config), tensors | at(-1))["next_state"]
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("num_chosen", [5, NUM_TOKENS])
@of_each_case
def test_what_was_computed_is_forecast_from_the_corrected_caches(
    key: str, forward: type[StepForward], config: ForwardConfig, order: int, num_chosen: int
) -> None:
    family = FAMILIES[key]
    tensors = after_full_steps(family, config, order, num_chosen)
    written = run(forward(family, config, order), tensors)
    again = run(Reuse(family, config, order), after(tensors, written))
    assert relative(again["next_state"], written["next_state"]) < 1e-4
    without = run(Reuse(family, config, order), tensors)
    assert forward is Reuse or relative(without["next_state"], written["next_state"]) > 1e-3  # it makes a difference


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("forward", [Deep, Masked, Tokens])
@pytest.mark.parametrize("key", MASKS)
def test_what_was_computed_is_forecast_from_the_corrected_residual(
    key: str, forward: type[StepForward], order: int
) -> None:
    family = FAMILIES[key]
    config = replace(PLAIN, selector=SELECTOR, mask=MASKS[key], keeps_residual=True)
    tensors = after_full_steps(family, config, order)
    written = run(forward(family, config, order), tensors)
    again = run(Residual(family, config, order), after(tensors, written))
    assert relative(again["next_state"], written["next_state"]) < 1e-4


@pytest.mark.parametrize("key", MASKS)
def test_of_order_1_a_correction_is_the_line_through_the_older_full_step_and_this_one(key: str) -> None:
    family = FAMILIES[key]
    mask = ("x...", *["...."] * (len(family.branches) - 1))  # attention of block 0, which reads no cache
    config = replace(PLAIN, mask=mask)
    tensors = after_full_steps(family, config, 1)
    fresh = run(Full(family, config), tensors)["next_attention_cache.0"]
    found = run(Masked(family, config, 1), tensors)["next_attention_cache.0"]
    # a line through the older at step 0 and this one at step 3, back at the newest, step 2: weights 1.5 and -0.5
    assert relative(found, tensors["attention_cache.0.1"] + (fresh - tensors["attention_cache.0.1"]) * 2 / 3) < 1e-5


@pytest.mark.parametrize("has_selector", [False, True])
@pytest.mark.parametrize("key", MASKS)
def test_masked_of_all_branches_is_full(key: str, has_selector: bool) -> None:
    family = FAMILIES[key]
    mask = ("xxxx",) * len(family.branches)
    config = replace(PLAIN, mask=mask, selector=SELECTOR if has_selector else None)
    tensors = drawn_step(family, config, seed=0)
    masked, full = run(Masked(family, config), tensors), run(Full(family, config), tensors)
    assert masked.keys() == full.keys() - {"next_scores", "next_staleness"}
    assert_alike(masked, {name: full[name] for name in masked})


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS))
@pytest.mark.parametrize("key", MASKS)
def test_masked_of_the_deep_blocks_is_deep(key: str, deep_start: int, order: int) -> None:
    family = FAMILIES[key]
    mask = (("." * deep_start).ljust(NUM_BLOCKS, "x"),) * len(family.branches)
    config = replace(PLAIN, deep_start=deep_start, mask=mask)
    tensors = after_full_steps(family, config, order)
    masked, deep = run(Masked(family, config, order), tensors), run(Deep(family, config, order), tensors)
    assert masked.keys() == deep.keys()
    assert_alike(masked, deep)


@pytest.mark.parametrize("key", MASKS)
def test_masked_computes_the_branches_of_the_mask_and_takes_the_others_from_the_cache(key: str) -> None:
    family = FAMILIES[key]
    config = replace(PLAIN, mask=MASKS[key])
    tensors = after_full_steps(family, config, 0)
    module = Masked(family, config)
    x = torch.cat([family.embed(tensors["state"][0], tensors)] * 2)
    expected = {}
    for i in range(NUM_BLOCKS):
        block = family.block(i)
        read = tensors | {name.rpartition(".")[0]: t for name, t in tensors.items() if name.endswith(f".{i}")}
        for branch, letters in zip(family.branches, MASKS[key], strict=True):
            out = tensors[f"{branch}_cache.{i}"]
            if letters[i] == "x":
                out = expected[f"next_{branch}_cache.{i}"] = computed(block, branch, x, read)
            x = x + block.gated(branch, out, read)
    found = run(module, tensors)
    assert found.keys() == expected.keys() | {"next_state"}
    assert_alike(found, {name: tensor.detach() for name, tensor in expected.items()})
    rows = family.head(x, tensors).chunk(2)
    cond, uncond = rows[family.conditional_row], rows[1 - family.conditional_row]
    guidance = tensors["guidance"][:, None, None]
    assert relative(found["next_state"][0], (uncond + guidance * (cond - uncond)).detach()) < 1e-5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (("xxxx",), r"the mask has 1 branches of 4 blocks, but the model has 2 \(attention, mlp\) of 4"),
        (("xxx", "..."), "the mask has 2 branches of 3 blocks"),
        (("xxxx",) * 3, "the mask has 3 branches of 4 blocks"),
    ],
)
@pytest.mark.parametrize("forward", Forward)
def test_a_mask_of_another_model_is_refused(forward: Forward, mask: tuple[str, ...], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        FORWARDS[forward](FAMILIES["dit"], replace(PLAIN, selector=SELECTOR, mask=mask))


# Relative L2 on 4 blocks: measured are 9e-4 in float16 and 7e-3 in bfloat16, the size of their last bits.
HALF_BOUND: Final = {"fp16": 3e-3, "bf16": 2e-2}


@pytest.mark.parametrize("precision", HALF_BOUND)
@of_each_case
def test_a_forecast_in_half_precision_is_that_of_float32_and_leaves_caches_in_half(
    key: str, forward: type[StepForward], config: ForwardConfig, precision: Precision
) -> None:
    family = FAMILIES[key]
    tensors = after_full_steps(family, config, 1)
    module = forward(family.lowered(DTYPES[PRECISIONS[precision]]), config, 1)
    found, expected = run(module, tensors), run(forward(family, config, 1), tensors)
    worst = {name: relative(found[name].float(), tensor) for name, tensor in expected.items() if tensor.any()}
    assert {name: error for name, error in worst.items() if not error < HALF_BOUND[precision]} == {}
    assert {spec.name: DTYPES[spec.dtype] for spec in module.outputs} == {name: t.dtype for name, t in found.items()}
