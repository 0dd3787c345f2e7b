from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from forward_runs import (
    DTYPES,
    RELATIVE,
    after,
    assert_alike,
    guided,
    latents,
    read_of_block,
    relative,
    run,
    tokens_by_hand,
    with_slots,
)
from hemiola_export.components import VaeDecoder
from hemiola_export.conditioning import Conditioning, ForwardConfig
from hemiola_export.errors import ExportError
from hemiola_export.families import Family, open_transformer
from hemiola_export.families.dit import DiT
from hemiola_export.forwards import FORWARDS, Deep, Front, Full, Reuse
from hemiola_export.named_module import NamedModule, Tensors
from hemiola_export.step_forward import StepForward
from hemiola_export.text_encoder import TextEncoder
from hemiola_export.token_forward import Tokens
from hemiola_runtime.graphs import (
    CONDITIONING,
    FRONT,
    PRECISIONS,
    TEXT_ENCODER,
    VAE_DECODER,
    Precision,
    TensorSpec,
)
from hemiola_runtime.pipeline import Pipeline, TextSpec
from hemiola_runtime.schedule import KINDS, Forward, ModelIdentity, TokenSelector
from models import NUM_CLASSES, NUM_TOKENS, TEXT_TOKENS, tiny_dit, tiny_pixart, tiny_t5, tiny_vae
from strategies import graph_specs

BATCH: Final = 2
NUM_BLOCKS: Final = 4
TIMESTEPS: Final = (700.0, 650.0, 40.0)
LABELS: Final = (3, 7)
SELECTOR: Final = TokenSelector("value_norm", staleness_weight=0.25, spatial_bonus=0.4, spatial_size=2, seed=0)
SCORES: Final = ["attention", "value_norm", "output_norm", "random"]
FAMILY: Final = open_transformer(tiny_dit())
PIXART_TRANSFORMER: Final = tiny_pixart(reads_size=True)
PIXART: Final = open_transformer(PIXART_TRANSFORMER, num_text_tokens=TEXT_TOKENS)
VAE: Final = tiny_vae()
T5: Final = tiny_t5()
GUIDED: Final = ForwardConfig(is_guided=True, state_rows=1, deep_start=2, selector=SELECTOR)


def step_tables(family: Family, config: ForwardConfig) -> list[Tensors]:
    """Compute what conditioning leaves for each of TIMESTEPS, (R, 1, D) each."""
    given = {"labels": torch.tensor(LABELS), "timesteps": torch.tensor(TIMESTEPS)}
    tables = Conditioning(family, config)(given)
    return [
        {name: table.unflatten(0, (len(TIMESTEPS), -1))[i][:, None] for name, table in tables.items()}
        for i in range(len(TIMESTEPS))
    ]


def given_tensors(family: Family, config: ForwardConfig, *, step: int = 0, seed: int = 0) -> Tensors:
    """Make all that a first step reads. The solver is set to give the model output itself as the next sample."""
    generator = torch.Generator().manual_seed(seed)
    rows = config.state_rows
    coefficients = torch.zeros(rows, rows + 1)
    coefficients[0, -1] = 1
    return {
        "state": torch.randn((rows, BATCH, family.num_tokens, family.patch_width), generator=generator),
        "coefficients": coefficients,
        "input_scale": torch.tensor(1.0),
        "guidance": torch.tensor([1.5, 4.0]),
    } | step_tables(family, config)[step]


def stale_tensors(family: Family, config: ForwardConfig) -> Tensors:
    """Make what a later step reads: another sample at another timestep, and the caches that `full` left at step 0."""
    first = given_tensors(family, config, step=0, seed=0)
    later = given_tensors(family, config, step=2, seed=1)
    return after(first, run(Full(family, config), first)) | later


# what `full` is against diffusers

