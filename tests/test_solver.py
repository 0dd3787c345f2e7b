from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hemiola_export.errors import ExportError, UnsupportedSolverError
from hemiola_export.solver import config_from_identity, measure_solver, scheduler_identity
from hemiola_runtime.codec import encode, parse, write_json
from hemiola_runtime.schedule import SchedulerIdentity
from hemiola_runtime.solver_table import SolverTable
from strategies import examples

Array = NDArray[np.float64]
MakeScheduler = Callable[[], Any]

WIDTH: Final = 32  # numbers in a trajectory
STEP_COUNTS: Final = [2, 3, 5, 20, 50, 250]

# Free runs, relative to the largest number of the trajectory. A scheduler that computes in float64 is followed to
# rounding; one that casts to float32 rounds every step by 2^-24 = 6e-8, of which there are as many as steps.
EXACT: Final = 1e-10
CAST: Final = 1e-6

# What diffusers computes in the dtype of the sample, and what it casts to float32.
EXACT_SCHEDULERS: Final[dict[str, MakeScheduler]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDIM, v-prediction": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "DDIM, sample prediction": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "DDIM, trailing": lambda: diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
    "DEIS": lambda: diffusers.DEISMultistepScheduler(),
    "DEIS, v-prediction": lambda: diffusers.DEISMultistepScheduler(prediction_type="v_prediction"),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "UniPC-3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3),
    "PNDM without PRK": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
}
CAST_SCHEDULERS: Final[dict[str, MakeScheduler]] = {
    "DPM-Solver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=2),
    "DPM-Solver++ 3M": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3),
    "DPM-Solver++ 2M, Karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "DPM-Solver++ 2M, v-prediction": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "DPM-Solver++ 2M, sample prediction": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="sample"),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "Euler, Karras": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "Euler, v-prediction": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
    "flow-match Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow-match Euler, shift 3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "LMS": lambda: diffusers.LMSDiscreteScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
}
ALL_SCHEDULERS: Final = EXACT_SCHEDULERS | CAST_SCHEDULERS


def drive_scheduler(scheduler: Any, num_inference_steps: int, noise: Array, outputs: Array) -> tuple[Array, Array]:
    """Run diffusers: noise (n,), outputs (E, n). Returns E + 1 samples, and E samples as they enter the model."""
    scheduler.set_timesteps(num_inference_steps)
    sample = torch.from_numpy(noise).reshape(1, -1, 1, 1)
    samples, entering = [sample], []
    for t, output in zip(scheduler.timesteps, torch.from_numpy(outputs), strict=True):
        has_scale = hasattr(scheduler, "scale_model_input")
        entering.append(scheduler.scale_model_input(sample, t) if has_scale else sample)
        sample = scheduler.step(output.reshape(sample.shape), t, sample).prev_sample
        samples.append(sample)
    return torch.stack(samples).flatten(1).double().numpy(), torch.stack(entering).flatten(1).double().numpy()


def drive_table(table: SolverTable, noise: Array, outputs: Array) -> tuple[Array, Array]:
    """Run the table over the same inputs, from its own samples only."""
    state = np.zeros((table.state_rows, len(noise)))
    state[0] = noise
    samples, entering = [noise], []
    for matrix, scale, output in zip(table.coefficients, table.input_scale, outputs, strict=True):
        entering.append(scale * state[0])
        state = np.array(matrix) @ np.vstack([state, output])
        samples.append(state[0])
    return np.stack(samples), np.stack(entering)


def assert_follows(make: MakeScheduler, num_inference_steps: int, bound: float) -> None:
    """Run both from the same noise over the same random model outputs."""
    table = measure_solver(make(), num_inference_steps)
    generator = np.random.default_rng(num_inference_steps)
    noise = table.init_noise_sigma * generator.standard_normal(WIDTH)
    outputs = generator.standard_normal((len(table.input_scale), WIDTH))
    expected = drive_scheduler(make(), num_inference_steps, noise, outputs)
    followed = drive_table(table, noise, outputs)
    size = np.abs(expected[0]).max()
    for theirs, ours in zip(expected, followed, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * size)


