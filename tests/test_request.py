from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.errors import HemiolaError, RequestError
from hemiola_runtime.graph_set import TOKENIZER_FILE
from hemiola_runtime.graphs import TEXT_ENCODER
from hemiola_runtime.manifest import Manifest, read_manifest
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.patches import from_patches, to_patches
from hemiola_runtime.pipeline import TextSpec
from hemiola_runtime.request import MAX_SEED, Asked, Request, by_image, request_from_arguments
from hemiola_runtime.text import Embedded
from strategies import examples

SHAPE: Final = (4, 8, 8)  # of the golden manifest's latents; it takes up to 8 images
LABELS: Final = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "great white shark, white shark", "3": "hen"}


def manifest(batch: int = 8, **pipeline: Any) -> Manifest:
    golden = read_manifest(Path(__file__).parent / "golden")
    engine, file = next(iter(golden.engines.values())), next(iter(golden.files.values()))
    return replace(
        golden,
        max_batch_size=batch,
        pipeline=replace(golden.pipeline, **({"labels": LABELS} | pipeline)),
        engines=golden.engines | {TEXT_ENCODER: engine},
        files=golden.files | {TOKENIZER_FILE: file},
    )


def asked(**arguments: Any) -> Asked:
    nothing: dict[str, Any] = dict.fromkeys(
        ("labels", "prompts", "negative_prompts", "guidance_scale", "latents", "height", "width")
    )
    return Asked(**(nothing | {"seeds": 0} | arguments))


def request(labels: Any = (0, 1, 2), batch: int = 8, **arguments: Any) -> Request:
    return request_from_arguments(manifest(batch), asked(labels=labels, **arguments))


PROMPTS: Final = ("a red circle", "a blue square", "")
TEXT: Final[dict[str, Any]] = {  # pictures of 8 to 24 pixels by 16 to 32, in squares of 2 · 2 patches of 2 · 2 latents
    "labels": {},
    "text": TextSpec(5),
    "min_size": (4, 8),
    "max_size": (12, 16),
}


def text_request(prompts: Any = PROMPTS, pipeline: dict[str, Any] | None = None, **arguments: Any) -> Request:
    return request_from_arguments(manifest(**TEXT, **(pipeline or {})), asked(prompts=prompts, **arguments))


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
    assert made.labels is not None
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
    ({"labels": None}, "no label was given; a request draws one image for each"),
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
    ({"prompts": ["a hen"]}, "this bundle draws images of labels, not of prompts"),
    ({"labels": None, "prompts": ["a hen"]}, "this bundle draws images of labels, not of prompts"),
    ({"negative_prompts": ""}, "this bundle draws images of labels, not of prompts"),
    ({"height": 24}, "height is 16 pixels in this bundle, not 24; export with --min-size and --max-size for others"),
    ({"width": 8}, "width is 16 pixels in this bundle, not 8; export with --min-size and --max-size for others"),
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
def test_the_first_state_is_scaled_noise_in_patches_and_an_empty_history(state_rows: int) -> None:
    made = request()
    conditions = {"labels": np.array([0, 1, 2])}
    tensors = made.tensors(manifest(state_rows=state_rows).pipeline, 14.5, conditions)
    assert set(tensors) == {"state", "labels", "guidance"}
    assert tensors["state"].shape == (state_rows, 3, 16, 16)  # 4 · 4 patches of 2 · 2 · 4 numbers
    assert tensors["state"].dtype == np.float32
    assert np.array_equal(from_patches(tensors["state"][0], 2, (8, 8)), made.noise * np.float32(14.5))
    assert not tensors["state"][1:].any()
    assert tensors["labels"] is conditions["labels"]
    assert tensors["guidance"] is made.guidance


# requests of prompts


def test_one_image_is_drawn_for_each_prompt() -> None:
    made = text_request()
    assert (made.labels, made.prompts, made.batch_size) == (None, PROMPTS, 3)
    assert np.array_equal(made.noise, noise_from_seeds([0, 1, 2], SHAPE))
    assert text_request(["the same", "the same"]).prompts == ("the same", "the same")


@pytest.mark.parametrize(
    ("given", "negative"),
    [
        (None, ("", "", "")),
        ("", ("", "", "")),
        ("blurred", ("blurred", "blurred", "blurred")),
        (["grey", "", "dark"], ("grey", "", "dark")),
    ],
)
def test_negative_prompts_are_one_string_for_all_or_one_for_each(given: Any, negative: tuple[str, ...]) -> None:
    made = text_request(negative_prompts=given)
    assert made.negative_prompts == negative
    assert made.texts == (*negative, *PROMPTS)  # the order in which they are encoded


def test_without_guidance_there_are_no_negative_prompts() -> None:
    made = text_request(pipeline={"guidance": "none"})
    assert made.negative_prompts == ()
    assert made.texts == PROMPTS


def test_guidance_is_the_bundles_own_unless_it_is_given() -> None:
    assert request().guidance.tolist() == [3.5, 3.5, 3.5]  # of the golden manifest
    assert text_request(pipeline={"guidance_scale": 4.5}).guidance.tolist() == [4.5, 4.5, 4.5]
    assert text_request(guidance_scale=2).guidance.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("pixels", "size"),
    [
        ({}, (8, 8)),
        ({"height": 8}, (4, 8)),
        ({"width": 32}, (8, 16)),
        ({"height": 24, "width": 24}, (12, 12)),
        ({"height": np.int64(16), "width": np.int32(16)}, (8, 8)),
    ],
)
def test_a_size_is_given_in_pixels(pixels: dict[str, Any], size: tuple[int, int]) -> None:
    made = text_request(**pixels)
    assert made.size == size
    assert np.array_equal(made.noise, noise_from_seeds([0, 1, 2], (4, *size)))
    state = made.tensors(manifest(**TEXT).pipeline, 1.0, {})["state"]
    assert np.array_equal(state[0], to_patches(made.noise, 2))