MODELS: Final[dict[str, dict[str, Any]]] = {
    "learned sigma": {},
    "no learned sigma": {"has_learned_sigma": False},
    "pixels": {"channels": 1, "has_learned_sigma": False},
    "one patch a pixel": {"patch_size": 1, "sample_size": 4},
    "large patches": {"patch_size": 4},
    "exact gelu": {"activation_fn": "gelu"},
    "no attention bias": {"has_attention_bias": False},
    "one wide head": {"num_heads": 1, "head_width": 16, "num_blocks": 1},
}


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_full_is_the_model_of_diffusers(options: dict[str, Any], is_guided: bool) -> None:
    transformer = tiny_dit(**options)
    family = open_transformer(transformer)
    tensors = given_tensors(family, ForwardConfig(is_guided, state_rows=1), step=1)
    found = latents(family, run(Full(family, ForwardConfig(is_guided, state_rows=1)), tensors)["next_state"][0])
    # as diffusers' DiTPipeline: conditional rows first, the null class behind the last, variances thrown away
    sample, labels = latents(family, tensors["state"][0]), torch.tensor(LABELS)
    if is_guided:
        sample, labels = torch.cat([sample, sample]), torch.cat([labels, torch.full_like(labels, NUM_CLASSES)])
    timesteps = torch.full((len(sample),), TIMESTEPS[1])
    with torch.inference_mode():
        output = transformer(sample, timestep=timesteps, class_labels=labels).sample[:, : family.latent_shape[0]]
    if is_guided:
        cond, uncond = output.chunk(2)
        output = uncond + tensors["guidance"].reshape(-1, 1, 1, 1) * (cond - uncond)
    assert relative(found, output) < RELATIVE


def test_the_caches_are_what_diffusers_modules_give_before_their_gates() -> None:
    transformer = tiny_dit()
    seen: Tensors = {}
    for i, block in enumerate(transformer.transformer_blocks):
        for branch, module in (("attention", block.attn1), ("mlp", block.ff)):
            name = f"next_{branch}_cache.{i}"
            module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out}))
    config = ForwardConfig(is_guided=False, state_rows=1)
    tensors = given_tensors(FAMILY, config)
    with torch.inference_mode():
        timesteps = torch.full((BATCH,), TIMESTEPS[0])
        transformer(latents(FAMILY, tensors["state"][0]), timestep=timesteps, class_labels=torch.tensor(LABELS))
    written = run(Full(FAMILY, config), tensors)
    assert set(seen) == set(written) - {"next_state"}
    assert_alike(written, seen)


def test_guidance_of_1_is_the_conditional_model() -> None:
    tensors = given_tensors(FAMILY, GUIDED) | {"guidance": torch.ones(BATCH)}
    unguided = replace(GUIDED, is_guided=False)
    expected = run(Full(FAMILY, unguided), given_tensors(FAMILY, unguided))["next_state"]
    assert relative(run(Full(FAMILY, GUIDED), tensors)["next_state"], expected) < RELATIVE


@pytest.mark.parametrize("forward", [Full, Deep, Tokens, Reuse])
def test_the_solver_update_is_the_matrix_times_state_and_model_output(forward: type[StepForward]) -> None:
    config = replace(GUIDED, state_rows=3)
    tensors = with_slots(stale_tensors(FAMILY, config), 5)
    output = run(forward(FAMILY, config), tensors)["next_state"][0]  # `given_tensors` asks for the output itself
    matrix = torch.randn((3, 4), generator=torch.Generator().manual_seed(2))
    expected = torch.einsum("ij,jbnp->ibnp", matrix, torch.cat([tensors["state"], output[None]]))
    found = run(forward(FAMILY, config), tensors | {"coefficients": matrix})["next_state"]
    assert relative(found, expected) < RELATIVE


