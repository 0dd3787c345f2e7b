from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hemiola_export.families import Family
from hemiola_export.model import Model
from hemiola_export.trajectory import Requests, Trajectory
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.schedule import FULL, RESIDUAL, REUSE, Step
from hemiola_search import calibration as module
from hemiola_search.calibration import MAX_LAG, Calibration, calibrate, images_to_calibrate
from hemiola_search.problem import Problem
from hemiola_search.tasks import Subjects, draw_task
from labs import load_tiny, load_tiny_text, tiny_problem

Floats = NDArray[np.float64]
NUM_STEPS: Final = 5
SUBJECTS: Final = Subjects(("a red circle", "a blue square", "green triangle left of red"))


@dataclass
class Case:
    """A model with the images that it is calibrated on."""

    model: Model
    problem: Problem
    requests: Requests

    def calibrate(self, stride: int = 2, on_step: Callable[[], None] = lambda: None) -> Calibration:
        return calibrate(
            self.model.family,
            self.problem.table(self.problem.num_inference_steps),
            self.requests,
            is_guided=self.problem.guidance == "classifier_free",
            pixels_per_latent=self.model.pixels_per_latent,
            stride=stride,
            on_step=on_step,
        )

    def drawn(self, *steps: Step) -> torch.Tensor:
        """Draw the final latents of a schedule."""
        problem = self.problem
        trajectory = Trajectory(
            self.model.family,
            problem.table(problem.num_inference_steps),
            steps,
            problem.guidance == "classifier_free",
            pixels_per_latent=self.model.pixels_per_latent,
        )
        return trajectory.run(self.requests)


def case_of(model: Model, **options: Any) -> Case:
    problem = tiny_problem(model, num_steps=options.pop("num_steps", NUM_STEPS), **options)
    return Case(model, problem, draw_task(model, problem, SUBJECTS, 3, 2).requests)


