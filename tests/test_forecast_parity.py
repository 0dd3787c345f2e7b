"""Forecasts, masks and token counts of blocks: the runtime against PyTorch, step by step and as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import diffusers
import numpy as np
import pytest
import torch

from bundles import DIGITS, SELECTOR, Made, make_bundle, schedule_from_rhythm
from hemiola_engines.build import build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_export.model import load_model
from hemiola_export.reference import compare_forwards
from hemiola_export.reference_images import PROMPTS, SEEDS, reference_requests, trajectory
from hemiola_export.sizes import Sizes
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.manifest import read_manifest
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.sampler import Sampler
from models import save_tiny_model, save_tiny_text_model

# Float32 on both sides: measured are up to 1e-6 a step and 1e-5 a trajectory; forecasts triple what a cache is off by.
STEP_BOUND: Final = 1e-5
TRAJECTORY_BOUND: Final = 1e-4
KINDS: Final = {  # of the rhythms below
    "labels": {"full", "reuse", "reuse_1", "reuse_2", "tokens", "tokens_1", "masked", "deep"},
    "prompts": {"full", "reuse_1", "reuse_2", "tokens", "tokens_1", "masked_1", "deep", "deep_1"},
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random DiT with a VAE, whose MLPs of blocks 2 and 3 have counts of their own."""
    folder = tmp_path_factory.mktemp("labels")
    save_tiny_model(
        folder / "model", scheduler=diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    )
    model = load_model(str(folder / "model"))
    schedule = schedule_from_rhythm(model, model.scheduler, "FF1sMF2DSC", num_tokens=((3, 9),))
    plain = schedule_from_rhythm(model, model.scheduler, "FSC", num_tokens=5)
    return make_bundle(folder, folder / "model", {"forecasting": schedule, "plain": plain}, 2)


@pytest.fixture(scope="module")
def segmented(labels: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same graphs as a bundle whose `full` is `front` followed by `deep`."""
    bundle = tmp_path_factory.mktemp("segmented") / "bundle"
    build_bundle(labels.graphs, bundle, BuildOptions("onnxruntime", 2, layout="segmented"))
    return replace(labels, bundle=bundle)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random PixArt for pictures of 8 to 24 pixels, with counts for cross-attention and MLP of blocks 2 and 3."""
    folder = tmp_path_factory.mktemp("prompts")
    model = load_model(str(save_tiny_text_model(folder / "model")))
    selector = replace(SELECTOR, score="cross_attention_entropy")
    schedule = schedule_from_rhythm(
        model, model.scheduler, "FF1smdF2SD", num_tokens=((1, 9), (16, 4)), selector=selector
    )
    return make_bundle(folder, folder / "model", {"forecasting": schedule}, 2, Sizes((8, 8), (24, 24)))


@pytest.mark.parametrize("fixture", ["labels", "segmented", "prompts"])
def test_every_kind_of_step_leaves_what_pytorch_leaves(fixture: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(fixture)
    found = compare_forwards(load_model(str(made.model)), open_bundle(made.bundle))
    assert found.keys() == KINDS["prompts" if fixture == "prompts" else "labels"]
    assert {kind: error for kind, error in found.items() if not error < STEP_BOUND} == {}


@pytest.mark.parametrize("fixture", ["labels", "segmented", "prompts"])
def test_trajectories_are_those_of_pytorch(fixture: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(fixture)
    parity = read_manifest(made.bundle).parity
    assert "forecasting" in parity
    assert {name: error for name, error in parity.items() if not error < TRAJECTORY_BOUND} == {}


def test_the_report_tells_orders_apart(segmented: Made) -> None:
    with Sampler.open(segmented.bundle) as sampler:
        report = sampler.generate(labels=[1], schedule="forecasting").report
    assert report.rhythm == "FF1SMF2DSC"
    chains = {
        "front": 3,
        "deep": 3 + 1,
        "reuse_1": 1,
        "tokens_1": 1,
        "masked": 1,
        "reuse_2": 1,
        "tokens": 1,
        "reuse": 1,
    }
    assert report.counts == chains | {"conditioning": 1, "vae_decoder": 1}


@torch.inference_mode()
def test_pictures_of_other_sizes_are_those_of_pytorch(prompts: Made) -> None:
    model, bundle = load_model(str(prompts.model)), open_bundle(prompts.bundle)
    schedule = bundle.schedule("forecasting")
    table = bundle.solver_table(schedule)
    height, width = 24, 8
    noise = noise_from_seeds(SEEDS, (4, height // 2, width // 2))
    requests = replace(reference_requests(model, is_guided=True), noise=torch.from_numpy(noise))
    steps = [  # the shares of tokens are those of the size that the schedule was made for
        replace(step, tokens=tuple(tuple(max(1, round(n * 48 / 64)) for n in branch) for branch in step.tokens))
        if isinstance(step.tokens, tuple)
        else step
        for step in schedule.steps
    ]
    expected = replace(trajectory(model, schedule, table), steps=steps).run(requests).numpy()
    with Sampler.open(prompts.bundle) as sampler:
        found = sampler.generate(
            prompts=list(PROMPTS), seeds=list(SEEDS), guidance_scale=2.0, height=height, width=width
        ).latents
    assert np.linalg.norm(found - expected) < TRAJECTORY_BOUND * np.linalg.norm(expected)


def test_digits_are_forecast_with_order_2_as_pytorch_does_and_better_than_reused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = load_model(str(DIGITS))
    folder: Path = tmp_path_factory.mktemp("digits")
    schedules = {
        name: schedule_from_rhythm(model, model.scheduler, "FF" + f"F{letter}{letter}" * 16)
        for name, letter in (("reused", "C"), ("forecast", "2"))
    }
    made = make_bundle(folder, DIGITS, schedules, max_batch_size=4)
    parity = read_manifest(made.bundle).parity
    assert {name: error for name, error in parity.items() if not error < TRAJECTORY_BOUND} == {}
    with Sampler.open(made.bundle) as sampler:
        drawn = {
            name: sampler.generate(labels=[1, 2, 3, 4], guidance_scale=2.0, schedule=name).latents
            for name in ("full", "reused", "forecast")
        }
    off = {name: float(np.linalg.norm(latents - drawn["full"])) for name, latents in drawn.items()}
    assert off["forecast"] < off["reused"]
