"""The runtime against diffusers' own DiTPipeline: same noise, same scheduler, final latents and pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.dit import pipeline_dit
from numpy.typing import NDArray
from torch import Tensor, nn

from bundles import Made
from hemiola_export.model import load_model
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.results import Result
from hemiola_runtime.sampler import Sampler

# Float32 on both sides, 50 steps: measured are 2e-6 … 3e-5, since matrix products round in another order.
LATENTS_BOUND = 2e-4

LABELS = [3, 7]
SEEDS = [11, 12]


class RecordingVae(nn.Module):
    """Keeps the latents that the pipeline decodes; without a VAE of its own, they are the picture."""

    def __init__(self, vae: Any | None) -> None:
        super().__init__()
        self.vae = vae
        self.config = SimpleNamespace(scaling_factor=1.0 if vae is None else vae.config.scaling_factor)
        self.device = torch.device("cpu")
        self.latents: list[Tensor] = []

    def decode(self, latents: Tensor) -> Any:
        self.latents.append(latents * self.config.scaling_factor)
        return SimpleNamespace(sample=latents) if self.vae is None else self.vae.decode(latents)


def diffusers_run(
    model: Path,
    scheduler: Any,
    num_steps: int,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run DiTPipeline on the noise of SEEDS; returns final latents and pictures (B, H, W, C) in [0, 1]."""
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(
        model / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    null = transformer.config.num_embeds_ada_norm
    forward = transformer.forward

    def with_own_null_label(x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        return forward(x, timestep=timestep, class_labels=class_labels.clamp(max=null))  # the pipeline says 1000

    transformer.forward = with_own_null_label
    vae = None
    if (model / "vae").is_dir():
        vae = diffusers.AutoencoderKL.from_pretrained(model / "vae", low_cpu_mem_usage=False)
    recording = RecordingVae(vae)
    noise = torch.from_numpy(
        noise_from_seeds(SEEDS, (transformer.config.in_channels, *(transformer.config.sample_size,) * 2))
    )
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: noise)
    pipeline = diffusers.DiTPipeline(transformer.eval(), recording, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(LABELS, guidance_scale=guidance_scale, num_inference_steps=num_steps, output_type="np").images
    return recording.latents[0].numpy(), drawn


def agrees(result: Result, latents: NDArray[np.float32], pictures: NDArray[np.float32]) -> None:
    assert np.abs(result.latents - latents).max() <= LATENTS_BOUND
    assert np.abs(result.images / 255 - pictures).max() <= LATENTS_BOUND + 0.5 / 255


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_uncached_digits_are_those_of_the_pipeline(
    digits: Made, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers.DDIMScheduler.from_pretrained(digits.model / "scheduler")
    latents, pictures = diffusers_run(digits.model, scheduler, 50, guidance_scale, monkeypatch)
    with Sampler.open(digits.bundle) as sampler:
        result = sampler.generate(labels=LABELS, seeds=SEEDS, guidance_scale=guidance_scale, schedule="full")
    assert result.images.shape == (2, 16, 16, 1)
    agrees(result, latents, pictures)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_uncached_latents_and_decoded_pictures_are_those_of_the_pipeline(
    latent: Made, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = diffusers.DDIMScheduler.from_pretrained(latent.model / "scheduler").config
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    latents, pictures = diffusers_run(latent.model, scheduler, 6, guidance_scale, monkeypatch)
    with Sampler.open(latent.bundle) as sampler:
        result = sampler.generate(labels=LABELS, seeds=SEEDS, guidance_scale=guidance_scale, schedule="full")
    assert result.images.shape == (2, 16, 16, 3)
    agrees(result, latents, pictures)


@torch.inference_mode()
def test_a_bundle_without_guidance_draws_what_the_scheduler_steps_to(unguided: Made) -> None:
    """Euler, whose input and noise are scaled; DiTPipeline steps from the scaled input, which is a fault of its own."""
    transformer = load_model(str(unguided.model)).transformer
    config = diffusers.DDIMScheduler.from_pretrained(unguided.model / "scheduler").config
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(4)
    x = torch.from_numpy(noise_from_seeds(SEEDS, (1, 8, 8))) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = transformer(scaled, timestep=t.expand(2), class_labels=torch.tensor(LABELS)).sample
        x = scheduler.step(output, t, x).prev_sample
    with Sampler.open(unguided.bundle) as sampler:
        result = sampler.generate(labels=LABELS, seeds=SEEDS, schedule="full")
    assert np.abs(result.latents - x.numpy()).max() <= LATENTS_BOUND
