"""How sure a mean over few images is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95


def bootstrap_interval(samples: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the interval that holds the mean with CONFIDENCE: percentiles of means of resamples (Efron 1979).

    Args:
        samples: of each image.
        seed: of the resampling. The same for all schedules, so that they are compared on the same resamples.
    """
    values = np.asarray(samples, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values[drawn].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)
