"""Score schedules: run them on fixed images in PyTorch and compare with the uncached run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from hemiola_export.components import VaeDecoder
from hemiola_export.model import Model
from hemiola_export.trajectory import Trajectory
from hemiola_runtime.results import latents_to_pixels
from hemiola_runtime.schedule import FULL
from hemiola_search.errors import SearchError
from hemiola_search.judge import Judge
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.quality import psnr, relative_l2, ssim
from hemiola_search.tasks import Task

LATENTS_DECODED_AT_ONCE: Final = 8 * 32 * 32  # a VAE's activations are large: eight pictures of 256 × 256 pixels

OnStep = Callable[[], None]


class Evaluator:
    """Scores candidates on the same images, whose uncached run it keeps."""

    def __init__(self, model: Model, problem: Problem, task: Task, judge: Judge | None, on_step: OnStep) -> None:
        self._model = model
        self._problem = problem
        self._requests = task.requests
        self._answers = task.answers
        self._judge = judge
        self._on_step = on_step
        self._decoder = None if model.vae is None else VaeDecoder(model.vae, model.family.patch_size, None)
        self._uncached = Candidate(
            "full", "uncached", problem.scheduler.num_inference_steps, (FULL,) * problem.num_evaluations
        )
        self._reference = self._latents(self._uncached)
        self._reference_images = self._images(self._reference)

    def score_uncached(self) -> Scored:
        """Return the figures of the uncached run itself."""
        return self._judged(self._uncached, self._reference, self._reference_images)

    def score(self, candidate: Candidate) -> Scored:
        """Run a candidate; returns it with the means of its figures."""
        latents = self._latents(candidate)
        return self._judged(candidate, latents, self._images(latents))

    def _judged(self, candidate: Candidate, latents: NDArray[np.float32], images: NDArray[np.float32]) -> Scored:
        quality = {
            "relative_l2": float(relative_l2(latents, self._reference).mean()),
            "psnr": float(psnr(images, self._reference_images).mean()),
            "ssim": float(ssim(images, self._reference_images).mean()),
        }
        if not np.isfinite(list(quality.values())).all():
            raise SearchError(
                f"the images of {candidate.strategy} {candidate.name} are not finite: the trajectory diverges. "
                "Lower --guidance-scale, or try another --scheduler"
            )
        if self._judge is not None:
            read, features = self._judge.look(images)
            if self._answers is not None:
                quality["agreement"] = float((read == self._answers).mean())
            if len(features) > features.shape[1]:  # below, their covariance has not full rank
                quality["frechet"] = self._judge.frechet(features)
        return Scored(candidate, quality)

    def _latents(self, candidate: Candidate) -> NDArray[np.float32]:
        problem = self._problem
        trajectory = Trajectory(
            family=self._model.family,
            table=problem.table(candidate.num_steps),
            steps=candidate.steps,
            is_guided=problem.guidance == "classifier_free",
            deep_start=problem.deep_start if candidate.is_deep else None,
            selector=problem.options.selector if candidate.is_selective else None,
            pixels_per_latent=self._model.pixels_per_latent,
        )
        drawn: NDArray[np.float32] = trajectory.run(self._requests, on_step=self._on_step).numpy()
        return drawn

    def _images(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._decoder is None:
            return latents_to_pixels(latents)
        with torch.inference_mode():
            at_once = max(1, LATENTS_DECODED_AT_ONCE // latents[0, 0].size)
            parts = torch.from_numpy(latents).split(at_once)
            images: NDArray[np.float32] = torch.cat([self._decoder.decode(x) for x in parts]).numpy()
        return images
