"""The sampler on a bundle that draws prompts, at several sizes of pictures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bundles import Made
from hemiola_export.components import VaeDecoder
from hemiola_export.model import load_model
from hemiola_runtime.components import Component
from hemiola_runtime.errors import CancelledError, CapacityError, NumericError, RequestError
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.report import TextReport
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.tiles import decode_in_tiles

FORWARDS: Final = ["full", "reuse", "tokens", "deep", "reuse", "tokens"]
LONG: Final = "a red circle left of a green square"  # 8 words and the end, where 8 tokens are read
SIZES: Final = [(8, 8), (8, 24), (16, 16), (24, 8), (24, 24)]  # of which those with a side of 24 are decoded in tiles
HALF_A_GREY_LEVEL: Final = 0.5 / 255 + 1e-6
# ONNX Runtime blocks a matrix product by its size: see test_sampler.py.
OTHER_BATCH_SIZE_BOUND: Final = 1e-4

A: Final[dict[str, Any]] = {"prompts": ["a red circle"], "seeds": [5]}
B: Final[dict[str, Any]] = {
    "prompts": [LONG, "a blue triangle", ""],
    "negative_prompts": ["green", "a square below", "red"],
    "seeds": 40,
    "guidance_scale": [2.0, 8.0, 5.0],
    "height": 24,
    "width": 24,
    "schedule": "full",
}


@pytest.fixture(scope="module")
def sampler(text: Made) -> Iterator[Sampler]:
    with Sampler.open(text.bundle, max_concurrency=3) as opened:
        yield opened


@pytest.fixture
def fresh(text: Made) -> Iterator[Sampler]:
    """A sampler that has seen no prompt, with room for one request."""
    with Sampler.open(text.bundle) as opened:
        yield opened


def assert_equal(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.images, expected.images)


# prompts


def test_the_report_counts_forwards_and_prompts(fresh: Sampler) -> None:
    report = fresh.generate(**A).report
    assert report.rhythm == "FCSDCS"
    assert report.counts == {"conditioning": 1, "full": 1, "reuse": 2, "tokens": 2, "deep": 1, "vae_decoder": 1}
    assert report.text == TextReport(num_kept=0, num_encoded=2, truncated={})  # the prompt, and the empty one


def test_a_prompt_is_encoded_once(fresh: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Component.run

    def counted(self: Component, size: tuple[int, int], **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        runs.append(sorted(inputs))
        return run(self, size, **inputs)

    monkeypatch.setattr(Component, "run", counted)
    first = fresh.generate(**A)
    again = fresh.generate(**A)
    assert again.report.text == TextReport(num_kept=2, num_encoded=0, truncated={})
    assert_equal(again, first)
    both = fresh.generate(prompts=["a red circle", "a square"], negative_prompts="a square")
    assert both.report.text == TextReport(num_kept=3, num_encoded=1, truncated={})
    assert runs == [["text_mask", "token_ids"]] * 3


def test_a_prompt_that_is_too_long_is_cut_and_reported(fresh: Sampler) -> None:
    cut = fresh.generate(prompts=[LONG, "a square"], negative_prompts=["", f"{LONG} above"])
    # Of the two, the same is read.
    assert cut.report.text == TextReport(num_kept=1, num_encoded=3, truncated={LONG: 9, f"{LONG} above": 10})
    read = " ".join(LONG.split()[:-1])
    fits = fresh.generate(prompts=[read, "a square"], negative_prompts=["", read])
    assert fits.report.text == TextReport(num_kept=4, num_encoded=0, truncated={})
    assert_equal(fits, cut)


def test_without_a_negative_prompt_guidance_leads_away_from_the_empty_one(sampler: Sampler) -> None:
    default = sampler.generate(prompts=["a red circle", "a square"])
    assert_equal(sampler.generate(prompts=["a red circle", "a square"], negative_prompts=""), default)
    assert_equal(sampler.generate(prompts=["a red circle", "a square"], negative_prompts=["", ""]), default)
    other = sampler.generate(prompts=["a red circle", "a square"], negative_prompts=["", "green"])
    np.testing.assert_array_equal(other.latents[0], default.latents[0])
    assert not np.array_equal(other.latents[1], default.latents[1])


def test_guidance_leads_nowhere_where_both_prompts_are_one(sampler: Sampler) -> None:
    weak, strong = (sampler.generate(prompts=[""], guidance_scale=scale) for scale in (1.0, 9.0))
    assert_equal(strong, weak)


def test_guidance_of_0_draws_the_negative_prompt(sampler: Sampler) -> None:
    """Under the uncached schedule: elsewhere both prompts have a say in which tokens are computed."""
    away = sampler.generate(prompts=["a cat"], negative_prompts=["a red circle"], guidance_scale=0, schedule="full")
    towards = sampler.generate(prompts=["a red circle"], guidance_scale=1, schedule="full")
    np.testing.assert_allclose(away.latents, towards.latents, rtol=0, atol=1e-4)
    blind = sampler.generate(prompts=["a square"], negative_prompts="a red circle", guidance_scale=0, schedule="full")
    assert_equal(blind, away)


def test_the_default_scale_of_guidance_is_that_of_diffusers_pipeline(sampler: Sampler) -> None:
    assert_equal(sampler.generate(**A), sampler.generate(**A, guidance_scale=4.5))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_prompt_gives_one_image_at_any_place_of_a_batch(sampler: Sampler, batch_size: int) -> None:
    alone = sampler.generate(prompts=["a red circle"], negative_prompts="green", seeds=[5]).latents[0]
    drawn = []
    for place in range(batch_size):
        prompts, negatives = ["a blue square"] * batch_size, ["a circle"] * batch_size
        seeds = list(range(100, 100 + batch_size))
        prompts[place], negatives[place], seeds[place] = "a red circle", "green", 5
        drawn.append(sampler.generate(prompts=prompts, negative_prompts=negatives, seeds=seeds).latents[place])
    for found in drawn[1:]:
        np.testing.assert_array_equal(found, drawn[0])
    np.testing.assert_allclose(drawn[0], alone, rtol=0, atol=OTHER_BATCH_SIZE_BOUND * np.abs(alone).max())


def test_an_encoder_that_overflows_is_told_and_what_it_wrote_is_not_kept(
    fresh: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Component.run

    def spoilt(self: Component, size: tuple[int, int], **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {name: np.full_like(values, np.nan) for name, values in run(self, size, **inputs).items()}

    with monkeypatch.context() as patch:
        patch.setattr(Component, "run", spoilt)
        with pytest.raises(NumericError, match="the text encoder wrote NaN or infinity for the prompt ''"):
            fresh.generate(**A)
    assert fresh.generate(**A).report.text == TextReport(num_kept=0, num_encoded=2, truncated={})


# many requests


def test_eight_threads_draw_what_one_draws(text: Made, sampler: Sampler) -> None:
    prompts = ["a red circle", "", LONG, "a blue triangle above a square"]
    requests: list[dict[str, Any]] = [
        {
            "prompts": [prompts[i % 4], prompts[3 * i % 4]],
            "negative_prompts": prompts[i // 2],
            "seeds": 2 * i,
            "height": SIZES[i % 5][0],
            "width": SIZES[i % 5][1],
            "schedule": ["mixed", "full"][i % 2],
        }
        for i in range(8)
    ]
    alone = [sampler.generate(**request) for request in requests]
    with Sampler.open(text.bundle, max_concurrency=3) as busy, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: busy.generate(**request), requests * 2))
    for found, expected in zip(together, alone * 2, strict=True):
        assert_equal(found, expected)
    encoded = [found.report.text.num_encoded for found in together if found.report.text is not None]
    assert sum(encoded) == len(prompts)  # each once, whichever request came first


def test_nothing_of_a_request_survives_it(fresh: Sampler) -> None:
    before = fresh.generate(**A)
    fresh.generate(**B)
    assert_equal(fresh.generate(**A), before)


def test_what_was_asked_before_makes_no_difference(fresh: Sampler, sampler: Sampler) -> None:
    for request in (A, B, A, B):
        sampler.generate(**request)
    assert_equal(fresh.generate(**B), sampler.generate(**B))


def test_a_stream_tells_every_step_and_ends_with_the_result(sampler: Sampler) -> None:
    steps = list(sampler.stream(**A, height=24, width=16))
    assert [(progress.step, progress.forward) for progress in steps] == list(enumerate(FORWARDS))
    assert [progress.result is None for progress in steps] == [True] * 5 + [False]
    assert steps[-1].result is not None
    assert_equal(steps[-1].result, sampler.generate(**A, height=24, width=16))


def test_a_request_is_cancelled_between_steps_and_leaves_no_trace(fresh: Sampler) -> None:
    expected = fresh.generate(**A, height=24)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError, match="after step 1 of 6"):
        fresh.generate(**B, cancel=cancel)
    assert_equal(fresh.generate(**A, height=24), expected)


# sizes


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_size_has_its_own_pictures(sampler: Sampler, fresh: Sampler, height: int, width: int) -> None:
    drawn = sampler.generate(**A, height=height, width=width)
    assert drawn.images.shape == (1, height, width, 3)
    assert drawn.latents.shape == (1, 4, height // 2, width // 2)
    sampler.generate(**B)
    assert_equal(sampler.generate(**A, height=height, width=width), drawn)
    assert_equal(fresh.generate(**A, height=height, width=width), drawn)


def test_the_default_size_is_that_of_the_model(sampler: Sampler) -> None:
    assert_equal(sampler.generate(**A), sampler.generate(**A, height=16, width=16))
    assert_equal(sampler.generate(**A, height=24), sampler.generate(**A, height=24, width=16))


def test_passed_latents_are_what_their_seeds_would_draw(sampler: Sampler) -> None:
    drawn = sampler.generate(**A, height=8, width=24)
    noise = noise_from_seeds([5], (4, 4, 12))
    assert_equal(sampler.generate(prompts=A["prompts"], latents=noise, height=8, width=24), drawn)


@pytest.fixture(scope="module")
def decoder(text: Made) -> VaeDecoder:
    return VaeDecoder(load_model(str(text.model)).vae, patch_size=2, size=None)


def decoded(decoder: VaeDecoder, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(decoder.decode(torch.from_numpy(np.ascontiguousarray(latents))))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pictures_are_decoded_as_pytorch_decodes_them_whole_or_in_tiles(
    sampler: Sampler, decoder: VaeDecoder, height: int, width: int
) -> None:
    drawn = sampler.generate(prompts=["a red circle", "a square"], height=height, width=width)
    tile = min(height // 2, 8), min(width // 2, 8)  # of 16 pixels
    expected = decode_in_tiles(drawn.latents, tile, (height, width, 3), lambda part: decoded(decoder, part))
    np.testing.assert_allclose(drawn.images / 255, expected, rtol=0, atol=HALF_A_GREY_LEVEL)
    assert (drawn.report.counts.get("vae_decoder", 0) == 0) is (24 in (height, width))


def test_tiles_that_overflow_behind_finite_latents_are_told(fresh: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Component.run

    def spoilt(self: Component, size: tuple[int, int], **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {
            name: np.full_like(values, np.nan) if name == "images" else values
            for name, values in run(self, size, **inputs).items()
        }

    monkeypatch.setattr(Component, "run", spoilt)
    with pytest.raises(NumericError, match="`vae_decoder` wrote NaN or infinity for a tile"):
        fresh.generate(**A, height=24)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 16), (24, 24)])
def test_tiles_look_like_the_whole(sampler: Sampler, decoder: VaeDecoder, height: int, width: int) -> None:
    """Norms and attention of a VAE see all of a picture, so that they are not equal: 0.02 on average."""
    drawn = sampler.generate(prompts=["a red circle", "a square"], height=height, width=width)
    whole = decoded(decoder, drawn.latents)
    assert np.abs(drawn.images / 255 - whole).mean() < 0.15 * whole.std()


# memory


def test_the_memory_plan_counts_the_text_encoder_and_the_decoder_of_tiles(
    sampler: Sampler, latent: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 tokens: ids and mask in 256 bytes each, 8 × 48 floats; of a tile: 8 × 8 × 4 latents, 16 × 16 × 3 pixels."""
    plan = sampler.memory_plan
    assert plan.components_bytes == 256 + 256 + 4 * 8 * 48 + 4 * 8 * 8 * 4 + 4 * 16 * 16 * 3
    assert plan.total_bytes == plan.weights_bytes + plan.components_bytes + 3 * (
        plan.workspace_bytes + plan.activation_bytes
    )
    assert "6.1 kB text and tiles" in str(plan)
    with Sampler.open(latent.bundle) as of_labels:
        assert of_labels.memory_plan.components_bytes == 0
        assert "text" not in str(of_labels.memory_plan)