@pytest.mark.parametrize("num_inference_steps", STEP_COUNTS)
@pytest.mark.parametrize("make", EXACT_SCHEDULERS.values(), ids=EXACT_SCHEDULERS)
def test_the_table_follows_a_scheduler_of_float64_to_rounding(make: MakeScheduler, num_inference_steps: int) -> None:
    assert_follows(make, num_inference_steps, EXACT)


@pytest.mark.parametrize("num_inference_steps", STEP_COUNTS)
@pytest.mark.parametrize("make", CAST_SCHEDULERS.values(), ids=CAST_SCHEDULERS)
def test_the_table_follows_a_scheduler_that_casts_to_float32_within_its_rounding(
    make: MakeScheduler, num_inference_steps: int
) -> None:
    assert_follows(make, num_inference_steps, CAST * num_inference_steps)


@pytest.mark.parametrize("num_inference_steps", [5, 20, 50, 250])
def test_the_table_follows_pndm_with_its_runge_kutta_steps(num_inference_steps: int) -> None:
    assert_follows(lambda: diffusers.PNDMScheduler(), num_inference_steps, EXACT)


@examples(15)
@given(num_inference_steps=st.integers(1, 200))
def test_ddim_is_followed_at_any_number_of_steps(num_inference_steps: int) -> None:
    assert_follows(EXACT_SCHEDULERS["DDIM"], num_inference_steps, EXACT)


@examples(15)
@given(num_inference_steps=st.integers(1, 100), order=st.integers(1, 3), use_karras_sigmas=st.booleans())
def test_dpm_solver_is_followed_at_any_number_of_steps(
    num_inference_steps: int, order: int, use_karras_sigmas: bool
) -> None:
    def make() -> Any:
        return diffusers.DPMSolverMultistepScheduler(solver_order=order, use_karras_sigmas=use_karras_sigmas)

    assert_follows(make, num_inference_steps, CAST * num_inference_steps)


def test_the_table_of_ddim_is_its_equation() -> None:
    # Song et al. 2021 (arXiv:2010.02502), equation 12 with sigma 0, a for their alpha:
    #   x' = sqrt(a') · (x - sqrt(1 - a) · e) / sqrt(a) + sqrt(1 - a') · e
    scheduler = EXACT_SCHEDULERS["DDIM"]()
    table = measure_solver(scheduler, 4)
    alphas = scheduler.alphas_cumprod.double().numpy()
    timesteps = [int(t) for t in table.scheduler.timesteps]
    assert timesteps == [750, 500, 250, 0]  # "leading": multiples of 1000 / 4
    # behind the last step stands alpha = 1, as set_alpha_to_one asks for by default
    for matrix, a, a_next in zip(table.coefficients, alphas[timesteps], [*alphas[timesteps[1:]], 1.0], strict=True):
        of_sample = np.sqrt(a_next / a)
        of_output = np.sqrt(1 - a_next) - np.sqrt(a_next * (1 - a) / a)
        # alphas_cumprod is float32 and enters 1 - alpha: 1e-6 where alpha is close to 1
        np.testing.assert_allclose(matrix, [[of_sample, of_output]], rtol=1e-5)


def test_the_table_of_flow_matching_is_its_equation() -> None:
    # Euler's step along the velocity: x' = x + (sigma' - sigma) · v
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = measure_solver(scheduler, 4)
    sigmas = scheduler.sigmas.double().numpy()
    for matrix, sigma, sigma_next in zip(table.coefficients, sigmas[:-1], sigmas[1:], strict=True):
        np.testing.assert_allclose(matrix, [[1.0, sigma_next - sigma]], rtol=1e-6)


