"""The engines of a bundle against PyTorch in float32: step by step on a real trajectory, and the trajectory itself.

Every step gets PyTorch's own tensors, so that no error of an earlier step counts again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from hemiola_export.errors import ExportError
from hemiola_export.model import Model
from hemiola_export.reference_images import reference_requests
from hemiola_export.trajectory import Moment, Trajectory
from hemiola_runtime.bundle import Bundle
from hemiola_runtime.errors import NumericError
from hemiola_runtime.graphs import Precision
from hemiola_runtime.probe import Probe

# Largest relative L2 of what one forward leaves. float32 products of other libraries differ by some 1e-6 a block, and
# by 1e-5 behind dozens. Half precision rounds each product to 8 bits (bfloat16, 4e-3) or 11 (float16, 5e-4) in every
# block of the residual stream.
FORWARD_BOUNDS: Final[dict[Precision, float]] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}
STEPS_PER_FORWARD: Final = 3  # the first, the last and the middle one of a schedule


@torch.inference_mode()
def compare_forwards(
    model: Model, bundle: Bundle, *, on_step: Callable[[str], None] = lambda _: None
) -> dict[str, float]:
    """Run steps of every schedule of a bundle on what PyTorch computed up to there.

    Args:
        model: the bundle was exported from it.
        bundle: opened.
        on_step: told which step is compared.

    Returns:
        The largest relative L2 against PyTorch by forward: over compared steps, and over the groups of tensors that
        a step leaves (the state, the caches of each branch, scores).

    Raises:
        ExportError: the bundle was made of another model.
        NumericError: an engine gave NaN or infinity; the message names step and tensor.
    """
    pipeline = bundle.manifest.pipeline
    mine, theirs = pipeline.model, model.identity
    if mine.weights_sha256 != theirs.weights_sha256:
        raise ExportError(
            f"the bundle was made of {mine.name} (weights {mine.weights_sha256[:12]}), which is not "
            f"{theirs.name} (weights {theirs.weights_sha256[:12]})"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.family.to(device)
    requests = reference_requests(model, is_guided=pipeline.guidance == "classifier_free").part(0, 1).to(device)
    found: dict[str, float] = defaultdict(float)
    for name in bundle.manifest.schedules:
        schedule = bundle.schedule(name)
        compared = _compared_steps([step.kind for step in schedule.steps])
        with Probe(bundle, name, 1) as probe:
            # With what the bundle's engines leave for `deep` and `tokens`, whether this schedule has such steps or not.
            trajectory = Trajectory(
                model.family,
                bundle.solver_table(schedule),
                schedule.steps,
                schedule.guidance == "classifier_free",
                pipeline.deep_start,
                pipeline.selector,
                pipeline.mask,
                pipeline.has_block_counts,
                pipeline.pixels_per_latent,
                tuple(bundle.manifest.forwards),
            )
            for moment in trajectory.walk(requests):
                if moment.index in compared:
                    kind = moment.step.kind
                    on_step(f"{name}: step {moment.index}, {kind}")
                    found[kind] = max(found[kind], _difference(probe, moment, name))
                if moment.index == max(compared):
                    break
    return dict(found)


def _compared_steps(kinds: Iterable[str]) -> set[int]:
    """Choose the first, the last and the middle step of every kind."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        places[kind].append(index)
    return {indices[k] for indices in places.values() for k in (0, len(indices) // 2, -1)}


def _difference(probe: Probe, moment: Moment, schedule: str) -> float:
    before = {name: tensor.float().cpu().numpy() for name, tensor in moment.before.items()}
    written = probe.step(moment.index, before)
    squares: dict[str, NDArray[Any]] = defaultdict(lambda: np.zeros(2))
    for name, tensor in written.items():
        if not np.isfinite(tensor).all():
            raise NumericError(
                f"the tensor {name} that `{moment.step.kind}` left at step {moment.index} of the schedule "
                f"{schedule} holds NaN or infinity, and PyTorch's does not. bf16 and fp32 have more room than fp16"
            )
        expected = moment.after[name].float().cpu().numpy()
        squares[name.partition(".")[0]] += (np.square(tensor - expected).sum(), np.square(expected).sum())
    return max(_relative(squared) for squared in squares.values())


def _relative(squared: NDArray[Any]) -> float:
    """Return relative L2; 0 where both are 0, as the staleness after a full step."""
    error, size = squared
    return float(np.sqrt(error / size)) if size else float(np.sqrt(error))


def beyond_bounds(found: Mapping[str, float], precision: Precision) -> dict[str, float]:
    """Return those forwards that differ from PyTorch by more than their precision explains."""
    return {name: difference for name, difference in found.items() if not difference <= FORWARD_BOUNDS[precision]}
