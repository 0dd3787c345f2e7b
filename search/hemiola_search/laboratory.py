"""The two places where schedules are scored: on the images of the search, and on those that were held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import torch

from hemiola_export.model import Model
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.codec import encode
from hemiola_search.calibration import Calibration, calibrate, images_to_calibrate
from hemiola_search.evaluator import Evaluator
from hemiola_search.judge import Judge
from hemiola_search.lab import Lab, Workers
from hemiola_search.perceptual import Perception
from hemiola_search.problem import Candidate, Effort, Problem, Scored
from hemiola_search.store import Store
from hemiola_search.tasks import Subjects, Task, draw_task

HELD_OUT_SEED: Final = 1_000_000  # added to the seeds of held-out images: none of them was searched on
RECIPE: Final = 2  # to be raised when the same schedule gets other figures
CALIBRATED_IMAGES: Final[dict[Effort, int]] = {"quick": 6, "thorough": 10}
STRIDES: Final[dict[Effort, int]] = {"quick": 10, "thorough": 4}

Images = Literal["searched", "held_out"]


@dataclass(frozen=True)
class Site:
    """Where schedules are run: the model, the images, and who looks at them. What a worker on another machine needs.

    Attributes:
        model: the model.
        problem: what is searched for; its budget does not matter.
        subjects: what images can be drawn of.
        judge: None where there is none.
        images: which.
        perception: what looks at held-out images beside the judge; None where no metric was asked for.
    """

    model: Model
    problem: Problem
    subjects: Subjects
    judge: Judge | None
    images: Images
    perception: Perception | None = None

    @cached_property
    def task(self) -> Task:
        """The images."""
        options = self.problem.options
        if self.images == "searched":
            return draw_task(self.model, self.problem, self.subjects, options.seed, options.num_images)
        first = options.seed + HELD_OUT_SEED
        return draw_task(
            self.model, self.problem, self.subjects, first, options.num_held_out, skipped=options.num_images
        )

    @property
    def context(self) -> str:
        """Digest of all that figures depend on beside the candidate: who resumes a search finds them by it."""
        problem, options = self.problem, self.problem.options
        parts = {
            "recipe": RECIPE,
            "model": encode(self.model.identity),
            "scheduler": encode(problem.scheduler),
            "guidance": [problem.guidance, options.guidance_scale],
            "images": [self.images, options.seed, len(self.task.requests), *self.task.prompts],
            "answers": None if self.task.answers is None else self.task.answers.tolist(),
            "judge": None if self.judge is None else self.judge.digest,
            "calibration": [CALIBRATED_IMAGES[options.effort], STRIDES[options.effort]],
            "torch": [torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"],
        }
        if self.perception is not None:  # else a search finds what was scored before there was any
            parts["metrics"] = self.perception.digest
        return sha256_of(json.dumps(parts, sort_keys=True).encode())

    def evaluator(self, on_step: Callable[[int], None]) -> Evaluator:
        """Draw the uncached images."""
        follows = self.images == "held_out"
        return Evaluator(
            self.model, self.problem, self.task, self.judge, on_step, perception=self.perception, follows=follows
        )

    def calibrate(self, on_step: Callable[[int], None]) -> Calibration:
        """Measure an uncached run of the first images."""
        problem, effort = self.problem, self.problem.options.effort
        is_guided = problem.guidance == "classifier_free"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        wanted = min(CALIBRATED_IMAGES[effort], len(self.task.requests))
        count = images_to_calibrate(self.model.family, problem.num_evaluations, 1 + is_guided, wanted)
        return calibrate(
            self.model.family.to(device),
            problem.table(problem.num_inference_steps),
            self.task.requests.part(0, count).to(device),
            is_guided=is_guided,
            pixels_per_latent=self.model.pixels_per_latent,
            stride=STRIDES[effort],
            on_step=lambda: on_step(count),
        )


class Here:
    """Workers: this process. Draws the uncached images when the first candidate is scored."""

    def __init__(self, site: Site, on_step: Callable[[int], None]) -> None:
        self._site = site
        self._on_step = on_step

    @cached_property
    def _evaluator(self) -> Evaluator:
        return self._site.evaluator(self._on_step)

    def score(self, candidates: Sequence[Candidate], on_scored: Callable[[Scored], None]) -> None:
        for candidate in candidates:
            on_scored(self._evaluator.score(candidate))

    def calibrate(self) -> Calibration:
        return self._site.calibrate(self._on_step)


class Laboratory:
    """Makes the labs of a search."""

    def __init__(
        self,
        model: Model,
        problem: Problem,
        *,
        subjects: Subjects,
        judge: Judge | None,
        perception: Perception | None = None,
        store: Store,
        workers: Callable[[Site, Callable[[int], None]], Workers] = Here,
        on_work: Callable[[int], None] = lambda _: None,
        on_left: Callable[[int], None] = lambda _: None,
        on_stage: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Set up.

        Args:
            model: the model.
            problem: what is searched for.
            subjects: prompts, for a model that draws them.
            judge: for agreement and Fréchet distance; None where there is none.
            perception: for the metrics of held-out images that were asked for; None without any.
            store: what was evaluated before.
            workers: makes who runs schedules at a site.
            on_work: told after every step of how many images it was.
            on_left: told how many steps of images are left, by and large.
            on_stage: told what is being done.

        Raises:
            SearchError: the metrics mean nothing for pictures of this model.
        """
        self.model = model
        self._on_left = on_left
        self.problem = problem
        self._store = store
        self._on_stage = on_stage
        places: tuple[Images, ...] = ("searched", "held_out")
        if perception is not None:
            perception.check_model(model)
        looking = {"searched": None, "held_out": perception}
        self._sites = {images: Site(model, problem, subjects, judge, images, looking[images]) for images in places}
        self._workers = {images: workers(site, on_work) for images, site in self._sites.items()}

    def expect(self, num_searched: int, num_held_out: int) -> None:
        """Say how many schedules are still to be scored."""
        options = self.problem.options
        images = num_searched * options.num_images + num_held_out * options.num_held_out
        self._on_left(self.problem.num_evaluations * images)

    def searched(self, problem: Problem) -> Lab:
        """Return the lab on the images of the search, for a budget."""
        return self._lab("searched", problem)

    def held_out(self) -> Lab:
        """Return the lab on the other images."""
        return self._lab("held_out", self.problem)

    def uncached(self) -> Scored:
        """Return the figures of the uncached run on held-out images."""
        return self.held_out().uncached()

    @property
    def held_out_prompts(self) -> tuple[str, ...]:
        """Prompts of held-out images; none where images are drawn of labels."""
        return self._sites["held_out"].task.prompts

    def _lab(self, images: Images, problem: Problem) -> Lab:
        return Lab(problem, self._workers[images], self._store, self._sites[images].context, self._on_stage)