@pytest.fixture(scope="module", params=["dit", "unguided", "pixart", "two-step solver"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("calibration") / "model"
    if request.param == "pixart":
        return case_of(load_tiny_text(folder))
    model = load_tiny(folder)
    if request.param == "two-step solver":
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(model.scheduler.config)
        return case_of(model, scheduler=scheduler)
    return case_of(model, guidance_scale=0.0 if request.param == "unguided" else 3.0)


@pytest.fixture(scope="module")
def measured(case: Case) -> Calibration:
    return case.calibrate()


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(load_tiny(tmp_path_factory.mktemp("calibration") / "model"))


def _norms(case: Case) -> Floats:
    """Return the norm of the true output of every step: what a solver that returns it as the sample gives."""
    problem = case.problem
    table = problem.table(problem.num_inference_steps)
    norms = []
    trajectory = Trajectory(case.model.family, table, (FULL,) * NUM_STEPS, problem.guidance == "classifier_free")
    for moment in trajectory.walk(case.requests):
        # next = c_0 · x + … + c_out · output, of the newest row
        state, coefficients = moment.before["state"], moment.before["coefficients"][0]
        rest = (coefficients[:-1, None, None, None] * state).sum(dim=0)
        output = (moment.after["next_state"][0] - rest) / coefficients[-1]
        norms.append(float(output.double().norm()))
    return np.array(norms)


# the outputs


@pytest.mark.parametrize("products", ["outputs", "residual_outputs"])
def test_products_with_a_steps_own_cache_are_those_of_the_true_output(
    case: Case, measured: Calibration, products: str
) -> None:
    found = getattr(measured, products)
    assert found.shape == (NUM_STEPS,) * 3
    diagonal = np.sqrt([found[t, t, t] for t in range(NUM_STEPS)])
    np.testing.assert_allclose(diagonal, _norms(case), rtol=1e-4)


@pytest.mark.parametrize("products", ["outputs", "residual_outputs"])
def test_products_are_symmetric_positive_and_of_what_was_computed_by_then(measured: Calibration, products: str) -> None:
    found = getattr(measured, products)
    np.testing.assert_allclose(found, found.transpose(0, 2, 1), rtol=1e-12)
    for t in range(NUM_STEPS):
        known = found[t, : t + 1, : t + 1]
        assert np.linalg.eigvalsh(known).min() >= -1e-9 * np.trace(known)
        assert not found[t, t + 1 :].any()


@pytest.mark.parametrize(("products", "cached"), [("outputs", REUSE), ("residual_outputs", RESIDUAL)])
def test_repeating_a_cache_is_as_wrong_as_the_products_say(
    case: Case, measured: Calibration, products: str, cached: Step
) -> None:
    """At the last step an error of the output becomes one of the sample, by the solver's last coefficient."""
    found = getattr(measured, products)[-1]
    squared = found[-1, -1] - 2 * found[-1, -2] + found[-2, -2]
    table = case.problem.table(NUM_STEPS)
    difference = case.drawn(*[FULL] * (NUM_STEPS - 1), cached) - case.drawn(*[FULL] * NUM_STEPS)
    expected = float(difference.double().norm()) / abs(table.coefficients[-1][0][-1])
    assert np.sqrt(squared) == pytest.approx(expected, rel=2e-3)  # of float32, of which little is left


# the sensitivity


def test_an_error_matters_at_every_step_that_may_be_cached(measured: Calibration) -> None:
    assert measured.sensitivity.shape == (NUM_STEPS,)
    assert measured.sensitivity[0] == 0
    assert (measured.sensitivity[1:] > 0).all()


def test_the_sensitivity_tells_what_becomes_of_an_error(dit: Case) -> None:
    """Measured at every step but not smoothed, it is the final error by that of the output."""
    measured = replace_smoothing(dit)
    uncached = dit.drawn(*[FULL] * NUM_STEPS)
    for t in range(1, NUM_STEPS):
        steps = [FULL] * NUM_STEPS
        steps[t] = REUSE
        drawn = dit.drawn(*steps)
        final = (drawn - uncached).flatten(1).norm(dim=1) / uncached.flatten(1).norm(dim=1)
        outputs = measured.outputs[t]
        error = np.sqrt(outputs[t, t] - 2 * outputs[t, t - 1] + outputs[t - 1, t - 1])  # of both images together
        share = float(final.log().mean().exp()) / error
        assert share <= measured.sensitivity[t] <= 3 * share  # by each image's own error, half of the squares


def replace_smoothing(case: Case) -> Calibration:
    """Calibrate with a line through every point."""

    class Exact:
        @staticmethod
        def fit(places: list[int], found: list[float], _: int) -> Callable[[Floats], Floats]:
            return lambda at: np.interp(at, places, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.polynomial, "Polynomial", Exact)
        return case.calibrate(stride=1)


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
def test_a_coarser_stride_takes_less_work(dit: Case, stride: int) -> None:
    steps: list[None] = []
    found = dit.calibrate(stride, lambda: steps.append(None))
    # two for every step, and what is computed behind every step at which it is measured
    places = sorted({*range(1, NUM_STEPS, stride), NUM_STEPS - 1})
    assert len(steps) == 2 * NUM_STEPS + sum(NUM_STEPS - 1 - place for place in places)
    if stride == 2:  # three points have a parabola, as all four nearly have
        fine = dit.calibrate(1)
        np.testing.assert_allclose(np.log(found.sensitivity[1:]), np.log(fine.sensitivity[1:]), atol=1.0)


# the layers


def test_layers_are_measured_against_all_steps_that_came_before(case: Case, measured: Calibration) -> None:
    family = case.model.family
    shape = (MAX_LAG, NUM_STEPS, len(family.branches), len(family.blocks))
    for figures in (measured.layer_errors, measured.layer_changes):
        assert figures.shape == shape
        for lag in range(MAX_LAG):
            for t in range(NUM_STEPS):
                assert (figures[lag, t] > 0).all() == (t > lag)
                assert figures[lag, t].any() == (t > lag)


def test_a_layers_error_is_its_relative_change(dit: Case) -> None:
    family, table = dit.model.family, dit.problem.table(NUM_STEPS)
    trajectory = Trajectory(family, table, (FULL,) * NUM_STEPS, True, kinds=(REUSE.kind,))
    after = [moment.after for moment in trajectory.walk(dit.requests)]
    measured = dit.calibrate()
    for branch, name in enumerate(family.branches):
        for block in range(len(family.blocks)):
            layers = [tensors[f"next_{name}_cache.{block}"].double() for tensors in after]
            for t in range(1, NUM_STEPS):
                for lag in range(t):
                    change = (layers[t] - layers[t - lag - 1]).abs().sum() / layers[t].abs().sum()
                    assert measured.layer_errors[lag, t, branch, block] == pytest.approx(float(change), rel=1e-4)


def test_the_residual_changes_its_magnitude_from_step_to_step(case: Case, measured: Calibration) -> None:
    assert measured.residual_ratios.shape == (NUM_STEPS,)
    assert measured.residual_ratios[0] == 1
    assert (measured.residual_ratios > 0).all()
    assert not np.allclose(measured.residual_ratios, 1)
    assert case.model.family.gated_branches


# models of which we know


def _still(family: Family) -> None:
    """Let every layer give the same at every step and place: the bias of its last matrix."""
    for block in family.blocks:
        for last in ("out", "cross_out", "mlp_out"):
            if (module := dict(block.named_modules()).get(last)) is not None:
                assert isinstance(module, torch.nn.Linear)
                module.weight.data.zero_()


def test_a_model_whose_layers_do_not_change_has_no_errors(tmp_path_factory: pytest.TempPathFactory) -> None:
    for load in (load_tiny, load_tiny_text):
        model = load(tmp_path_factory.mktemp("still") / "model")
        _still(model.family)
        found = case_of(model).calibrate()
        assert not found.layer_errors.any()
        assert not found.layer_changes.any()
        for t in range(NUM_STEPS):
            known = found.outputs[t, : t + 1, : t + 1]
            np.testing.assert_allclose(known, known[0, 0], rtol=1e-12)
        assert np.isfinite(found.sensitivity).all()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_trajectories_are_measured_too(dit: Case, num_steps: int) -> None:
    found = case_of(dit.model, num_steps=num_steps).calibrate()
    assert found.outputs.shape == (num_steps,) * 3
    assert found.sensitivity.shape == found.residual_ratios.shape == (num_steps,)
    assert np.isfinite(found.sensitivity).all()
    assert (found.sensitivity[1:] > 0).all()


def test_the_same_images_give_the_same_figures(dit: Case) -> None:
    one, other = dit.calibrate(), dit.calibrate()
    for field in fields(Calibration):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


# how many images


def test_no_more_images_are_calibrated_on_than_there_is_room_for(dit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # of one image, 4 bytes · 50 steps · 2 rows · 16 tokens · width 32 · 2 blocks · 2 branches
    of_image = 4 * 50 * 2 * 16 * 32 * 2 * 2
    family = dit.model.family
    monkeypatch.setattr(module, "KEPT_BYTES", 5 * of_image)
    assert images_to_calibrate(family, 50, 2, 8) == 5
    assert images_to_calibrate(family, 50, 1, 8) == 8
    assert images_to_calibrate(family, 50, 2, 3) == 3
    monkeypatch.setattr(module, "KEPT_BYTES", of_image - 1)
    assert images_to_calibrate(family, 50, 2, 8) == 1


def test_each_image_counts_alike(dit: Case) -> None:
    """Products are of all images together, so they add up."""
    noise = torch.from_numpy(noise_from_seeds([3, 4], dit.model.family.latent_shape))
    assert torch.equal(dit.requests.noise, noise)
    alone = [replace(dit, requests=dit.requests.part(i, i + 1)).calibrate().outputs for i in (0, 1)]
    np.testing.assert_allclose(dit.calibrate().outputs, alone[0] + alone[1], rtol=1e-4, atol=1e-6)
