"""Images that PyTorch draws with every schedule, by which engines are judged on whatever machine they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from hemiola_export.model import Model
from hemiola_export.prompts import embed_prompts
from hemiola_export.trajectory import Requests, Trajectory
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.schedule import Schedule
from hemiola_runtime.solver_table import SolverTable

SEEDS: Final = (0, 1)
GUIDANCE: Final = 2.0
PROMPTS: Final = ("a red circle left of a blue square", "A wooden boat on a quiet lake")


def reference_subjects(model: Model) -> dict[str, NDArray[Any]]:
    """Return what the reference images are drawn of: `labels` (B,) int64, or `prompts` (B,) strings."""
    if model.text is not None:
        return {"prompts": np.array(PROMPTS)}
    return {"labels": np.array([7 * seed % model.family.num_classes for seed in SEEDS], dtype=np.int64)}


def reference_requests(model: Model, *, is_guided: bool) -> Requests:
    """Return the requests of the reference images."""
    subjects = reference_subjects(model)
    if model.text is None:
        conditions = {"labels": torch.from_numpy(subjects["labels"])}
    else:
        conditions = embed_prompts(model, [str(prompt) for prompt in subjects["prompts"]], is_guided=is_guided)
    noise = torch.from_numpy(noise_from_seeds(SEEDS, model.family.latent_shape))
    return Requests(conditions, noise, torch.full((len(SEEDS),), GUIDANCE))


def write_reference(
    model: Model,
    schedules: Mapping[str, Schedule],
    tables: Mapping[str, SolverTable],
    path: Path,
    progress: Callable[[str], None],
) -> None:
    """Draw the reference images with every schedule, and write their final latents with all it takes to repeat them."""
    requests = reference_requests(model, is_guided=next(iter(schedules.values())).guidance == "classifier_free")
    drawn = {}
    for name, schedule in schedules.items():
        progress(f"reference images of {name}")
        drawn[f"latents.{name}"] = trajectory(model, schedule, tables[schedule.scheduler.digest]).run(requests).numpy()
    guidance = requests.guidance.numpy()
    subjects = reference_subjects(model)
    np.savez(path, allow_pickle=False, seeds=np.array(SEEDS), guidance=guidance, **subjects, **drawn)


def trajectory(model: Model, schedule: Schedule, table: SolverTable) -> Trajectory:
    """Return what runs a schedule in PyTorch."""
    return Trajectory(
        model.family,
        table,
        schedule.steps,
        schedule.guidance == "classifier_free",
        schedule.deep_start,
        schedule.selector,
        schedule.mask,
        schedule.has_block_counts,
        model.pixels_per_latent,
    )
