"""What an uncached run shows about a model: how its features change from step to step, and how much an error matters.

Everything is measured on a few images of one uncached trajectory, whose caches are kept for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hemiola_export.conditioning import ForwardConfig
from hemiola_export.families import Family
from hemiola_export.families.seams import GATE, vector_name
from hemiola_export.forwards import FORWARDS
from hemiola_export.named_module import Tensors
from hemiola_export.step_forward import StepForward, cache_name
from hemiola_export.trajectory import Moment, Requests, Trajectory
from hemiola_runtime.schedule import COMPUTED, FULL, Forward
from hemiola_runtime.solver_table import SolverTable

Floats = NDArray[np.float64]

MAX_LAG: Final = 8  # steps over which changes of single layers are measured
CACHED_KINDS: Final = (Forward.REUSE.value, Forward.RESIDUAL.value)  # whose caches are compared
TINY: Final = 1e-12
KEPT_BYTES: Final = 8 << 30  # of caches, which all images of a calibration together may take


@dataclass(frozen=True, slots=True)
class Calibration:
    """Figures of an uncached trajectory. T steps, L blocks, M branches.

    Attributes:
        outputs: (T, T, T) inner products, outputs[t, i, j] = ⟨o_ti, o_tj⟩ for i, j ≤ t, where o_ti is the guided output
            of the model at step t if all layers came from the cache of step i; o_tt is the true one.
        residual_outputs: the same if the residual of the whole model came from the cache of step i.
        sensitivity: (T,) relative L2 of the final latents for an error of the output at step t, by its norm. Measured
            with the error of repeating the cache of the step before, the geometric mean of the images, and smoothed
            by a parabola through the logarithms; 0 for step 0, which caches nothing.
        layer_errors: (MAX_LAG, T, M, L) relative L1 by which a layer's output at step t differs from that k + 1 steps
            before, at [k, t]; 0 where there is no such step.
        layer_changes: (MAX_LAG, T, M, L) L2 norm of the same difference behind its gate, by that of the residual.
        residual_ratios: (T,) mean over rows of ‖r_t‖ / ‖r_t-1‖, r the residual: the sum of all gated layers; 1 for
            step 0.
    """

    outputs: Floats
    residual_outputs: Floats
    sensitivity: Floats
    layer_errors: Floats
    layer_changes: Floats
    residual_ratios: Floats


def images_to_calibrate(family: Family, num_steps: int, rows_per_image: int, wanted: int) -> int:
    """Return how many of the wanted images can be calibrated on: the caches of all steps are kept."""
    of_image = 4 * num_steps * rows_per_image * family.num_tokens * family.width
    return max(1, min(wanted, KEPT_BYTES // (of_image * len(family.blocks) * len(family.branches))))


@torch.inference_mode()
def calibrate(
    family: Family,
    table: SolverTable,
    requests: Requests,
    *,
    is_guided: bool,
    pixels_per_latent: int,
    stride: int,
    on_step: Callable[[], None],
) -> Calibration:
    """Measure an uncached trajectory.

    Args:
        family: the model.
        table: the sampler.
        requests: few images.
        is_guided: classifier-free guidance.
        pixels_per_latent: as of a trajectory.
        stride: the sensitivity is measured at every so many steps, and interpolated between them.
        on_step: told after every step that is computed.
    """
    num_steps = len(table.scheduler.timesteps)
    mask = (COMPUTED * len(family.blocks),) * len(family.branches)  # so that every block's cache is kept by itself
    trajectory = Trajectory(
        family,
        table,
        (FULL,) * num_steps,
        is_guided,
        mask=mask,
        pixels_per_latent=pixels_per_latent,
        kinds=CACHED_KINDS,
    )
    moments = []
    for moment in trajectory.walk(requests):
        moments.append(moment)
        on_step()
    num_tokens = moments[0].before["state"].shape[2]
    config = ForwardConfig(is_guided, table.state_rows, mask=mask, num_tokens=num_tokens, keeps_residual=True)
    full, reuse, residual = (FORWARDS[f](family, config) for f in (Forward.FULL, Forward.REUSE, Forward.RESIDUAL))
    outputs, residual_outputs = np.zeros((num_steps,) * 3), np.zeros((num_steps,) * 3)
    shape = (MAX_LAG, num_steps, len(family.branches), len(family.blocks))
    errors, changes, residuals = np.zeros(shape), np.zeros(shape), list[Tensor]()
    recent: list[Tensor] = []  # layers of the last steps, the newest last
    for t, moment in enumerate(moments):
        for forward, products in ((reuse, outputs), (residual, residual_outputs)):
            drawn = torch.stack([_output(forward, moment, earlier).flatten() for earlier in moments[: t + 1]]).double()
            products[t, : t + 1, : t + 1] = (drawn @ drawn.T).cpu().numpy()
        layers, gates = _layers(family, moment)
        residuals.append(_norms((gates * layers).sum(dim=0)))  # (R,)
        for lag, earlier in enumerate(reversed(recent)):
            difference = layers - earlier
            relative = difference.abs().sum(dim=(1, 2, 3)) / layers.abs().sum(dim=(1, 2, 3))  # (M·L,)
            change = (gates * difference).flatten(2).norm(dim=2).mean(dim=1) / residuals[-1].mean()
            errors[lag, t], changes[lag, t] = (x.reshape(shape[2:]).cpu().numpy() for x in (relative, change))
        recent = [*recent, layers][-MAX_LAG:]
        on_step()
    ratios = [1.0, *(float((new / old).mean()) for old, new in pairwise(residuals))]
    sensitivity = _sensitivity(full, reuse, moments, stride, on_step)
    return Calibration(outputs, residual_outputs, sensitivity, errors, changes, np.array(ratios))


def _caches(moment: Moment) -> Tensors:
    """Return what a full step left."""
    return {name.removeprefix("next_"): tensor for name, tensor in moment.after.items() if "_cache." in name}


def _output(forward: StepForward, moment: Moment, earlier: Moment) -> Tensor:
    """Return the guided output (B, N, P) of a forward at one moment, of what an earlier one left in the caches."""
    chosen = torch.zeros_like(moment.before["coefficients"])
    chosen[0, -1] = 1  # the next sample is the output itself
    drawn: Tensor = forward(moment.before | _caches(earlier) | {"coefficients": chosen})["next_state"][0]
    return drawn


def _layers(family: Family, moment: Moment) -> tuple[Tensor, Tensor]:
    """Return what every layer gives (M·L, R, N, D) and its gate (M·L, R or 1, 1, D), branch by branch."""
    caches, blocks = _caches(moment), range(len(family.blocks))
    layers = [caches[cache_name(branch, block)].float() for branch in family.branches for block in blocks]
    gates = [
        moment.before[f"{vector_name(branch, GATE)}.{block}"]
        if branch in family.gated_branches
        else torch.ones((1, 1, family.width), device=layers[0].device)
        for branch in family.branches
        for block in blocks
    ]
    rows = max(gate.shape[0] for gate in gates)
    return torch.stack(layers), torch.stack([gate.expand(rows, -1, -1) for gate in gates])


def _sensitivity(
    full: StepForward, reuse: StepForward, moments: Sequence[Moment], stride: int, on_step: Callable[[], None]
) -> Floats:
    """Repeat the cache once, at one step, compute all others, and see what becomes of the error."""
    final, places = moments[-1].after["next_state"][0], sorted({*range(1, len(moments), stride), len(moments) - 1})
    found = []
    for t in places:
        state = reuse(moments[t].before | _caches(moments[t - 1]))["next_state"]
        error = _output(reuse, moments[t], moments[t - 1]) - _output(reuse, moments[t], moments[t])
        for moment in moments[t + 1 :]:
            state = full(moment.before | {"state": state})["next_state"]
            on_step()
        ratios = _norms(state[0] - final) / _norms(final) / _norms(error).clamp_min(TINY)  # (B,)
        found.append(float(ratios.clamp_min(TINY).log().mean()))
    if not places:
        return np.zeros(1)
    smooth = np.polynomial.Polynomial.fit(places, found, min(2, len(places) - 1))
    return np.concatenate([[0.0], np.exp(smooth(np.arange(1, len(moments))))])


def _norms(tensor: Tensor) -> Tensor:
    """Return the norm of each image of (B, …)."""
    norms: Tensor = tensor.flatten(1).norm(dim=1)
    return norms