@pytest.mark.parametrize("forward", [Full, Deep, Tokens, Reuse])
def test_the_sample_is_scaled_before_it_enters_the_model(forward: type[StepForward]) -> None:
    tensors = with_slots(stale_tensors(FAMILY, GUIDED), 5)
    module = forward(FAMILY, GUIDED)
    scaled = run(module, tensors | {"input_scale": torch.tensor(0.25)})["next_state"]
    assert relative(scaled, run(module, tensors | {"state": 0.25 * tensors["state"]})["next_state"]) < RELATIVE
    assert relative(scaled, run(module, tensors)["next_state"]) > 1e-3


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
def test_conditioning_for_all_steps_is_that_of_each_step(is_guided: bool) -> None:
    config = ForwardConfig(is_guided, state_rows=1)
    labels = torch.tensor(LABELS)
    for i, alone in enumerate(TIMESTEPS):
        tables = Conditioning(FAMILY, config)({"labels": labels, "timesteps": torch.tensor([alone])})
        assert_alike({name: table[:, 0] for name, table in step_tables(FAMILY, config)[i].items()}, tables)


def test_conditioning_differs_between_steps_and_labels() -> None:
    tables = step_tables(FAMILY, ForwardConfig(is_guided=False, state_rows=1))
    assert relative(tables[0]["mlp_gate.0"], tables[2]["mlp_gate.0"]) > 1e-2
    assert relative(tables[0]["mlp_gate.0"][0], tables[0]["mlp_gate.0"][1]) > 1e-2


# what the forwards are against each other


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
def test_reuse_right_after_full_at_the_same_step_is_full(is_guided: bool) -> None:
    config = ForwardConfig(is_guided, state_rows=1)
    tensors = given_tensors(FAMILY, config)
    full = run(Full(FAMILY, config), tensors)
    reuse = run(Reuse(FAMILY, config), after(tensors, full))
    assert relative(reuse["next_state"], full["next_state"]) < RELATIVE


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
def test_deep_from_block_0_is_full(is_guided: bool) -> None:
    config = ForwardConfig(is_guided, state_rows=1, deep_start=0, selector=SELECTOR)
    tensors = given_tensors(FAMILY, config)
    full, deep = run(Full(FAMILY, config), tensors), run(Deep(FAMILY, config), tensors)
    assert full.keys() == deep.keys()
    assert all(torch.equal(full[name], deep[name]) for name in full)


@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS + 1))
def test_deep_right_after_full_at_the_same_step_is_full(deep_start: int) -> None:
    config = replace(GUIDED, deep_start=deep_start, selector=None)
    tensors = given_tensors(FAMILY, config)
    full = run(Full(FAMILY, config), tensors)
    deep = run(Deep(FAMILY, config), after(tensors, full))
    assert_alike(deep, {name: full[name] for name in deep})


@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS + 1))
def test_deep_takes_shallow_blocks_from_the_cache_and_computes_the_others(deep_start: int) -> None:
    config = replace(GUIDED, deep_start=deep_start, selector=None)
    tensors = stale_tensors(FAMILY, config)
    x = FAMILY.embed(tensors["state"][0], tensors)
    x = torch.cat([x, x])
    for i in range(NUM_BLOCKS):
        block, vectors = FAMILY.block(i), read_of_block(i, tensors)
        is_deep = i >= deep_start
        out = block.attend(*block.queries_keys_values(x, vectors)) if is_deep else tensors[f"attention_cache.{i}"]
        x = x + vectors["attention_gate"] * out
        x = x + vectors["mlp_gate"] * (block.branch("mlp", x, vectors) if is_deep else tensors[f"mlp_cache.{i}"])
    expected = guided(FAMILY, config, FAMILY.head(x, tensors), tensors["guidance"])
    assert relative(run(Deep(FAMILY, config), tensors)["next_state"][0], expected) < RELATIVE


