from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.errors import HemiolaError, RequestError
from hemiola_runtime.manifest import Manifest, read_manifest
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.request import MAX_SEED, Request, request_from_arguments
from strategies import examples

SHAPE: Final = (4, 8, 8)  # of the golden manifest's latents; it takes up to 8 images
LABELS: Final = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "great white shark, white shark", "3": "hen"}


def manifest() -> Manifest:
    golden = read_manifest(Path(__file__).parent / "golden")
    return replace(golden, pipeline=replace(golden.pipeline, labels=LABELS))


def request(
    labels: Any = (0, 1, 2), seeds: Any = 0, guidance_scale: Any = 2.0, latents: Any = None, batch: int = 8
) -> Request:
    return request_from_arguments(replace(manifest(), max_batch_size=batch), labels, seeds, guidance_scale, latents)


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ([3, 0], [3, 0]),
        (["goldfish", "hen"], [1, 3]),
        (["tench", "Tinca tinca", "white shark"], [0, 0, 2]),  # any of a label's names
        ([1, "hen"], [1, 3]),
        (["tench, Tinca tinca"], [0]),  # or all of them
        ((2,), [2]),
        (np.array([2, 1]), [2, 1]),
        ([np.int32(2)], [2]),
    ],
)
def test_a_label_is_a_number_or_one_of_its_names(labels: Any, numbers: list[int]) -> None:
    made = request(labels)
    assert made.labels.tolist() == numbers
    assert made.labels.dtype == np.int64
    assert made.batch_size == len(numbers)


@pytest.mark.parametrize(
    ("seeds", "drawn"),
    [
        (5, (5, 6, 7)),
        (np.int64(5), (5, 6, 7)),
        ([7, 7, 1], (7, 7, 1)),
        ((MAX_SEED, 0, 1), (MAX_SEED, 0, 1)),
        (np.array([4, 5, 6]), (4, 5, 6)),
        (MAX_SEED - 2, (2**64 - 3, 2**64 - 2, 2**64 - 1)),
    ],
)
def test_one_seed_counts_on_and_a_list_gives_one_to_each_image(seeds: Any, drawn: tuple[int, ...]) -> None:
    made = request(seeds=seeds)
    assert made.seeds == drawn
    assert np.array_equal(made.noise, noise_from_seeds(drawn, SHAPE))


@pytest.mark.parametrize(
    ("guidance_scale", "values"),
    [
        (4, [4, 4, 4]),
        (1.5, [1.5, 1.5, 1.5]),
        (-1.0, [-1, -1, -1]),
        ([1.0, 2.5, 0.0], [1, 2.5, 0]),
        (np.array([1.0, 2.5, 0.0]), [1, 2.5, 0]),
        (np.float32(3), [3, 3, 3]),
    ],
)
def test_guidance_is_one_number_or_one_for_each_image(guidance_scale: Any, values: list[float]) -> None:
    made = request(guidance_scale=guidance_scale)
    assert made.guidance.tolist() == values
    assert made.guidance.dtype == np.float32


