from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bundles import RELEASED_RHYTHM, Made
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.errors import CancelledError, CapacityError, NumericError, RequestError, ScheduleError
from hemiola_runtime.manifest import FileSpec, Profile, read_manifest, write_manifest
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.program import lower
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.slot import BoundProgram

# ONNX Runtime blocks a matrix product by its size, so that an image in a larger batch is rounded in another order.
# Within one batch size every place gives the same bits.
OTHER_BATCH_SIZE_BOUND = 1e-4


@pytest.fixture(scope="module")
def sampler(latent: Made) -> Iterator[Sampler]:
    with Sampler.open(latent.bundle, max_concurrency=3) as opened:
        yield opened


def test_the_report_counts_the_forwards_that_ran(digits: Made) -> None:
    with Sampler.open(digits.bundle) as opened:
        report = opened.generate(labels=[1], seeds=[0], guidance_scale=2.0).report
    assert report.rhythm == RELEASED_RHYTHM
    assert report.counts == {"conditioning": 1, "full": 17, "reuse": 23, "tokens": 10}
    assert set(report.engine_ms) == set(report.counts)
    assert all(milliseconds > 0 for milliseconds in report.engine_ms.values())
    assert sum(report.engine_ms.values()) <= report.trajectory_ms <= report.wall_ms
    assert report.graph_bytes is None  # there are no CUDA graphs on a CPU
    assert 0 <= report.overhead < 1


@pytest.mark.parametrize("schedule", ["mixed", "fewer", "full"])
def test_a_full_step_in_two_engines_draws_what_it_draws_in_one(
    sampler: Sampler, segmented: Made, schedule: str
) -> None:
    one = sampler.generate(labels=[3, 4], seeds=7, schedule=schedule)
    with Sampler.open(segmented.bundle) as opened:
        two = opened.generate(labels=[3, 4], seeds=7, schedule=schedule)
    assert np.linalg.norm(two.latents - one.latents) <= 1e-4 * np.linalg.norm(one.latents)
    assert two.report.rhythm == one.report.rhythm
    full, deep = one.report.counts["full"], one.report.counts.get("deep", 0)
    assert (two.report.counts["front"], two.report.counts["deep"]) == (full, full + deep)
    assert "full" not in two.report.counts


def test_a_stream_tells_a_step_of_two_engines_once(segmented: Made) -> None:
    with Sampler.open(segmented.bundle) as opened:
        told = [(progress.step, progress.forward) for progress in opened.stream(labels=[1])]
    assert told == list(enumerate(["full", "reuse", "tokens", "deep", "reuse", "tokens"]))


def test_caching_changes_the_image_little_but_not_nothing(digits: Made) -> None:
    with Sampler.open(digits.bundle) as opened:
        cached = opened.generate(labels=[4], seeds=[1], guidance_scale=2.0).latents
        uncached = opened.generate(labels=[4], seeds=[1], guidance_scale=2.0, schedule="full").latents
    error = np.linalg.norm(cached - uncached) / np.linalg.norm(uncached)
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("schedule", ["mixed", "fewer", "full"])
def test_eight_threads_draw_what_one_draws(sampler: Sampler, schedule: str) -> None:
    requests = [([i % 10, (3 * i) % 10], [2 * i, 2 * i + 1], 1.0 + i / 4) for i in range(8)]

    def draw(request: tuple[list[int], list[int], float]) -> np.ndarray:
        labels, seeds, scale = request
        return sampler.generate(labels=labels, seeds=seeds, guidance_scale=scale, schedule=schedule).latents

    alone = [draw(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, requests * 2))
    for expected, found in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_a_seed_gives_one_image_at_any_place_of_a_batch(sampler: Sampler, batch_size: int) -> None:
    alone = sampler.generate(labels=[3], seeds=[5], guidance_scale=2.0).latents[0]
    drawn = []
    for place in range(batch_size):
        labels, seeds, scales = [1] * batch_size, list(range(100, 100 + batch_size)), [3.0] * batch_size
        labels[place], seeds[place], scales[place] = 3, 5, 2.0
        drawn.append(sampler.generate(labels=labels, seeds=seeds, guidance_scale=scales).latents[place])
    for found in drawn[1:]:
        np.testing.assert_array_equal(found, drawn[0])
    np.testing.assert_allclose(drawn[0], alone, rtol=0, atol=OTHER_BATCH_SIZE_BOUND * np.abs(alone).max())


def test_two_runs_with_one_seed_are_identical(latent: Made, sampler: Sampler) -> None:
    first = sampler.generate(labels=[3, 4], seeds=7)
    with Sampler.open(latent.bundle) as another:
        second = another.generate(labels=[3, 4], seeds=[7, 8])
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.latents, second.latents)


def test_nothing_of_a_request_survives_it(sampler: Sampler) -> None:
    before = sampler.generate(labels=[2], seeds=[1]).latents
    sampler.generate(labels=[9, 9, 9], seeds=50, guidance_scale=8.0, schedule="full")
    np.testing.assert_array_equal(sampler.generate(labels=[2], seeds=[1]).latents, before)


