"""Randomness of a request: a seed is an image's initial noise, the same wherever it stands in whatever batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def noise_from_seeds(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Draw standard normal noise, one image per seed, by numpy's Philox: (B, C, H, W) float32."""
    drawn = [
        np.random.Generator(np.random.Philox(key=seed)).standard_normal(latent_shape, dtype=np.float32)
        for seed in seeds
    ]
    return np.stack(drawn)
