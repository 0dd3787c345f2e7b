from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hemiola_search.quality import PSNR_CEILING, frechet_distance, psnr, relative_l2, ssim
from strategies import examples

Array = NDArray[np.float64]


def _noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).random(shape)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)


@pytest.mark.parametrize("channels", [1, 3])
def test_identical_images_have_the_best_figures_there_are(channels: int) -> None:
    images = _noise(0, 2, 9, 12, channels)
    assert psnr(images, images).tolist() == [PSNR_CEILING] * 2
    assert ssim(images, images) == pytest.approx([1.0, 1.0], abs=1e-12)
    assert relative_l2(images, images).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("offset", "decibels"),
    [  # the mean squared error of an offset d is d², and 10·log10(1 / d²) = -20·log10(d)
        (1.0, 0.0),
        (0.1, 20.0),
        (0.5, 6.0206),  # 20·log10(2)
        (0.01, 40.0),
        (1e-6, 100.0),  # 120, above the ceiling
    ],
)
def test_a_constant_offset_has_the_psnr_of_its_square(offset: float, decibels: float) -> None:
    reference = np.zeros((1, 4, 5, 3))
    assert psnr(reference + offset, reference) == pytest.approx([decibels], abs=1e-4)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (0.9, 0.1)])
def test_the_ssim_of_flat_images_compares_their_brightness_only(a: float, b: float) -> None:
    # without variance, eq. 13 of Wang et al. 2004 is (2ab + C1) / (a² + b² + C1), with C1 = 0.01²
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    images = np.full((1, 12, 12, 1), a), np.full((1, 12, 12, 1), b)
    assert ssim(*images) == pytest.approx([expected], rel=1e-9)


def _ssim_by_definition(a: Array, b: Array) -> float:
    """Wang et al. 2004, eq. 13 to 16, of one grey image, window by window; borders are mirrored."""
    offsets = range(-5, 6)
    weights = np.array([[math.exp(-(y * y + x * x) / (2 * 1.5**2)) for x in offsets] for y in offsets])
    weights /= weights.sum()
    padded_a, padded_b = np.pad(a, 5, mode="symmetric"), np.pad(b, 5, mode="symmetric")
    found = []
    for y, x in np.ndindex(*a.shape):
        window_a, window_b = padded_a[y : y + 11, x : x + 11], padded_b[y : y + 11, x : x + 11]
        mean_a, mean_b = (weights * window_a).sum(), (weights * window_b).sum()
        variance_a = (weights * (window_a - mean_a) ** 2).sum()
        variance_b = (weights * (window_b - mean_b) ** 2).sum()
        covariance = (weights * (window_a - mean_a) * (window_b - mean_b)).sum()
        found.append(
            (2 * mean_a * mean_b + 0.01**2)
            * (2 * covariance + 0.03**2)
            / ((mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2))
        )
    return float(np.mean(found))


@given(seed=seeds(), height=st.integers(5, 14), width=st.integers(5, 14))
@examples(8)
def test_ssim_is_what_its_paper_defines(seed: int, height: int, width: int) -> None:
    a, b = _noise(seed, height, width), _noise(seed + 1, height, width)
    assert ssim(a[None, ..., None], b[None, ..., None]) == pytest.approx([_ssim_by_definition(a, b)], abs=1e-10)


def test_the_ssim_of_colours_is_the_mean_of_their_channels() -> None:
    a, b = _noise(0, 1, 8, 8, 3), _noise(1, 1, 8, 8, 3)
    channels = [float(ssim(a[..., i : i + 1], b[..., i : i + 1])[0]) for i in range(3)]
    assert ssim(a, b) == pytest.approx([sum(channels) / 3])


@given(seed=seeds())
@examples(20)
def test_psnr_and_ssim_do_not_care_which_image_is_the_reference(seed: int) -> None:
    a, b = _noise(seed, 2, 8, 8, 1), _noise(seed + 1, 2, 8, 8, 1)
    assert psnr(a, b) == pytest.approx(psnr(b, a))
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert np.all(np.abs(ssim(a, b)) <= 1)


