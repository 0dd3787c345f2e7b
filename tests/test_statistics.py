from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_search.statistics import bootstrap_interval
from strategies import examples


@given(samples=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
@examples(50)
def test_the_interval_lies_around_the_mean_and_within_the_samples(samples: list[float]) -> None:
    low, high = bootstrap_interval(samples)
    mean, rounding = math.fsum(samples) / len(samples), 1e-9 * max(1.0, *map(abs, samples))
    assert low <= mean + rounding
    assert mean <= high + rounding
    assert min(samples) - rounding <= low <= high <= max(samples) + rounding


def test_equal_samples_leave_no_doubt() -> None:
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_an_interval_shrinks_with_the_root_of_the_number_of_samples() -> None:
    few, many = (np.random.default_rng(1).normal(size=n).tolist() for n in (50, 5000))
    widths = [high - low for low, high in (bootstrap_interval(few), bootstrap_interval(many))]
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.2)
    assert widths[1] == pytest.approx(2 * 1.96 / 5000**0.5, rel=0.1)  # of normal samples of variance 1


def test_19_of_20_intervals_hold_the_true_mean() -> None:
    draw = np.random.default_rng(2)
    intervals = [bootstrap_interval(draw.exponential(size=100).tolist()) for _ in range(200)]
    held = sum(low <= 1 <= high for low, high in intervals)
    assert 0.89 <= held / 200 <= 0.98  # the percentiles of skewed samples hold a little less than they promise


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly() -> None:
    samples = np.random.default_rng(3).normal(size=40).tolist()
    assert bootstrap_interval(samples) == bootstrap_interval(samples)
    assert bootstrap_interval(samples, seed=1) != bootstrap_interval(samples)
    assert bootstrap_interval(samples, seed=1) == pytest.approx(bootstrap_interval(samples), abs=0.05)


def test_a_schedule_that_is_better_on_every_image_has_the_lower_interval() -> None:
    samples = np.random.default_rng(4).normal(size=20)
    assert np.less(bootstrap_interval((samples - 0.1).tolist()), bootstrap_interval(samples.tolist())).all()