def test_deep_from_behind_the_last_block_is_reuse() -> None:
    config = replace(GUIDED, deep_start=NUM_BLOCKS, selector=None)
    tensors = stale_tensors(FAMILY, config)
    deep, reuse = run(Deep(FAMILY, config), tensors), run(Reuse(FAMILY, config), tensors)
    assert deep.keys() == reuse.keys() == {"next_state"}
    assert torch.equal(deep["next_state"], reuse["next_state"])


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS + 1))
def test_front_followed_by_deep_is_full(deep_start: int, is_guided: bool) -> None:
    config = replace(GUIDED, is_guided=is_guided, deep_start=deep_start)
    tensors = stale_tensors(FAMILY, config)  # the caches of another step must not show
    full = run(Full(FAMILY, config), tensors)
    front = run(Front(FAMILY, config), tensors)
    deep = run(Deep(FAMILY, config), after(tensors, front))
    assert front.keys() | deep.keys() == full.keys()
    assert not front.keys() & deep.keys()
    assert_alike(front | deep, {name: tensor for name, tensor in full.items() if tensor.any()})


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS))
def test_tokens_of_all_tokens_computes_the_deep_mlps_anew_on_cached_attention(deep_start: int, is_guided: bool) -> None:
    config = replace(GUIDED, is_guided=is_guided, deep_start=deep_start)
    tensors = stale_tensors(FAMILY, config)
    found = run(Tokens(FAMILY, config), with_slots(tensors, NUM_TOKENS))
    expected = tokens_by_hand(FAMILY, config, tensors, None)
    assert_alike(found, expected)
    assert found.keys() == expected.keys() | {"next_staleness"}
    assert not found["next_staleness"].any()


@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS))
@pytest.mark.parametrize("count", [1, 5, NUM_TOKENS - 1])
def test_tokens_computes_the_chosen_tokens_and_keeps_the_others(deep_start: int, count: int) -> None:
    config = replace(GUIDED, deep_start=deep_start, selector=replace(SELECTOR, spatial_bonus=0.0))
    tensors = stale_tensors(FAMILY, config)
    generator = torch.Generator().manual_seed(3)
    tensors["staleness"] = torch.randint(0, 9, tensors["staleness"].shape, generator=generator).float()
    found = run(Tokens(FAMILY, config), with_slots(tensors, count))
    ranks = tensors["scores"] + 0.25 * tensors["staleness"]
    least = ranks.sort(dim=-1, descending=True).values[..., count - 1 : count]
    chosen = ranks >= least
    assert (chosen.sum(dim=-1) == count).all()  # no ties
    assert_alike(found, tokens_by_hand(FAMILY, config, tensors, chosen))
    expected = torch.where(chosen, torch.zeros(()), tensors["staleness"] + 1)
    assert torch.equal(found["next_staleness"], expected)


@pytest.mark.parametrize("deep_start", range(NUM_BLOCKS))
def test_tokens_of_no_token_is_reuse(deep_start: int) -> None:
    config = replace(GUIDED, deep_start=deep_start)
    tensors = stale_tensors(FAMILY, config)
    none = run(Tokens(FAMILY, config), with_slots(tensors, 0))
    assert torch.equal(none["next_state"], run(Reuse(FAMILY, config), tensors)["next_state"])
    assert all(torch.equal(none[f"next_mlp_cache.{i}"], tensors[f"mlp_cache.{i}"]) for i in range(deep_start, 4))
    assert torch.equal(none["next_staleness"], tensors["staleness"] + 1)


@pytest.mark.parametrize("score", SCORES)
def test_both_halves_of_a_guided_pair_choose_the_same_tokens(score: Any) -> None:
    config = replace(GUIDED, selector=replace(SELECTOR, score=score))
    tensors = stale_tensors(FAMILY, config)
    found = run(Tokens(FAMILY, config), with_slots(tensors, 5))
    for i in (2, 3):
        changed = (found[f"next_mlp_cache.{i}"] != tensors[f"mlp_cache.{i}"]).any(dim=-1)  # (R, N)
        assert changed.sum(dim=-1).tolist() == [5] * 2 * BATCH
        assert torch.equal(changed[:BATCH], changed[BATCH:])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("forward", [Full, Deep])
def test_scores_are_taken_where_attention_is_computed_and_staleness_begins_anew(
    forward: type[StepForward], score: Any
) -> None:
    config = replace(GUIDED, selector=replace(SELECTOR, score=score))
    tensors = stale_tensors(FAMILY, config) | {"staleness": torch.full((2, BATCH, NUM_TOKENS), 3.0)}
    written = run(forward(FAMILY, config), tensors)
    assert written["next_scores"].shape == (2, BATCH, NUM_TOKENS)
    assert (written["next_scores"] >= 0).all()
    assert not written["next_staleness"].any()