@given(seed=seeds(), strength=st.floats(0.01, 0.4), factor=st.floats(1.5, 3))
@examples(20)
def test_more_noise_is_never_better(seed: int, strength: float, factor: float) -> None:
    reference = 0.5 + 0.3 * np.sin(np.arange(256.0) / 9).reshape(1, 16, 16, 1)
    noise = _noise(seed, 1, 16, 16, 1) - 0.5
    less, more = reference + strength * noise, reference + factor * strength * noise
    assert psnr(more, reference) == pytest.approx(psnr(less, reference) - 20 * math.log10(factor))
    assert relative_l2(more, reference) == pytest.approx(factor * relative_l2(less, reference))
    assert ssim(more, reference) < ssim(less, reference)


def test_relative_l2_is_the_length_of_the_difference_over_that_of_the_reference() -> None:
    reference = np.array([3.0, 4.0, 0.0, 0.0]).reshape(1, 1, 2, 2)  # length 5
    latents = reference + np.array([0.0, 0.0, 0.6, 0.8]).reshape(1, 1, 2, 2)  # length 1
    assert relative_l2(latents, reference) == pytest.approx([0.2])
    assert relative_l2(reference, latents) == pytest.approx([1 / math.sqrt(26)])


@pytest.mark.parametrize("figure", [relative_l2, psnr, ssim])
def test_every_image_has_a_figure_of_its_own(figure: object) -> None:
    assert callable(figure)
    a, b = _noise(0, 3, 6, 6, 1).astype(np.float32), _noise(1, 3, 6, 6, 1).astype(np.float32)
    together = figure(a, b)
    assert together.shape == (3,)
    assert together == pytest.approx(np.concatenate([figure(a[i : i + 1], b[i : i + 1]) for i in range(3)]))
    assert len(set(together.tolist())) == 3


def _corners(*sizes: float) -> Array:
    """All points (± s1, ± s2, …): their mean is 0 and their covariance, with n - 1 in it, s² · n / (n - 1)."""
    points = np.array(list(itertools.product(*((-size, size) for size in sizes))))
    return points * math.sqrt((len(points) - 1) / len(points))  # so that the covariance is s² exactly


def test_features_that_are_distributed_as_the_real_ones_have_no_frechet_distance() -> None:
    features = _noise(0, 40, 4)
    distance = frechet_distance(features, features.mean(axis=0), np.cov(features, rowvar=False))
    assert distance == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_axis_aligned_gaussians_has_a_closed_form() -> None:
    # |Δmean|² + Σ (σ - σ')²: with means (1, 2, 0) and (0, 0, 0), 1 + 4, and widths (1, 2, 3) and (2, 2, 1), 1 + 0 + 4
    features = _corners(1, 2, 3) + np.array([1.0, 2.0, 0.0])
    assert frechet_distance(features, np.zeros(3), np.diag([4.0, 4.0, 1.0])) == pytest.approx(10.0)


@given(seed=seeds())
@examples(20)
def test_the_frechet_distance_of_gaussians_in_the_plane_has_a_closed_form(seed: int) -> None:
    # for 2 × 2 matrices, tr √M = √(tr M + 2 √det M)
    features, real = _noise(seed, 20, 2), _noise(seed + 1, 20, 2)
    mine, theirs = np.cov(features, rowvar=False), np.cov(real, rowvar=False)
    product = mine @ theirs
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    shift = features.mean(axis=0) - real.mean(axis=0)
    expected = float(shift @ shift + np.trace(mine) + np.trace(theirs) - 2 * root)
    assert frechet_distance(features, real.mean(axis=0), theirs) == pytest.approx(expected, abs=1e-9)


@given(seed=seeds(), shift=st.floats(0, 10))
@examples(20)
def test_moving_all_features_adds_the_square_of_the_move(seed: int, shift: float) -> None:
    features = _noise(seed, 30, 3)
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False)
    moved = features + shift * np.array([0.6, 0.0, 0.8])
    assert frechet_distance(moved, mean, covariance) == pytest.approx(shift**2, abs=1e-6)