def test_where_all_pictures_have_one_size_it_may_be_named() -> None:
    assert request(height=16, width=16).size == (8, 8)


def test_latents_have_the_size_that_is_asked_for() -> None:
    latents = noise_from_seeds([5, 6, 7], (4, 4, 16))
    made = text_request(latents=latents, height=8, width=32)
    assert np.array_equal(made.noise, latents)
    with pytest.raises(RequestError, match=r"shape \(3, 4, 4, 16\) where this request needs \(3, 4, 8, 8\)"):
        text_request(latents=latents)


UNGUIDED: Final = {"guidance": "none"}
UNSQUARED: Final = {"selector": None}
TEXT_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": None}, "no prompt was given; a request draws one image for each"),
    ({"prompts": []}, "no prompt was given; a request draws one image for each"),
    ({"prompts": None, "labels": [0]}, "this bundle draws images of prompts, not of labels"),
    ({"labels": []}, "this bundle draws images of prompts, not of labels"),
    ({"prompts": "a hen"}, "prompts is a list with one prompt per image, not 'a hen'"),
    ({"prompts": b"a hen"}, "prompts is a list with one prompt per image, not b'a hen'"),
    ({"prompts": 3}, "prompts is a list with one prompt per image, not 3"),
    ({"prompts": {"a hen"}}, "prompts is a list with one prompt per image, not {'a hen'}"),
    ({"prompts": ["a hen", None]}, "a prompt is text, not None"),
    ({"prompts": [b"a hen"]}, "a prompt is text, not b'a hen'"),
    ({"prompts": ["a hen"] * 9}, "9 images in one request; this bundle takes 1 to 8. Ask in parts, or build it with"),
    ({"negative_prompts": ["dark"]}, "1 negative prompts for 3 images; give one per image, or one string"),
    ({"negative_prompts": []}, "no prompt was given"),
    ({"negative_prompts": 3}, "prompts is a list with one prompt per image, not 3"),
    ({"negative_prompts": b"dark"}, "prompts is a list with one prompt per image, not b'dark'"),
    ({"negative_prompts": ["dark", "grey", 1]}, "a prompt is text, not 1"),
    ({"prompts": ["a hen", "half \ud800"]}, "is no text that can be read: at 5 it has '\\ud800', half of a character"),
    ({"negative_prompts": "\udfff"}, "is no text that can be read"),
    ({"negative_prompts": "", "pipeline": UNGUIDED}, "without guidance, which is what negative prompts are for"),
    ({"guidance_scale": 4.5, "pipeline": UNGUIDED}, "without guidance; leave guidance_scale out"),
    ({"height": 12}, "height is a multiple of 8 from 8 to 24 pixels in this bundle, not 12"),
    ({"height": 0}, "height is a multiple of 8 from 8 to 24 pixels in this bundle, not 0"),
    ({"height": 32}, "height is a multiple of 8 from 8 to 24 pixels in this bundle, not 32"),
    ({"width": 8}, "width is a multiple of 8 from 16 to 32 pixels in this bundle, not 8"),
    ({"width": 20.0}, "width is a multiple of 8 from 16 to 32 pixels in this bundle, not 20.0"),
    ({"width": "16"}, "width is a multiple of 8 from 16 to 32 pixels in this bundle, not '16'"),
    ({"height": 8, "width": True}, "width is a multiple of 8 from 16 to 32 pixels in this bundle, not True"),
    ({"height": 10, "pipeline": UNSQUARED}, "height is a multiple of 4 from 8 to 24 pixels"),  # of patches alone
]


@pytest.mark.parametrize(
    ("arguments", "message"), TEXT_REFUSED, ids=[f"{i}: {message[:50]}" for i, (_, message) in enumerate(TEXT_REFUSED)]
)
def test_what_a_bundle_of_prompts_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        text_request(**arguments)
    assert message in str(caught.value)


def test_the_size_of_patches_alone_is_enough_where_no_squares_are_ranked() -> None:
    assert text_request(height=12, pipeline=UNSQUARED).size == (6, 8)


def _embedded(num_prompts: int) -> Embedded:
    """Make embeddings (n, 2, 3) and masks (n, 2) that are told apart by their prompt."""
    embeddings = np.arange(num_prompts * 2 * 3, dtype=np.float32).reshape(num_prompts, 2, 3)
    masks = np.arange(num_prompts * 2, dtype=np.float32).reshape(num_prompts, 2)
    return Embedded(embeddings, masks, num_prompts, (), ((),) * num_prompts)


def test_prompts_are_handed_on_image_by_image_negative_ones_first() -> None:
    embedded = _embedded(6)  # three negative ones, then the prompts of three images
    tensors = by_image(embedded, 3)
    assert {name: array.shape for name, array in tensors.items()} == {
        "text_embeddings": (3, 2, 2, 3),
        "text_mask": (3, 2, 2),
    }
    for i in range(3):
        assert np.array_equal(tensors["text_embeddings"][i], embedded.embeddings[[i, 3 + i]])
        assert np.array_equal(tensors["text_mask"][i], embedded.mask[[i, 3 + i]])


def test_without_guidance_an_image_has_one_prompt() -> None:
    embedded = _embedded(2)
    tensors = by_image(embedded, 2)
    assert np.array_equal(tensors["text_embeddings"], embedded.embeddings[:, None])
    assert np.array_equal(tensors["text_mask"], embedded.mask[:, None])


# arguments and noise


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