@pytest.mark.parametrize("score", ["attention", "value_norm", "output_norm"])
def test_taking_scores_does_not_change_what_full_computes(score: Any) -> None:
    scored = replace(GUIDED, deep_start=0, selector=replace(SELECTOR, score=score))
    tensors = given_tensors(FAMILY, scored)
    expected = run(Full(FAMILY, replace(scored, selector=None)), tensors)
    assert_alike(run(Full(FAMILY, scored), tensors), expected)


def test_squares_that_do_not_tile_the_token_grid_are_refused() -> None:
    with pytest.raises(ExportError, match="spatial_size 3 does not divide the token grid 4×4"):
        Full(FAMILY, replace(GUIDED, selector=replace(SELECTOR, spatial_size=3)))


# lower precision

LOWERED: Final = {precision: FAMILY.lowered(DTYPES[PRECISIONS[precision]]) for precision in ("fp16", "bf16")}
# Relative L2 on 4 blocks: measured are 1e-3 in float16 and 7e-3 in bfloat16, the size of their last bits.
HALF_BOUND: Final = {"fp16": 3e-3, "bf16": 2e-2}


@pytest.mark.parametrize("forward", [Full, Front, Deep, Tokens, Reuse])
@pytest.mark.parametrize("precision", HALF_BOUND)
def test_a_forward_in_half_precision_computes_what_it_does_in_float32(
    precision: Precision, forward: type[StepForward]
) -> None:
    family = LOWERED[precision]
    tensors = with_slots(stale_tensors(FAMILY, GUIDED), 5)
    expected = run(forward(FAMILY, GUIDED), tensors)
    found = run(forward(family, GUIDED), tensors)
    assert found.keys() == expected.keys()
    worst = {name: relative(found[name].float(), tensor) for name, tensor in expected.items() if tensor.any()}
    assert {name: error for name, error in worst.items() if not error < HALF_BOUND[precision]} == {}
    assert max(worst.values()) > 1e-5  # it is not float32 in disguise


@pytest.mark.parametrize("precision", HALF_BOUND)
def test_conditioning_in_half_precision_gives_float32_tables(precision: Precision) -> None:
    given = {"labels": torch.tensor(LABELS), "timesteps": torch.tensor(TIMESTEPS)}
    expected = run(Conditioning(FAMILY, GUIDED), given)
    found = run(Conditioning(LOWERED[precision], GUIDED), given)
    assert {table.dtype for table in found.values()} == {torch.float32}
    worst = max(relative(found[name], table) for name, table in expected.items())
    assert 1e-5 < worst < HALF_BOUND[precision]


@pytest.mark.parametrize("precision", HALF_BOUND)
def test_caches_have_the_compute_dtype_and_all_else_is_float32(precision: Precision) -> None:
    family = LOWERED[precision]
    for forward in (Full, Front, Deep, Tokens, Reuse):
        module = forward(family, GUIDED)
        dtypes = {spec.name: spec.dtype for spec in (*module.inputs, *module.outputs) if spec.dtype != "int64"}
        halves = {name for name, dtype in dtypes.items() if dtype != "float32"}
        assert halves == {name for name in dtypes if "_cache." in name}
        assert {dtypes[name] for name in halves} == {PRECISIONS[precision]}


@pytest.mark.parametrize("precision", HALF_BOUND)
def test_lowering_leaves_the_family_that_was_lowered_as_it_was(precision: Precision) -> None:
    family = LOWERED[precision]
    assert (FAMILY.compute_dtype, family.compute_dtype) == (torch.float32, DTYPES[PRECISIONS[precision]])
    assert {weight.dtype for weight in FAMILY.parameters()} == {torch.float32}
    assert {weight.dtype for weight in family.blocks.parameters()} == {family.compute_dtype}