@pytest.mark.parametrize(("spacing", "variance_of_data"), [("linspace", 0.0), ("leading", 1.0)])
def test_the_scales_of_euler_are_its_equations(spacing: str, variance_of_data: float) -> None:
    # Karras et al. 2022 (arXiv:2206.00364), Table 1: a model trained on x / sqrt(sigma² + 1) is given just that. The
    # first sample has the largest sigma, and the data's unit variance where the spacing stops short of pure noise.
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing)
    table = measure_solver(scheduler, 4)
    sigmas = scheduler.sigmas.double().numpy()[:-1]
    np.testing.assert_allclose(table.input_scale, 1 / np.sqrt(sigmas**2 + 1), rtol=1e-6)
    np.testing.assert_allclose(table.init_noise_sigma, np.sqrt(sigmas[0] ** 2 + variance_of_data), rtol=1e-6)


@pytest.mark.parametrize("name", ["DDIM", "DDIM, v-prediction", "Euler", "flow-match Euler"])
def test_a_solver_of_one_step_keeps_no_history(name: str) -> None:
    assert measure_solver(ALL_SCHEDULERS[name](), 20).state_rows == 1


@pytest.mark.parametrize("name", ["DEIS", "DPM-Solver++ 2M", "UniPC", "LMS", "Heun", "PNDM without PRK"])
def test_a_solver_of_several_steps_keeps_history(name: str) -> None:
    assert measure_solver(ALL_SCHEDULERS[name](), 20).state_rows > 1


@pytest.mark.parametrize(
    ("make", "num_evaluations"),
    [
        (EXACT_SCHEDULERS["DDIM"], 20),
        (EXACT_SCHEDULERS["PNDM without PRK"], 21),  # its second step is evaluated twice
        (lambda: diffusers.PNDMScheduler(), 29),  # 3 Runge-Kutta steps of 4 evaluations, 17 of one
        (CAST_SCHEDULERS["Heun"], 39),  # two evaluations a step, but one for the last
    ],
    ids=["DDIM", "PNDM without PRK", "PNDM", "Heun"],
)
def test_the_table_has_a_matrix_for_each_model_evaluation(make: MakeScheduler, num_evaluations: int) -> None:
    table = measure_solver(make(), 20)
    assert table.scheduler.num_inference_steps == 20
    assert len(table.coefficients) == len(table.input_scale) == len(table.scheduler.timesteps) == num_evaluations


@pytest.mark.parametrize("name", ["DDIM", "DPM-Solver++ 2M", "PNDM without PRK"])
def test_a_scheduler_is_measured_alike_again_and_after_use(name: str) -> None:
    scheduler = ALL_SCHEDULERS[name]()
    first = measure_solver(scheduler, 10)
    noise = np.ones(WIDTH)
    drive_scheduler(scheduler, 10, noise, np.ones((len(first.input_scale), WIDTH)))
    assert measure_solver(scheduler, 10) == first


def test_measuring_leaves_the_random_numbers_of_the_caller_alone() -> None:
    before = torch.get_rng_state()
    measure_solver(EXACT_SCHEDULERS["DDIM"](), 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "bound"), [("DDIM", EXACT), ("UniPC", EXACT), ("DPM-Solver++ 2M", CAST)])
def test_the_residual_is_that_of_the_schedulers_precision(name: str, bound: float) -> None:
    assert 0 <= measure_solver(ALL_SCHEDULERS[name](), 20).residual < bound


