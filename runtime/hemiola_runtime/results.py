"""What a request gives, step by step and at its end; and how final latents become pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.report import RunReport


@dataclass(frozen=True, slots=True)
class Result:
    """What a request gives.

    Attributes:
        images: (B, height, width, channels) uint8; 3 channels RGB, 1 grey.
        latents: (B, C, H, W) float32, the final latents.
        report: what ran.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    report: RunReport


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a request has been done.

    Attributes:
        step: its index; the first is 0.
        num_steps: of the schedule.
        forward: what ran.
        elapsed_ms: since the request was written into the workspace.
        result: the images, with the last step; None before.
    """

    step: int
    num_steps: int
    forward: str
    elapsed_ms: float
    result: Result | None


def latents_to_pixels(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn the latents of a model of pixels, (B, C, H, W) in [-1, 1], into pictures (B, H, W, C) in [0, 1]."""
    return np.moveaxis(np.clip(latents / 2 + 0.5, 0, 1), 1, -1)


def as_bytes(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Turn pictures in [0, 1] into bytes."""
    scaled = np.ascontiguousarray(images * np.float32(255))
    return np.rint(scaled, out=scaled).astype(np.uint8)
