from __future__ import annotations

from dataclasses import replace
from typing import Final

import diffusers
import pytest
import torch

from bundles import DIGITS, RELEASED_RHYTHM, SELECTOR, Made, make_bundle, schedule_from_rhythm
from commands import MadeByCommands, make_by_commands
from hemiola_engines.build import build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_export.model import load_model
from hemiola_export.sizes import Sizes
from models import save_tiny_model, save_tiny_text_model, tiny_dit


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep PyTorch to one thread: on a busy machine, waiting for each other costs threads 100 times the tiny work."""
    torch.set_num_threads(1)


# An untrained model that is taken for a predictor of noise blows its latents up a hundredfold; one of v does not.
V_PREDICTION: Final = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The digits model with ProCache's released rhythm."""
    model = load_model(str(DIGITS))
    schedule = schedule_from_rhythm(model, model.scheduler, RELEASED_RHYTHM, num_tokens=16, deep_start=9)
    return make_bundle(tmp_path_factory.mktemp("digits"), DIGITS, {"released": schedule}, max_batch_size=4)


@pytest.fixture(scope="session")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random DiT with 4 latent channels, learned sigma and a VAE; all four forwards, DPM-Solver++ 2M."""
    folder = tmp_path_factory.mktemp("latent")
    save_tiny_model(folder / "model", scheduler=V_PREDICTION)
    model = load_model(str(folder / "model"))
    solver = diffusers.DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    schedules = {
        "mixed": schedule_from_rhythm(model, solver, "FCSDCS"),
        "fewer": schedule_from_rhythm(model, solver, "FFF"),
    }
    return make_bundle(folder, folder / "model", schedules, max_batch_size=5)


@pytest.fixture(scope="session")
def segmented(latent: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The graphs of `latent` as a bundle whose `full` is `front` followed by `deep`."""
    bundle = tmp_path_factory.mktemp("segmented") / "bundle"
    build_bundle(latent.graphs, bundle, BuildOptions("onnxruntime", 5, layout="segmented"))
    return replace(latent, bundle=bundle)


@pytest.fixture(scope="session")
def unguided(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random DiT of pixels, without guidance, Euler steps."""
    folder = tmp_path_factory.mktemp("unguided")
    transformer = tiny_dit(num_blocks=2, head_width=16, channels=1, has_learned_sigma=False)
    save_tiny_model(folder / "model", has_vae=False, transformer=transformer, scheduler=V_PREDICTION)
    model = load_model(str(folder / "model"))
    solver = diffusers.EulerDiscreteScheduler.from_config(model.scheduler.config)
    schedule = schedule_from_rhythm(model, solver, "FCFS", deep_start=1, guidance="none")
    return make_bundle(folder, folder / "model", {"short": schedule}, max_batch_size=2)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random PixArt with T5, a VAE and learned sigma, for pictures of 8 to 24 pixels in tiles of 16."""
    folder = tmp_path_factory.mktemp("text")
    save_tiny_text_model(folder / "model")
    model = load_model(str(folder / "model"))
    selector = replace(SELECTOR, score="cross_attention_entropy")
    schedules = {"mixed": schedule_from_rhythm(model, model.scheduler, "FCSDCS", selector=selector)}
    return make_bundle(folder, folder / "model", schedules, 3, Sizes((8, 8), (24, 24), 16))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeByCommands:
    """What the command line makes of a tiny model of pixels: search, export, build."""
    return make_by_commands(tmp_path_factory.mktemp("cli"))
