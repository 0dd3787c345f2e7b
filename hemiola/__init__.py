"""Hemiola: searched feature caching for Diffusion Transformers, deployed as compiled engines.

    from hemiola import Sampler

    with Sampler.open("bundle/") as sampler:
        result = sampler.generate(labels=[7], seeds=[0], guidance_scale=2.0)
        result.images  # (1, height, width, channels) uint8

Importing this package imports nothing heavy; its names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hemiola_runtime.errors import HemiolaError
    from hemiola_runtime.results import Progress, Result
    from hemiola_runtime.sampler import Sampler
    from hemiola_runtime.schedule import Schedule, read_schedule, write_schedule

__all__ = ["HemiolaError", "Progress", "Result", "Sampler", "Schedule", "read_schedule", "write_schedule"]

_HOMES = {
    "HemiolaError": "hemiola_runtime.errors",
    "Progress": "hemiola_runtime.results",
    "Result": "hemiola_runtime.results",
    "Sampler": "hemiola_runtime.sampler",
    "Schedule": "hemiola_runtime.schedule",
    "read_schedule": "hemiola_runtime.schedule",
    "write_schedule": "hemiola_runtime.schedule",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hemiola' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
