"""How far cached images are from uncached ones, and from real ones. Pure functions of arrays.

Images are (n, height, width, channels) in [0, 1]; latents (n, C, H, W).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.floating]

SSIM_SIGMA: Final = 1.5  # Wang et al. 2004, §III-C: an 11×11 window of this width
SSIM_C1: Final = 0.01**2
SSIM_C2: Final = 0.03**2
PSNR_CEILING: Final = 100.0  # of identical images, in dB


def relative_l2(latents: Floats, reference: Floats) -> NDArray[np.float64]:
    """Return ‖a - b‖ / ‖b‖ for each of n latents, (n,)."""
    difference = (latents.astype(np.float64) - reference).reshape(len(latents), -1)
    size = reference.astype(np.float64).reshape(len(reference), -1)
    return np.asarray(np.linalg.norm(difference, axis=1) / np.linalg.norm(size, axis=1))


def psnr(images: Floats, reference: Floats) -> NDArray[np.float64]:
    """Return the peak signal-to-noise ratio of each of n images in dB, (n,)."""
    error = ((images.astype(np.float64) - reference) ** 2).reshape(len(images), -1).mean(axis=1)
    return np.asarray(-10 * np.log10(np.maximum(error, 10 ** (-PSNR_CEILING / 10))))


def ssim(images: Floats, reference: Floats) -> NDArray[np.float64]:
    """Return the structural similarity of each of n images, (n,) (Wang et al. 2004, eq. 13)."""

    def blur(x: Floats) -> NDArray[np.float64]:
        window = (0, SSIM_SIGMA, SSIM_SIGMA, 0)
        return np.asarray(gaussian_filter(x.astype(np.float64), window, truncate=5 / SSIM_SIGMA, mode="reflect"))

    mean_a, mean_b = blur(images), blur(reference)
    variance_a = blur(images.astype(np.float64) ** 2) - mean_a**2
    variance_b = blur(reference.astype(np.float64) ** 2) - mean_b**2
    covariance = blur(images.astype(np.float64) * reference) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    scale = (mean_a**2 + mean_b**2 + SSIM_C1) * (variance_a + variance_b + SSIM_C2)
    return np.asarray((likeness / scale).reshape(len(images), -1).mean(axis=1))


def frechet_distance(features: Floats, mean: Floats, covariance: Floats) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to features (n, F) and to real data.

    With Inception's features this is FID; with any other it is not, and is called by its own name.
    """
    mine = features.astype(np.float64)
    my_mean, my_covariance = mine.mean(axis=0), np.cov(mine, rowvar=False)
    cross = sqrtm(my_covariance @ covariance)
    trace = np.trace(my_covariance) + np.trace(covariance) - 2 * np.trace(np.real(cross))
    return float(np.sum((my_mean - mean) ** 2) + trace)