# what the blocks share


def _with_embedders_of(blocks: dict[int, int]) -> Any:
    """Make a model some of whose blocks have the embedder of another."""
    transformer = tiny_dit()
    for block, source in blocks.items():
        embedder = transformer.transformer_blocks[block].norm1.emb
        embedder.load_state_dict(transformer.transformer_blocks[source].norm1.emb.state_dict())
    return transformer


@pytest.mark.parametrize(
    ("copies", "num_kept", "embedder_of"),
    [
        ({}, 4, [0, 1, 2, 3]),
        ({1: 0, 2: 0, 3: 0}, 1, [0, 0, 0, 0]),  # as converted checkpoints have it
        ({3: 1}, 3, [0, 1, 2, 1]),
    ],
)
def test_equal_embedders_are_kept_once_and_others_apart(
    copies: dict[int, int], num_kept: int, embedder_of: list[int]
) -> None:
    transformer = _with_embedders_of(copies)
    family = open_transformer(transformer)
    assert isinstance(family, DiT)
    assert (len(family.embedders), family.embedder_of) == (num_kept, embedder_of)
    # diffusers runs the embedder of every block
    config = ForwardConfig(is_guided=False, state_rows=1)
    tensors = given_tensors(family, config)
    sample = latents(family, tensors["state"][0])
    with torch.inference_mode():
        timesteps = torch.full((BATCH,), TIMESTEPS[0])
        output = transformer(sample, timestep=timesteps, class_labels=torch.tensor(LABELS)).sample
    found = latents(family, run(Full(family, config), tensors)["next_state"][0])
    assert relative(found, output[:, : family.latent_shape[0]]) < RELATIVE


@pytest.mark.parametrize("part", ["timestep_embedder.linear_1.bias", "class_embedder.embedding_table.weight"])
def test_embedders_that_differ_in_one_number_are_kept_apart(part: str) -> None:
    transformer = _with_embedders_of({1: 0, 2: 0, 3: 0})
    with torch.no_grad():
        transformer.transformer_blocks[2].norm1.emb.get_parameter(part).view(-1)[-1] += 1e-3
    family = open_transformer(transformer)
    assert isinstance(family, DiT)
    assert family.embedder_of == [0, 0, 1, 0]


# what the forwards declare

DECLARING: Final[dict[str, Family]] = {"dit": FAMILY, "pixart": PIXART}
FAMILIES: Final[dict[tuple[str, Precision], Family]] = {
    ("dit", "fp32"): FAMILY,
    ("dit", "fp16"): LOWERED["fp16"],
    ("dit", "bf16"): LOWERED["bf16"],
    ("pixart", "fp32"): PIXART,
    ("pixart", "fp16"): PIXART.lowered(torch.float16),
    ("pixart", "bf16"): PIXART.lowered(torch.bfloat16),
}
BY_ENTROPY: Final = replace(GUIDED, selector=replace(SELECTOR, score="cross_attention_entropy"))
CONFIGS: Final = {
    "plain": ForwardConfig(is_guided=False, state_rows=1),
    "guided": ForwardConfig(is_guided=True, state_rows=2),
    "deep from 0": ForwardConfig(is_guided=True, state_rows=1, deep_start=0),
    "deep from 4": ForwardConfig(is_guided=False, state_rows=1, deep_start=4),
    "tokens from 0": ForwardConfig(is_guided=False, state_rows=1, deep_start=0, selector=SELECTOR),
    "tokens from 3": ForwardConfig(is_guided=True, state_rows=3, deep_start=3, selector=SELECTOR),
    "by attention": replace(GUIDED, selector=replace(SELECTOR, score="attention")),
    "at random": replace(GUIDED, selector=replace(SELECTOR, score="random")),
    "no squares": replace(GUIDED, selector=replace(SELECTOR, spatial_bonus=0.0)),
    "residual": replace(GUIDED, keeps_residual=True),
    "residual alone": ForwardConfig(is_guided=True, state_rows=1, keeps_layers=False, keeps_residual=True),
}
TEXT_CONFIGS: Final = {
    "by entropy": BY_ENTROPY,
    "any size": replace(BY_ENTROPY, num_tokens="N"),
    "any size, deep": replace(GUIDED, deep_start=3, selector=None, num_tokens="N"),
}


