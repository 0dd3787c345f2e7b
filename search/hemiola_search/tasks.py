"""What schedules are scored on: images of all classes in turn, or of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from hemiola_export.model import Model
from hemiola_export.prompts import embed_prompts
from hemiola_export.trajectory import Requests
from hemiola_runtime.noise import noise_from_seeds
from hemiola_search.errors import SearchError
from hemiola_search.problem import Problem

PROMPTS_FILE: Final = "prompts.json"  # of a judge: prompt → the class that it should read off a picture of it


@dataclass(frozen=True, slots=True)
class Subjects:
    """What images can be drawn of, beside the classes of a model of labels.

    Attributes:
        prompts: of a model that draws prompts.
        answers: prompt → what a judge should read off its picture; empty where nobody knows.
    """

    prompts: Sequence[str] = ()
    answers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """Images that candidates are scored on.

    Attributes:
        requests: what they are drawn of.
        answers: (B,) what a judge should read off each; None where nobody knows.
        prompts: B of them; none where images are drawn of labels.
    """

    requests: Requests
    answers: NDArray[np.int64] | None
    prompts: tuple[str, ...] = ()


def judged_prompts(judge: Path) -> Subjects:
    """Read the prompts that a judge knows the answers to.

    Raises:
        SearchError: its folder names none.
    """
    path = judge / PROMPTS_FILE
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SearchError(
            f"cannot read the prompts of the judge, {path}: {error}. Name a file with --prompts"
        ) from error
    if not isinstance(answers, dict) or not answers or not all(type(answer) is int for answer in answers.values()):
        raise SearchError(f"{path} is no object of prompts with the number of what their pictures show")
    return Subjects(tuple(answers), answers)


def draw_task(
    model: Model, problem: Problem, subjects: Subjects, first_seed: int, count: int, *, skipped: int = 0
) -> Task:
    """Choose `count` images, one seed each: all classes in turn, or prompts in the order that the seed gives.

    The first `skipped` prompts of that order are left to others, as long as there are enough.

    Raises:
        SearchError: the model draws prompts, and there are none.
    """
    noise = torch.from_numpy(noise_from_seeds(range(first_seed, first_seed + count), problem.latent_shape))
    guidance = torch.full((count,), problem.options.guidance_scale)
    if model.text is None:
        labels = torch.arange(count) % model.family.num_classes
        return Task(Requests({"labels": labels}, noise, guidance), labels.numpy())
    if not subjects.prompts:
        raise SearchError("the model draws prompts; name a file that holds some, one on each line, with --prompts")
    generator = np.random.Generator(np.random.Philox(key=problem.options.seed))
    order = generator.permutation(len(subjects.prompts)).tolist()
    prompts = [subjects.prompts[order[(skipped + i) % len(order)]] for i in range(count)]
    conditions = embed_prompts(model, prompts, is_guided=problem.guidance == "classifier_free")
    is_known = all(prompt in subjects.answers for prompt in prompts)
    answers = np.array([subjects.answers[prompt] for prompt in prompts]) if is_known else None
    return Task(Requests(conditions, noise, guidance), answers, tuple(prompts))
