"""What it takes to run forwards of any family by themselves, and to say what they should have computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from hemiola_export.conditioning import ForwardConfig
from hemiola_export.families import Family
from hemiola_export.forwards import Full
from hemiola_export.named_module import NamedModule, Tensors
from hemiola_export.patches import from_patches
from hemiola_export.step_forward import cache_name
from hemiola_runtime.graphs import slots_name

RELATIVE: Final = 1e-5  # of float32, where the same sums are made in another order
DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return relative L2."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def assert_alike(found: Tensors, expected: Tensors) -> None:
    """Compare all that is expected in float32."""
    worst = {name: relative(found[name], tensor) for name, tensor in expected.items()}
    assert {name: error for name, error in worst.items() if not error < RELATIVE} == {}


def latents(family: Family, patches: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Put patches (B, N, P) together to latents (B, C, H, W) of `size`, as diffusers takes and gives them."""
    _, height, width = family.latent_shape
    return from_patches(patches, family.patch_size, size or (height, width))


def run(module: NamedModule, tensors: Tensors) -> Tensors:
    """Run a module on those tensors that it declares, each in the dtype that it declares."""
    with torch.inference_mode():
        written: Tensors = module({spec.name: tensors[spec.name].to(DTYPES[spec.dtype]) for spec in module.inputs})
    return written


def after(tensors: Tensors, written: Tensors) -> Tensors:
    """Return the tensors with every `next_x` in the place of `x`, but for the state: the next step draws its own."""
    new = {name.removeprefix("next_"): tensor for name, tensor in written.items()}
    return tensors | {name: tensor for name, tensor in new.items() if name != "state"}


def with_slots(tensors: Tensors, count: int, of_blocks: Mapping[str, int] | None = None) -> Tensors:
    """Add what says how many tokens are chosen, and where the squares of 2 × 2 of the 4 × 4 tokens lie.

    `of_blocks`: counts of single blocks by their symbols, as `K.mlp.3`.
    """
    squares = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    counts = {"K": count, **(of_blocks or {})}
    slots = {slots_name(symbol): torch.arange(n) for symbol, n in counts.items()}
    return tensors | slots | {"token_squares": torch.tensor(squares)}


def drawn_step(family: Family, config: ForwardConfig, *, seed: int, batch_size: int = 2) -> Tensors:
    """Draw all that a first step reads. The solver is set to give the model output itself as the next sample."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": batch_size, "R": batch_size * config.rows_per_image}
    tensors = {
        spec.name: torch.randn(spec.resolve(sizes), generator=generator).to(DTYPES[spec.dtype])
        for spec in Full(family, config).inputs
    }
    tensors |= {name: 1 + tensor / 4 for name, tensor in tensors.items() if "_gain" in name}
    coefficients = torch.zeros_like(tensors["coefficients"])
    coefficients[0, -1] = 1
    return tensors | {"coefficients": coefficients, "input_scale": torch.tensor(1.0)}


def read_of_block(block: int, tensors: Tensors) -> Tensors:
    """Return the tensors with those of one block under the names by which it reads them."""
    own = {name.rpartition(".")[0]: t for name, t in tensors.items() if name.rpartition(".")[2] == str(block)}
    return tensors | own


def guided(family: Family, config: ForwardConfig, output: Tensor, guidance: Tensor) -> Tensor:
    """Combine the rows of guided images: the output (R, …) becomes (B, …)."""
    if not config.is_guided:
        return output
    rows = output.chunk(2)
    cond, uncond = rows[family.conditional_row], rows[1 - family.conditional_row]
    return uncond + guidance.reshape(-1, *[1] * (output.ndim - 1)) * (cond - uncond)


def tokens_by_hand(
    family: Family, config: ForwardConfig, tensors: Tensors, chosen: Tensor | Mapping[str, Tensor] | None
) -> Tensors:
    """Compute `tokens` as its definition reads: every deep branch on every token, then rows that were not chosen old.

    Args:
        family: the model.
        config: of the forwards.
        tensors: with stale caches.
        chosen: (S, B, N) bool, which tokens of which deep block are computed, or that of each branch; None for all.
    """
    assert config.deep_start is not None
    x = family.embed(tensors["state"][0] * tensors["input_scale"], tensors)
    x = torch.cat([x, x]) if config.is_guided else x
    for branch in family.branches:  # what the shallow blocks add without a gate
        x = x + tensors.get(cache_name(branch, "shallow"), torch.zeros(()))
    written = {}
    for i in range(len(family.blocks)):
        block, read = family.block(i), read_of_block(i, tensors)
        for branch in family.branches:
            if cache_name(branch, i) not in tensors:
                continue
            out = tensors[cache_name(branch, i)]
            if i >= config.deep_start and branch != "attention":
                fresh = block.branch(branch, x, read)
                if chosen is None:
                    out = fresh
                else:
                    here = (chosen[branch] if isinstance(chosen, Mapping) else chosen)[i - config.deep_start]
                    mask = torch.cat([here] * config.rows_per_image)[..., None]  # (R, N, 1)
                    out = torch.where(mask, fresh, out)
                written[f"next_{cache_name(branch, i)}"] = out
            x = x + (read[f"{branch}_gate"] * out if f"{branch}_gate" in read else out)
    output = guided(family, config, family.head(x, tensors), tensors["guidance"])
    return written | {"next_state": output[None]}
