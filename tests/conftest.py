from __future__ import annotations

from typing import Final

import diffusers
import pytest
import torch

from bundles import DIGITS, RELEASED_RHYTHM, Made, make_bundle, schedule_from_rhythm
from hemiola_export.model import load_model
from models import save_tiny_model


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
def unguided(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random DiT of pixels, without guidance, Euler steps."""
    folder = tmp_path_factory.mktemp("unguided")
    save_tiny_model(folder / "model", has_vae=False, scheduler=V_PREDICTION)
    model = load_model(str(folder / "model"))
    solver = diffusers.EulerDiscreteScheduler.from_config(model.scheduler.config)
    schedule = schedule_from_rhythm(model, solver, "FCFS", guidance="none")
    return make_bundle(folder, folder / "model", {"short": schedule}, max_batch_size=2)