def test_a_plan_that_does_not_fit_for_its_text_encoder_is_refused(
    text: Made, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sampler.memory_plan.total_bytes
    available = iter([needed, needed - sampler.memory_plan.components_bytes])
    monkeypatch.setattr("hemiola_runtime.backends.onnxruntime.available_host_bytes", lambda: next(available))
    Sampler.open(text.bundle, max_concurrency=3).close()
    with pytest.raises(CapacityError, match=r"6\.1 kB text and tiles"):
        Sampler.open(text.bundle, max_concurrency=3)


# what is refused


REFUSED: Final[list[tuple[dict[str, Any], str]]] = [
    ({}, "no prompt was given; a request draws one image for each"),
    ({"prompts": []}, "no prompt was given"),
    ({"prompts": "a cat"}, "prompts is a list with one prompt per image, not 'a cat'"),
    ({"prompts": ["a cat", 3]}, "a prompt is text, not 3"),
    ({"prompts": [None]}, "a prompt is text, not None"),
    ({"prompts": ["a \ud800"]}, "half of a character"),
    ({"prompts": ["a"] * 4}, "4 images in one request; this bundle takes 1 to 3"),
    ({"labels": [1]}, "this bundle draws images of prompts, not of labels"),
    ({"labels": [1], "prompts": ["a cat"]}, "this bundle draws images of prompts, not of labels"),
    ({"prompts": ["a cat"], "negative_prompts": ["a", "b"]}, "2 negative prompts for 1 images; give one per image, or"),
    ({"prompts": ["a cat"], "negative_prompts": [3]}, "a prompt is text, not 3"),
    ({"prompts": ["a cat"], "negative_prompts": 3}, "prompts is a list with one prompt per image, not 3"),
    ({"prompts": ["a cat"], "height": 12}, "height is a multiple of 8 from 8 to 24 pixels in this bundle, not 12"),
    ({"prompts": ["a cat"], "width": 32}, "width is a multiple of 8 from 8 to 24 pixels in this bundle, not 32"),
    ({"prompts": ["a cat"], "width": 0}, "width is a multiple of 8 from 8 to 24 pixels in this bundle, not 0"),
    ({"prompts": ["a cat"], "height": 16.0}, "height is a multiple of 8 from 8 to 24 pixels in this bundle, not 16.0"),
    ({"prompts": ["a cat"], "height": True}, "height is a multiple of 8 from 8 to 24 pixels in this bundle, not True"),
    (
        {"prompts": ["a cat"], "latents": np.zeros((1, 4, 8, 8), np.float32), "height": 24},
        r"latents have shape \(1, 4, 8, 8\) where this request needs \(1, 4, 12, 8\)",
    ),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED)
def test_a_request_that_the_bundle_cannot_do_is_refused(
    sampler: Sampler, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        sampler.generate(**request_)


def test_a_refused_request_costs_no_place(fresh: Sampler) -> None:
    for request, _ in REFUSED:
        with pytest.raises(RequestError):
            fresh.generate(**request)
    assert fresh.generate(**A).report.batch_size == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": ["a cat"]}, "this bundle draws images of labels, not of prompts"),
        ({"labels": [1], "prompts": ["a cat"]}, "this bundle draws images of labels, not of prompts"),
        ({"labels": [1], "negative_prompts": "a cat"}, "this bundle draws images of labels, not of prompts"),
        ({"labels": [1], "height": 32}, "height is 16 pixels in this bundle, not 32; export with --min-size and"),
        ({"labels": [1], "width": 8}, "width is 16 pixels in this bundle, not 8; export with --min-size and"),
    ],
)
def test_a_bundle_of_labels_refuses_prompts_and_other_sizes(
    latent: Made, request_: dict[str, Any], message: str
) -> None:
    with Sampler.open(latent.bundle) as of_labels, pytest.raises(RequestError, match=message):
        of_labels.generate(**request_)


def test_a_bundle_of_labels_takes_its_own_size(latent: Made) -> None:
    with Sampler.open(latent.bundle) as of_labels:
        assert_equal(of_labels.generate(labels=[1], height=16, width=16), of_labels.generate(labels=[1]))


def test_a_closed_sampler_refuses_prompts(text: Made) -> None:
    opened = Sampler.open(text.bundle)
    opened.close()
    opened.close()
    with pytest.raises(RequestError, match="closed"):
        opened.generate(**A)