def exported_of(config: ForwardConfig) -> list[Forward]:
    """Return the forwards that are exported together with a configuration."""
    has = {
        Forward.DEEP: config.deep_start is not None,
        Forward.MASKED: config.mask is not None,
        Forward.TOKENS: config.selector is not None,
        Forward.REUSE: config.keeps_layers,
        Forward.RESIDUAL: config.keeps_residual,
    }
    return [forward for forward in Forward if has.get(forward, True)]


MASKS: Final = {"dit": (".x.x", "x..x"), "pixart": (".x.x", "xx..", "x..x")}
CASES: Final = [
    *(("dit", name, config) for name, config in CONFIGS.items()),
    *(("pixart", name, config) for name, config in (CONFIGS | TEXT_CONFIGS).items()),
    *(
        (family, f"{name}, masked", replace(CONFIGS[name], mask=mask))
        for family, mask in MASKS.items()
        for name in ("plain", "deep from 0", "tokens from 3", "residual")
    ),
    *(
        (family, f"{name}, counts of blocks", replace(CONFIGS[name], has_block_counts=True))
        for family in MASKS
        for name in ("tokens from 0", "no squares")
    ),
]
FORWARDS_OF_CASES: Final = [
    (family, name, config, forward, order)
    for family, name, config in CASES
    for forward in (*(FORWARDS[forward] for forward in exported_of(config)), *((Front,) if config.deep_start else ()))
    for order in ((0,) if forward in (Full, Front) else (0, 2))
]


SIZES: Final = {"B": BATCH, "K": 3, "T": len(TIMESTEPS), "N": NUM_TOKENS}


def symbols_of(config: ForwardConfig) -> dict[str, int]:
    rows = BATCH * config.rows_per_image
    of_blocks = {f"K.{branch}.{i}": 2 for branch in ("cross", "mlp") for i in range(NUM_BLOCKS)}
    return SIZES | of_blocks | {"R": rows, "TR": len(TIMESTEPS) * rows}


def drawn_inputs(module: NamedModule, symbols: dict[str, int]) -> Tensors:
    """Draw what a module declares that it reads: numbers that it can be differentiated by, and indices in order."""
    generator = torch.Generator().manual_seed(0)

    def drawn(spec: TensorSpec) -> Tensor:
        shape = spec.resolve(symbols)
        if spec.dtype == "int64":
            return torch.arange(shape[-1]).expand(shape).clone()
        values = torch.randn(shape, generator=generator).to(DTYPES[spec.dtype])
        return values.requires_grad_()

    return {spec.name: drawn(spec) for spec in module.inputs}


def read_of(given: Tensors, written: Tensors) -> set[str]:
    """Name the inputs on which an output depends, by differentiating."""
    outputs = [tensor.float().sum() for tensor in written.values() if tensor.requires_grad]
    names = [name for name, tensor in given.items() if tensor.requires_grad]
    gradients = torch.autograd.grad(torch.stack(outputs).sum(), [given[name] for name in names], allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("family", "config", "forward", "order"),
    [(family, config, forward, order) for family, _, config, forward, order in FORWARDS_OF_CASES],
    ids=[f"{family}, {forward.__name__} {order}, {name}" for family, name, _, forward, order in FORWARDS_OF_CASES],
)
def test_a_forward_reads_and_writes_exactly_what_it_declares(
    family: str, config: ForwardConfig, forward: type[StepForward], order: int, precision: Precision
) -> None:
    module = forward(FAMILIES[family, precision], config, order)
    given = drawn_inputs(module, symbols_of(config))
    written = module(given)
    unread: set[str] = set()
    if forward is Tokens:  # indices and ranks decide where something is written, and nothing else
        unread = {spec.name for spec in module.inputs if spec.name.startswith("token_")} | {"scores"}
    if forward is Front:  # what the last MLP adds to x is left to `deep`
        unread = {f"mlp_gate.{module.deep_start - 1}"}
    assert read_of(given, written) == {spec.name for spec in module.inputs} - unread
    assert list(given) == [spec.name for spec in module.inputs]  # no name twice
    assert written.keys() == {spec.name for spec in module.outputs}
    _assert_shapes(module.outputs, written, symbols_of(config))