def test_latents_take_the_place_of_seeds() -> None:
    latents = noise_from_seeds([11, 12, 13], SHAPE)
    made = request(seeds=[1, 2, 3], latents=latents)
    assert made.seeds == ()
    assert np.array_equal(made.noise, latents)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"labels": "hen"}, "labels is a list with one label per image, not 'hen'"),
    ({"labels": b"hen"}, "labels is a list with one label per image, not b'hen'"),
    ({"labels": 3}, "labels is a list with one label per image, not 3"),
    ({"labels": None}, "labels is a list with one label per image, not None"),
    ({"labels": {1, 2}}, "labels is a list with one label per image"),
    ({"labels": ["cockerel"]}, "unknown label 'cockerel'; `hemiola inspect` of the bundle lists them"),
    ({"labels": [0, 4]}, "label 4 is out of range: this model knows 0 to 3"),
    ({"labels": [-1]}, "label -1 is out of range: this model knows 0 to 3"),
    ({"labels": [True]}, "label True is out of range"),
    ({"labels": [np.bool_(True)]}, "is out of range"),
    ({"labels": [1.0]}, "label 1.0 is out of range"),
    ({"labels": [None]}, "label None is out of range"),
    ({"labels": np.zeros((2, 2), dtype=np.int64)}, "is out of range"),
    ({"labels": []}, "no label was given; a request draws one image for each"),
    ({"labels": [0] * 9}, "9 images in one request; this bundle takes 1 to 8. Ask in parts, or build it with --max-b"),
    ({"labels": [0] * 9}, "--max-batch-size 9"),
    ({"seeds": [1, 2]}, "2 seeds for 3 images; give one per image, or one number"),
    ({"seeds": []}, "0 seeds for 3 images"),
    ({"seeds": -1}, "seed -1 is not a whole number from 0 to 2^64 - 1"),
    ({"seeds": [0, 1, 2**64]}, "seed 18446744073709551616 is not a whole number"),
    ({"seeds": MAX_SEED}, "seed 18446744073709551616 is not a whole number"),  # of the second image
    ({"seeds": [0, 1, 1.5]}, "seed 1.5 is not a whole number"),
    ({"seeds": [0, 1, True]}, "seed True is not a whole number"),
    ({"seeds": "123"}, "seeds is a whole number, or one per image, not '123'"),
    ({"seeds": None}, "seeds is a whole number, or one per image, not None"),
    ({"seeds": 1.5}, "seeds is a whole number, or one per image, not 1.5"),
    ({"seeds": True}, "seeds is a whole number, or one per image, not True"),
    ({"seeds": ["1", 2, 3]}, "seed '1' is not a whole number"),
    ({"guidance_scale": [1.0, 2.0]}, "[1.0, 2.0] is neither one finite number nor 3, one per image"),
    ({"guidance_scale": [[1.0, 2.0, 3.0]]}, "is neither one finite number nor 3, one per image"),
    ({"guidance_scale": float("nan")}, "guidance_scale nan is neither one finite number"),
    ({"guidance_scale": [1.0, float("inf"), 1.0]}, "is neither one finite number"),
    ({"guidance_scale": None}, "guidance_scale is a number, or one per image, not None"),
    ({"guidance_scale": "strong"}, "guidance_scale is a number, or one per image, not 'strong'"),
    ({"guidance_scale": [1.0, [2.0], 3.0]}, "guidance_scale is a number, or one per image"),
    ({"guidance_scale": 1e39}, "guidance_scale 1e+39 is neither one finite number"),
    ({"guidance_scale": 10**400}, "guidance_scale is a number, or one per image"),
    ({"guidance_scale": 1j}, "guidance_scale is a number, or one per image, not 1j"),
    ({"latents": [[0.0]]}, "latents are a numpy array of float32, not list. Convert with .astype(numpy.float32)"),
    ({"latents": np.zeros((3, *SHAPE))}, "latents are a numpy array of float32, not float64. Convert with .astype"),
    (
        {"latents": np.zeros((2, *SHAPE), dtype=np.float32)},
        "latents have shape (2, 4, 8, 8) where this request needs (3, 4, 8, 8)",
    ),
    ({"latents": np.full((3, *SHAPE), np.nan, dtype=np.float32)}, "latents hold NaN or infinity"),
    ({"latents": np.full((3, *SHAPE), np.inf, dtype=np.float32)}, "latents hold NaN or infinity"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), REFUSED, ids=[f"{i}: {message[:50]}" for i, (_, message) in enumerate(REFUSED)]
)
def test_what_the_bundle_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request(**arguments)
    assert message in str(caught.value)


def test_a_refused_request_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="unknown label") as caught:
        request(["cockerel"])
    assert isinstance(caught.value, HemiolaError)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_largest_batch_of_the_bundle_is_taken(batch: int) -> None:
    assert request([0] * batch, batch=batch).batch_size == batch


@pytest.mark.parametrize("state_rows", [1, 3])
def test_the_first_state_is_scaled_noise_and_an_empty_history(state_rows: int) -> None:
    made = request()
    tensors = made.tensors(init_noise_sigma=14.5, state_rows=state_rows)
    assert set(tensors) == {"state", "labels", "guidance"}
    assert tensors["state"].shape == (state_rows, 3, *SHAPE)
    assert tensors["state"].dtype == np.float32
    assert np.array_equal(tensors["state"][0], made.noise * np.float32(14.5))
    assert not tensors["state"][1:].any()
    assert tensors["labels"] is made.labels
    assert tensors["guidance"] is made.guidance


def test_a_request_owns_its_guidance() -> None:
    scales = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    made = request(guidance_scale=scales)
    scales[:] = 0
    assert made.guidance.tolist() == [1, 2, 3]


@examples(15)
@given(seeds=st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=5, unique=True))
def test_a_seed_is_the_same_noise_at_any_place_of_any_batch(seeds: list[int]) -> None:
    together = noise_from_seeds(seeds, SHAPE)
    assert together.dtype == np.float32
    for seed, noise in zip(seeds, together, strict=True):
        assert np.array_equal(noise_from_seeds([seed], SHAPE)[0], noise)
    assert len({noise.tobytes() for noise in together}) == len(seeds)


def test_noise_is_standard_normal() -> None:
    noise = noise_from_seeds(range(100), SHAPE)
    # 25,600 draws: the mean has a standard deviation of 1 / 160, the variance of sqrt(2 / 25600) = 0.009; five of each
    assert abs(noise.mean()) < 5 / 160
    assert abs(noise.var() - 1) < 5 * 0.009