def test_passed_latents_are_what_their_seeds_would_draw(sampler: Sampler) -> None:
    shape = sampler.manifest.pipeline.model.latent_shape
    drawn = sampler.generate(labels=[1, 2], seeds=[8, 9]).latents
    passed = sampler.generate(labels=[1, 2], latents=noise_from_seeds([8, 9], shape)).latents
    np.testing.assert_array_equal(passed, drawn)


def test_labels_can_be_given_by_name(sampler: Sampler) -> None:
    by_name = sampler.generate(labels=["class 6"], seeds=[3]).latents
    np.testing.assert_array_equal(by_name, sampler.generate(labels=[6], seeds=[3]).latents)


def test_guidance_is_per_image(sampler: Sampler) -> None:
    mixed = sampler.generate(labels=[1, 1], seeds=[2, 2], guidance_scale=[1.5, 6.0]).latents
    for place, scale in enumerate([1.5, 6.0]):
        np.testing.assert_array_equal(
            sampler.generate(labels=[1, 1], seeds=[2, 2], guidance_scale=scale).latents[place], mixed[place]
        )
    assert not np.array_equal(mixed[0], mixed[1])


def test_a_stream_tells_every_step_and_ends_with_the_result(sampler: Sampler) -> None:
    steps = list(sampler.stream(labels=[1], seeds=[4]))
    assert [progress.forward for progress in steps] == ["full", "reuse", "tokens", "deep", "reuse", "tokens"]
    assert [progress.step for progress in steps] == list(range(6))
    assert {progress.num_steps for progress in steps} == {6}
    assert [progress.result is None for progress in steps] == [True] * 5 + [False]
    assert steps[-1].result is not None
    np.testing.assert_array_equal(steps[-1].result.latents, sampler.generate(labels=[1], seeds=[4]).latents)


def test_a_closed_stream_frees_its_place(latent: Made) -> None:
    with Sampler.open(latent.bundle, max_concurrency=1) as opened:
        expected = opened.generate(labels=[1], seeds=[4]).latents
        stream = opened.stream(labels=[2], seeds=[9])
        assert next(stream).step == 0
        stream.close()  # type: ignore[attr-defined]
        np.testing.assert_array_equal(opened.generate(labels=[1], seeds=[4]).latents, expected)


def test_a_request_is_cancelled_between_steps_and_leaves_no_trace(sampler: Sampler) -> None:
    expected = sampler.generate(labels=[1], seeds=[4]).latents
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError, match="after step 1 of 6"):
        sampler.generate(labels=[2], seeds=[9], cancel=cancel)
    np.testing.assert_array_equal(sampler.generate(labels=[1], seeds=[4]).latents, expected)


def test_a_request_that_could_be_cancelled_but_is_not_draws_the_same(sampler: Sampler) -> None:
    patient = sampler.generate(labels=[1], seeds=[4], cancel=threading.Event())
    straight = sampler.generate(labels=[1], seeds=[4])
    np.testing.assert_array_equal(patient.latents, straight.latents)
    np.testing.assert_array_equal(patient.images, straight.images)
    assert patient.report.counts == straight.report.counts