@pytest.mark.parametrize("is_guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("family", DECLARING)
def test_conditioning_reads_and_writes_exactly_what_it_declares(family: str, is_guided: bool) -> None:
    config = ForwardConfig(is_guided, state_rows=1)
    module = Conditioning(DECLARING[family], config)
    given = drawn_inputs(module, symbols_of(config))
    written = module(given)
    assert read_of(given, written) == {spec.name for spec in module.inputs} - {"labels"}
    assert written.keys() == {spec.name for spec in module.outputs}
    _assert_shapes(module.outputs, written, symbols_of(config))


def _assert_shapes(specs: tuple[TensorSpec, ...], tensors: Tensors, symbols: dict[str, int]) -> None:
    found = {spec.name: (tuple(tensors[spec.name].shape), tensors[spec.name].dtype) for spec in specs}
    assert found == {spec.name: (spec.resolve(symbols), DTYPES[spec.dtype]) for spec in specs}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("key", "config"),
    [(family, config) for family, _, config in CASES],
    ids=[f"{family}, {name}" for family, name, _ in CASES],
)
def test_the_graphs_of_the_strategies_are_those_of_the_modules(
    key: str, config: ForwardConfig, precision: Precision
) -> None:
    family, dtype = FAMILIES[key, precision], DTYPES[PRECISIONS[precision]]
    _, *size = family.latent_shape
    is_one_size = config.num_tokens is None
    pipeline = Pipeline(
        model=ModelIdentity(key, "tiny", "00" * 32, family.latent_shape),
        guidance="classifier_free" if config.is_guided else "none",
        num_blocks=NUM_BLOCKS,
        width=family.width,
        patch_size=family.patch_size,
        branches=family.branches,
        state_rows=config.state_rows,
        deep_start=config.deep_start,
        selector=config.selector,
        mask=config.mask,
        has_block_counts=config.has_block_counts,
        labels={"0": "zero"} if key == "dit" else {},
        text=None if key == "dit" else TextSpec(TEXT_TOKENS),
        min_size=(size[0], size[1]) if is_one_size else (4, 4),
        max_size=(size[0], size[1]),
        pixels_per_latent=2,
        image_channels=3,
        tile_size=None,
    )
    graphs = graph_specs(
        pipeline,
        has_decoder=True,
        precision=precision,
        num_heads=family.num_heads,
        reads_size=key == "pixart",
        max_order=2,
        forwards=exported_of(config),
    )
    modules: dict[str, NamedModule] = {CONDITIONING: Conditioning(family, config)}
    for kind in (kind for kind in KINDS if kind in graphs):
        forward, _, order = kind.partition("_")
        modules[kind] = FORWARDS[Forward(forward)](family, config, int(order or 0))
    modules |= {FRONT: Front(family, config)} if FRONT in graphs else {}
    modules[VAE_DECODER] = VaeDecoder(VAE, family.patch_size, pipeline.size if is_one_size else None, dtype)
    if key == "pixart":
        projection = PIXART_TRANSFORMER.caption_projection
        modules[TEXT_ENCODER] = TextEncoder(T5, projection, TEXT_TOKENS, family.width, dtype)
    assert graphs.keys() == modules.keys()
    for kind, module in modules.items():
        assert graphs[kind].inputs == module.inputs
        assert graphs[kind].outputs == module.outputs


def test_every_forward_of_the_schedules_has_a_module() -> None:
    assert set(FORWARDS) == set(Forward)
