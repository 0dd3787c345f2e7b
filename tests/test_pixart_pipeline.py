"""The runtime against diffusers' own PixArtAlphaPipeline: same noise, same scheduler, final latents and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from bundles import Made, make_bundle, schedule_from_rhythm
from hemiola_export.model import load_model
from hemiola_export.sizes import Sizes
from hemiola_runtime.graph_set import read_graph_set
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.sampler import Sampler
from models import LATENT_CHANNELS, TEXT_TOKENS, save_tiny_text_model

# Float32 on both sides, 20 steps: measured are up to 2e-5, since matrix products round in another order.
LATENTS_BOUND: Final = 2e-4
NUM_STEPS: Final = 20
SHAPES: Final = Path(__file__).parents[1] / "examples" / "shapes"

PROMPTS: Final = ["a red circle left of a green square", "triangle"]  # cut to 8 tokens, and filled up with padding
SEEDS: Final = [11, 12]


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random PixArt with a VAE, DPM-Solver++ 2M in 20 steps, for pictures of 8 to 24 pixels decoded at once."""
    folder = tmp_path_factory.mktemp("uncached")
    model = load_model(str(save_tiny_text_model(folder / "model")))
    schedule = schedule_from_rhythm(model, model.scheduler, "F" * NUM_STEPS)
    return make_bundle(folder, folder / "model", {"uncached": schedule}, 2, Sizes((8, 8), (24, 24)))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The trained model of pixels, DPM-Solver++ 2M in 20 steps."""
    model = load_model(str(SHAPES))
    schedule = schedule_from_rhythm(model, model.scheduler, "F" * NUM_STEPS)
    return make_bundle(tmp_path_factory.mktemp("shapes"), SHAPES, {"uncached": schedule}, 2)


def pipeline_of(model: Path) -> Any:
    """Put diffusers' pipeline together from the parts of a model folder."""
    vae = None
    if (model / "vae").is_dir():
        vae = diffusers.AutoencoderKL.from_pretrained(model / "vae", low_cpu_mem_usage=False).eval()
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(
        model / "transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(model / "tokenizer"),
        text_encoder=transformers.T5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32).eval(),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler.from_pretrained(model / "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_latents(
    pipeline: Any,
    noise: NDArray[np.float32],
    *,
    guidance_scale: float,
    num_text_tokens: int = TEXT_TOKENS,
    prompts: list[str] = PROMPTS,
    negative_prompts: list[str] | None = None,
) -> NDArray[np.float32]:
    """Run the pipeline up to the final latents (B, C, H, W)."""
    found = pipeline(
        prompts,
        negative_prompt=[""] * len(prompts) if negative_prompts is None else negative_prompts,
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance_scale,
        height=noise.shape[2] * pipeline.vae_scale_factor,
        width=noise.shape[3] * pipeline.vae_scale_factor,
        latents=torch.from_numpy(noise),
        output_type="latent",
        clean_caption=False,
        use_resolution_binning=False,
        max_sequence_length=num_text_tokens,
    ).images
    latents: NDArray[np.float32] = found.numpy()
    return latents


def pictures_of(pipeline: Any, latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Decode as the pipeline does: (B, H, W, C) in [0, 1]."""
    with torch.inference_mode():
        scaled = torch.from_numpy(latents) / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
    pictures: NDArray[np.float32] = pipeline.image_processor.postprocess(decoded, output_type="np")
    return pictures


@pytest.mark.parametrize("negative_prompts", [None, ["a blue circle", ""]], ids=["no negatives", "negatives"])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.1, 4.5])
def test_latents_and_pictures_are_those_of_the_pipeline(
    uncached: Made, guidance_scale: float, negative_prompts: list[str] | None
) -> None:
    pipeline = pipeline_of(uncached.model)
    noise = noise_from_seeds(SEEDS, (LATENT_CHANNELS, 8, 8))
    latents = diffusers_latents(pipeline, noise, guidance_scale=guidance_scale, negative_prompts=negative_prompts)
    with Sampler.open(uncached.bundle) as sampler:
        result = sampler.generate(
            prompts=PROMPTS, negative_prompts=negative_prompts, seeds=SEEDS, guidance_scale=guidance_scale
        )
    assert np.abs(result.latents - latents).max() <= LATENTS_BOUND
    assert np.abs(result.images / 255 - pictures_of(pipeline, latents)).max() <= LATENTS_BOUND + 0.5 / 255


@pytest.mark.parametrize("size", [(8, 8), (8, 24), (24, 16), (24, 24)], ids=lambda size: f"{size[0]}×{size[1]}")
def test_pictures_of_other_sizes_are_those_of_the_pipeline(uncached: Made, size: tuple[int, int]) -> None:
    pipeline = pipeline_of(uncached.model)
    noise = noise_from_seeds(SEEDS, (LATENT_CHANNELS, size[0] // 2, size[1] // 2))
    latents = diffusers_latents(pipeline, noise, guidance_scale=4.5)
    with Sampler.open(uncached.bundle) as sampler:
        result = sampler.generate(prompts=PROMPTS, seeds=SEEDS, height=size[0], width=size[1])  # 4.5 is the default
    assert result.images.shape == (2, *size, 3)
    assert np.abs(result.latents - latents).max() <= LATENTS_BOUND
    assert np.abs(result.images / 255 - pictures_of(pipeline, latents)).max() <= LATENTS_BOUND + 0.5 / 255


@pytest.mark.parametrize("prompt", ["", "a", "A Red CIRCLE ", "nothing the model knows", "of " * 30])
def test_any_prompt_is_read_as_the_pipeline_reads_it(uncached: Made, prompt: str) -> None:
    noise = noise_from_seeds(SEEDS[:1], (LATENT_CHANNELS, 8, 8))
    latents = diffusers_latents(pipeline_of(uncached.model), noise, guidance_scale=4.5, prompts=[prompt])
    with Sampler.open(uncached.bundle) as sampler:
        result = sampler.generate(prompts=[prompt], seeds=SEEDS[:1])
    assert np.abs(result.latents - latents).max() <= LATENTS_BOUND


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_the_trained_shapes_are_those_of_the_pipeline(shapes: Made, guidance_scale: float) -> None:
    model = load_model(str(SHAPES))
    assert model.text is not None
    prompts = ["a red circle left of a blue square", "a green triangle"]
    noise = noise_from_seeds(SEEDS, model.family.latent_shape)
    latents = diffusers_latents(
        pipeline_of(SHAPES),
        noise,
        guidance_scale=guidance_scale,
        num_text_tokens=model.text.tokenizer.num_tokens,
        prompts=prompts,
    )
    with Sampler.open(shapes.bundle) as sampler:
        result = sampler.generate(prompts=prompts, seeds=SEEDS, guidance_scale=guidance_scale)
    assert np.abs(result.latents - latents).max() <= LATENTS_BOUND


def test_what_is_computed_once_per_request_shares_no_weight_with_the_steps(text: Made) -> None:
    graphs = read_graph_set(text.graphs).precisions["fp32"].graphs

    def places(name: str) -> set[tuple[int, int]]:
        return {(weight.offset, weight.num_bytes) for weight in graphs[name].weights}

    once = places("text_encoder") | places("conditioning")
    for name in ("full", "deep", "tokens", "reuse", "front"):
        assert not once & places(name), name
    # keys and values of cross-attention in 4 blocks of width 48
    matrices = [size for _, size in places("conditioning") - places("text_encoder") if size == 4 * 48 * 48]
    assert len(matrices) >= 2 * 4
