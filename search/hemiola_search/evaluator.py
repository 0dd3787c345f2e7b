"""Score schedules: run them on fixed images in PyTorch and compare with the uncached run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from hemiola_export.components import VaeDecoder
from hemiola_export.model import Model
from hemiola_export.patches import from_patches
from hemiola_export.trajectory import Trajectory
from hemiola_runtime.results import latents_to_pixels
from hemiola_runtime.schedule import FULL
from hemiola_search.errors import SearchError
from hemiola_search.judge import Judge
from hemiola_search.perceptual import Perception
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.quality import psnr, relative_l2, ssim
from hemiola_search.tasks import Task

LATENTS_DECODED_AT_ONCE: Final = 8 * 32 * 32  # a VAE's activations are large: eight pictures of 256 × 256 pixels

OnStep = Callable[[int], None]
Latents = NDArray[np.float32]


class Evaluator:
    """Scores candidates on the same images, whose uncached run it keeps; on a GPU where there is one."""

    def __init__(
        self,
        model: Model,
        problem: Problem,
        task: Task,
        judge: Judge | None,
        on_step: OnStep,
        *,
        perception: Perception | None = None,
        follows: bool = False,
    ) -> None:
        """Draw the uncached images.

        Args:
            model: the model.
            problem: what is searched for.
            task: the images.
            judge: for agreement and Fréchet distance; None where there is none.
            on_step: told after every step of how many images it was.
            perception: for figures by pretrained networks; None where none were asked for.
            follows: whether errors are told along the trajectory too.

        Raises:
            SearchError: the uncached trajectory diverges.
        """
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model
        self._family = model.family.to(self._device)
        self._problem = problem
        self._requests = task.requests.to(self._device)
        self._answers = task.answers
        self._prompts = task.prompts
        self._judge = judge
        self._perception = perception
        self._on_step = on_step
        self._follows = follows
        self._decoder = None if model.vae is None else VaeDecoder(model.vae, model.family.patch_size, None)
        if self._decoder is not None:
            self._decoder.to(self._device)
        steps = (FULL,) * problem.num_evaluations
        self._uncached = Candidate("full", "uncached", problem.num_inference_steps, steps)
        self._samples: list[Latents] = []  # of the uncached run, behind every step
        self._reference = self._run(self._uncached, self._samples)
        if not np.isfinite(self._reference).all():
            raise SearchError(
                "the uncached images are not finite: the trajectory diverges. Lower --guidance-scale, or try another "
                "--scheduler"
            )
        self._reference_images = self._images(self._reference)

    def score(self, candidate: Candidate) -> Scored:
        """Run a candidate; returns it with its figures, an infinite error alone where its trajectory diverges."""
        if candidate.key == self._uncached.key:
            return self._judged(candidate, self._reference, self._reference_images, ())
        samples: list[Latents] = []
        latents = self._run(candidate, samples)
        if not np.isfinite(latents).all():
            return Scored(candidate, {"relative_l2": (math.inf,) * len(latents)}, {})
        pairs = zip(samples, self._samples, strict=True) if len(samples) == len(self._samples) else ()
        path = tuple(float(relative_l2(mine, theirs).mean()) for mine, theirs in pairs)
        return self._judged(candidate, latents, self._images(latents), path)

    def _judged(self, candidate: Candidate, latents: Latents, images: Latents, path: tuple[float, ...]) -> Scored:
        found = {
            "relative_l2": relative_l2(latents, self._reference),
            "psnr": psnr(images, self._reference_images),
            "ssim": ssim(images, self._reference_images),
        }
        totals: dict[str, float] = {}
        if self._perception is not None:
            samples, totals = self._perception.look(images, self._reference_images, self._prompts)
            found |= {name: np.asarray(values) for name, values in samples.items()}
        if self._judge is not None:
            read, features = self._judge.look(images)
            if self._answers is not None:
                found["agreement"] = (read == self._answers).astype(np.float64)
            if len(features) > features.shape[1]:  # below, their covariance has not full rank
                totals["frechet"] = self._judge.frechet(features)
        return Scored(candidate, {name: tuple(map(float, values)) for name, values in found.items()}, totals, path)

    def _run(self, candidate: Candidate, samples: list[Latents]) -> Latents:
        """Draw the final latents; `samples` are filled with those behind every step, if they are followed."""
        problem = self._problem
        trajectory = Trajectory(
            family=self._family,
            table=problem.table(candidate.num_steps),
            steps=candidate.steps,
            is_guided=problem.guidance == "classifier_free",
            deep_start=candidate.deep_start,
            selector=candidate.selector,
            mask=candidate.mask,
            has_block_counts=candidate.has_block_counts,
            pixels_per_latent=self._model.pixels_per_latent,
        )
        size = (self._requests.noise.shape[2], self._requests.noise.shape[3])
        drawn: list[list[Latents]] = []  # of each part, behind every step, or the last one alone
        with torch.inference_mode():
            for part in trajectory.parts(self._requests):
                drawn.append([])
                for moment in trajectory.walk(part):
                    if self._follows or moment.index == len(candidate.steps) - 1:
                        patches = moment.after["next_state"][0]
                        drawn[-1].append(from_patches(patches, self._family.patch_size, size).cpu().numpy())
                    self._on_step(len(part))
        behind = [np.concatenate(of_step) for of_step in zip(*drawn, strict=True)]
        samples += behind if self._follows else []
        return behind[-1]

    def _images(self, latents: Latents) -> Latents:
        if self._decoder is None:
            return latents_to_pixels(latents)
        with torch.inference_mode():
            at_once = max(1, LATENTS_DECODED_AT_ONCE // latents[0, 0].size)
            parts = torch.from_numpy(latents).to(self._device).split(at_once)
            images: Latents = torch.cat([self._decoder.decode(x) for x in parts]).cpu().numpy()
        return images
