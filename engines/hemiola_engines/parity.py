"""Parity: the engines of a bundle against PyTorch, on whatever machine the bundle lies.

Export draws a few images with every schedule in PyTorch and stores their final latents; a bundle carries them. So the
comparison needs neither PyTorch nor the model.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from hemiola_engines.errors import BuildError
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.graph_set import REFERENCE_FILE
from hemiola_runtime.graphs import Precision
from hemiola_runtime.manifest import read_manifest, write_manifest
from hemiola_runtime.sampler import Sampler

# Relative L2 of the final latents against PyTorch in float32. One forward in float32 is off by 1e-6, in float16 1e-3,
# in bfloat16 by 8e-3 (half of its last bit); a trajectory multiplies that, and `tokens` may choose another token where
# two rank alike.
BOUNDS: Final[dict[Precision, float]] = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 2e-2}


def check_parity(bundle: Path) -> dict[str, float]:
    """Draw the reference images with the bundle's engines.

    Returns:
        Relative L2 of the final latents against PyTorch, by schedule.

    Raises:
        BuildError: one is beyond its bound.
    """
    try:
        with np.load(io.BytesIO(open_bundle(bundle).files[REFERENCE_FILE]), allow_pickle=False) as file:
            reference = dict(file)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise BuildError(
            f"the reference images cannot be read ({error}). Export again with `hemiola export`"
        ) from error
    found = {}
    with Sampler.open(bundle) as sampler:
        bound = BOUNDS[sampler.manifest.precision]
        guidance = None if sampler.manifest.pipeline.guidance == "none" else reference["guidance"].tolist()
        for name in sampler.schedules:
            differences = []
            for i, seed in enumerate(reference["seeds"]):
                scale = None if guidance is None else [guidance[i]]
                of: dict[str, Any] = {
                    kind: [reference[kind][i].item()] for kind in ("labels", "prompts") if kind in reference
                }
                drawn = sampler.generate(**of, seeds=[int(seed)], guidance_scale=scale, schedule=name)
                expected = reference[f"latents.{name}"][i]
                differences.append(float(np.linalg.norm(drawn.latents[0] - expected) / np.linalg.norm(expected)))
            found[name] = max(differences)
    for name, difference in found.items():
        if not difference <= bound:
            raise BuildError(
                f"under the schedule {name} the engines draw images that differ from PyTorch's by {difference:.1e} "
                f"(relative L2 of the final latents; the bound is {bound:.0e}). The backend computes something "
                "else: please report it, with the versions that `hemiola doctor` prints"
            )
    return found


def write_parity(bundle: Path, parity: dict[str, float], forward_parity: dict[str, float]) -> None:
    """Write what was measured into a bundle's manifest."""
    write_manifest(replace(read_manifest(bundle), parity=parity, forward_parity=forward_parity), bundle)