NOT_LINEAR: Final = "set clip_sample or thresholding to False"
STOCHASTIC: Final = "Compiled engines need a deterministic sampler"
REFUSED: list[tuple[str, MakeScheduler, list[str]]] = [
    ("DDIM that clips", lambda: diffusers.DDIMScheduler(), ["DDIM-20 is not linear", NOT_LINEAR]),
    (
        # what it clips is the model output itself: basis vectors pass unclipped, only the larger probe shows it
        "DDIM of samples that clips",
        lambda: diffusers.DDIMScheduler(prediction_type="sample"),
        ["DDIM-20 is not linear", NOT_LINEAR],
    ),
    (
        "DDIM that thresholds",
        lambda: diffusers.DDIMScheduler(clip_sample=False, thresholding=True),
        ["DDIM-20 is not linear", NOT_LINEAR],
    ),
    (
        "DPM-Solver++ that thresholds",
        lambda: diffusers.DPMSolverMultistepScheduler(thresholding=True),
        ["DPMSolverMultistep-20 is not linear", NOT_LINEAR],
    ),
    (
        "UniPC that thresholds",
        lambda: diffusers.UniPCMultistepScheduler(thresholding=True),
        ["UniPCMultistep-20 is not linear", NOT_LINEAR],
    ),
    ("DDPM", lambda: diffusers.DDPMScheduler(clip_sample=False), ["DDPM-20 is stochastic", STOCHASTIC]),
    (
        "Euler ancestral",
        lambda: diffusers.EulerAncestralDiscreteScheduler(),
        ["EulerAncestralDiscrete-20 is stochastic", STOCHASTIC],
    ),
    (
        "SDE-DPM-Solver++",
        lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        ["DPMSolverMultistep-20 is stochastic", STOCHASTIC],
    ),
]


@pytest.mark.parametrize(
    ("make", "parts"), [case[1:] for case in REFUSED], ids=[f"{name} is refused" for name, *_ in REFUSED]
)
def test_what_cannot_be_a_table_is_refused_with_what_to_do(make: MakeScheduler, parts: list[str]) -> None:
    with pytest.raises(UnsupportedSolverError) as caught:
        measure_solver(make(), 20)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert isinstance(caught.value, ExportError)


@pytest.mark.parametrize("num_inference_steps", [2, 3])
def test_pndm_with_runge_kutta_steps_refuses_fewer_than_four(num_inference_steps: int) -> None:
    # diffusers builds 12 PRK timesteps out of the last 4 and fails; with skip_prk_steps small counts work
    with pytest.raises(UnsupportedSolverError, match=f"PNDMScheduler cannot make {num_inference_steps} steps"):
        measure_solver(diffusers.PNDMScheduler(), num_inference_steps)


def test_a_number_of_steps_that_the_scheduler_refuses_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedSolverError, match=r"DDIMScheduler cannot make 1001 steps: .*1000"):
        measure_solver(diffusers.DDIMScheduler(clip_sample=False), 1001)


def test_the_identity_holds_the_configuration_without_diffusers_own_keys() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_end=0.03)
    identity = scheduler_identity(scheduler, 4)
    assert identity.class_name == "DDIMScheduler"
    assert identity.config["beta_end"] == 0.03
    assert identity.config["clip_sample"] is False
    assert not [key for key in identity.config if key.startswith("_")]
    assert list(identity.config) == sorted(identity.config)
    assert identity.timesteps == (750.0, 500.0, 250.0, 0.0)


@pytest.mark.parametrize("make", ALL_SCHEDULERS.values(), ids=ALL_SCHEDULERS)
def test_an_identity_survives_its_file_and_makes_the_same_scheduler_again(make: MakeScheduler, tmp_path: Path) -> None:
    scheduler = make()
    identity = scheduler_identity(scheduler, 10)
    write_json(identity, tmp_path / "identity.json")
    again = parse(SchedulerIdentity, (tmp_path / "identity.json").read_bytes(), "identity.json")
    assert again.difference(identity) == ""
    assert again.digest == identity.digest
    made = type(scheduler).from_config(config_from_identity(again))
    assert measure_solver(made, 10) == measure_solver(scheduler, 10)


def test_what_json_does_not_know_survives_in_a_configuration() -> None:
    betas = np.linspace(0.0001, 0.02, 1000)
    # diffusers' default for DPM-Solver: no clipping of lambda is -infinity
    scheduler = diffusers.DPMSolverMultistepScheduler(trained_betas=betas, lambda_min_clipped=-float("inf"))
    identity = scheduler_identity(scheduler, 4)
    assert json.loads(json.dumps(encode(identity), allow_nan=False))["config"]["trained_betas"] == betas.tolist()
    assert config_from_identity(identity)["lambda_min_clipped"] == -float("inf")