def _count_lowered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by a batch size with each program that is lowered from now on."""
    sizes: list[int] = []

    def count(manifest: Any, schedule: Any, table: Any, batch_size: int, size: Any) -> Any:
        sizes.append(batch_size)
        return lower(manifest, schedule, table, batch_size, size)

    monkeypatch.setattr("hemiola_runtime.sampler.lower", count)
    return sizes


def test_what_was_prepared_is_there_for_every_later_request(latent: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sampler.open(latent.bundle, max_concurrency=2) as opened:
        lowered = _count_lowered(monkeypatch)
        opened.prepare([1, 3])
        assert lowered == [1, 3] * 2  # in each of two places
        opened.prepare([3, 1], schedules=["mixed"])  # which is the default
        streams = [opened.stream(labels=[i]) for i in range(2)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
        opened.generate(labels=[1, 2, 3])
        assert len(lowered) == 4
        opened.prepare([1], schedules=["fewer", "full"])
        assert lowered[4:] == [1] * 4
        opened.generate(labels=[1], schedule="full")
        assert len(lowered) == 8
        opened.generate(labels=[1, 2])  # was not prepared
        assert lowered[8:] == [2]


def test_preparing_changes_nothing_of_what_is_drawn(latent: Made, sampler: Sampler) -> None:
    with Sampler.open(latent.bundle) as opened:
        opened.prepare([1, 2], schedules=["full", "mixed"])
        drawn = opened.generate(labels=[6], seeds=[2], schedule="full").latents
    np.testing.assert_array_equal(drawn, sampler.generate(labels=[6], seeds=[2], schedule="full").latents)


@pytest.mark.parametrize("size", [0, -1, 6])
def test_a_batch_size_that_the_bundle_does_not_take_is_not_prepared(
    sampler: Sampler, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = _count_lowered(monkeypatch)
    with pytest.raises(RequestError, match=f"this bundle takes 1 to 5 images, not {size}"):
        sampler.prepare([1, size])
    assert lowered == []


def test_a_schedule_that_the_bundle_does_not_have_is_not_prepared(sampler: Sampler) -> None:
    with pytest.raises(ScheduleError, match="no schedule 'slow'; it has mixed, fewer, full"):
        sampler.prepare([1], schedules=["mixed", "slow"])


def test_a_closed_sampler_prepares_nothing(latent: Made) -> None:
    opened = Sampler.open(latent.bundle)
    opened.close()
    with pytest.raises(RequestError, match="closed"):
        opened.prepare([1])
    with pytest.raises(RequestError, match="closed"):
        opened.prepare([1], schedules=["full"])


def test_a_refused_request_costs_no_place(latent: Made) -> None:
    with Sampler.open(latent.bundle, max_concurrency=1) as opened:
        for _ in range(3):
            with pytest.raises(RequestError, match="this bundle takes 1 to 5"):
                opened.generate(labels=[0] * 6)
        assert opened.generate(labels=[0]).report.batch_size == 1


def test_latents_that_overflow_are_told_with_the_first_tensor_that_did(sampler: Sampler) -> None:
    expected = sampler.generate(labels=[1], seeds=[4]).latents
    huge = np.full((1, *sampler.manifest.pipeline.model.latent_shape), 3e38, dtype=np.float32)
    with pytest.raises(NumericError) as caught:
        sampler.generate(labels=[0], latents=huge)
    assert "hold NaN or infinity under the schedule mixed" in str(caught.value)
    assert "The first to hold any was the tensor next_state of `full` at step 0" in str(caught.value)
    np.testing.assert_array_equal(sampler.generate(labels=[1], seeds=[4]).latents, expected)


def test_images_that_overflow_behind_finite_latents_are_told(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BoundProgram.read_results

    def spoilt(self: BoundProgram) -> dict[str, np.ndarray]:
        results = whole(self)
        results["images"][..., 0] = np.inf
        return results

    monkeypatch.setattr(BoundProgram, "read_results", spoilt)
    with pytest.raises(NumericError, match=r"the images of seeds \[4\] hold NaN or infinity"):
        sampler.generate(labels=[1], seeds=[4])


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("streams", [False, True])
def test_the_step_at_which_numbers_overflowed_is_told(latent: Made, tmp_path: Path, step: int, streams: bool) -> None:
    bundle = Path(shutil.copytree(latent.bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    with Sampler.open(bundle) as opened:
        file = manifest.solver_file(opened.schedules["mixed"].scheduler)
    table = json.loads((bundle / file).read_text())
    table["coefficients"][step] = [[3e38] * len(row) for row in table["coefficients"][step]]
    (bundle / file).write_text(json.dumps(table))
    data = (bundle / file).read_bytes()
    write_manifest(replace(manifest, files=manifest.files | {file: FileSpec(sha256_of(data), len(data))}), bundle)
    forward = ["full", "reuse", "tokens", "deep", "reuse", "tokens"][step]
    with Sampler.open(bundle) as opened, pytest.raises(NumericError) as caught:  # noqa: PT012
        if streams:
            list(opened.stream(labels=[0], seeds=[17]))
        else:
            opened.generate(labels=[0], seeds=[17])
    assert "the latents of seeds [17] hold NaN or infinity under the schedule mixed" in str(caught.value)
    assert f"The first to hold any was the tensor next_state of `{forward}` at step {step}" in str(caught.value)


def test_an_unknown_schedule_is_refused_with_the_known_ones(sampler: Sampler) -> None:
    with pytest.raises(ScheduleError, match="mixed, fewer, full"):
        sampler.generate(labels=[0], schedule="slow")


def test_a_schedule_of_sizes_that_no_engine_was_built_for_is_refused_when_opened(latent: Made, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(latent.bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    tuned = replace(manifest.engines["tokens"], profiles=(Profile({"B": (1, 1, 5), "K": (1, 2, 3)}),))
    write_manifest(replace(manifest, engines=manifest.engines | {"tokens": tuned}), bundle)
    with pytest.raises(ScheduleError, match=r"`tokens` with B = 5, K = 4, but the engine was built for B = 1 … 5, K"):
        Sampler.open(bundle)


def test_a_closed_sampler_refuses_requests(latent: Made) -> None:
    opened = Sampler.open(latent.bundle)
    opened.close()
    opened.close()
    with pytest.raises(RequestError, match="closed"):
        opened.generate(labels=[0])


def test_a_stream_that_begins_after_the_sampler_was_closed_is_refused(latent: Made) -> None:
    opened = Sampler.open(latent.bundle)
    stream = opened.stream(labels=[0])
    opened.close()
    with pytest.raises(RequestError, match="closed"):
        next(stream)


def test_a_bundle_without_guidance_refuses_a_scale(unguided: Made) -> None:
    with Sampler.open(unguided.bundle) as opened:
        assert opened.generate(labels=[0]).report.rhythm == "FCFS"
        with pytest.raises(RequestError, match="without guidance"):
            opened.generate(labels=[0], guidance_scale=2.0)


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_loaded(
    latent: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hemiola_runtime.backends.onnxruntime.available_host_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"1\.0 kB are free"):
        Sampler.open(latent.bundle)
