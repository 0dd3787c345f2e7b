from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hemiola_export.model import Model
from hemiola_export.prompts import embed_prompts
from hemiola_runtime.noise import noise_from_seeds
from hemiola_search.errors import SearchError
from hemiola_search.tasks import Subjects, draw_task, judged_prompts
from labs import load_tiny, load_tiny_text, tiny_problem
from models import TEXT_TOKENS

PROMPTS = ("a red circle", "a blue square", "green triangle left of red", "above", "a circle of green")
ANSWERS = {prompt: 10 + i for i, prompt in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def of_labels(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny(tmp_path_factory.mktemp("labels") / "model", num_blocks=1)


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny_text(tmp_path_factory.mktemp("prompts") / "model", num_blocks=1)


def test_images_of_labels_go_through_all_classes_in_turn(of_labels: Model) -> None:
    task = draw_task(of_labels, tiny_problem(of_labels), Subjects(), first_seed=3, count=12)
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert list(task.requests.conditions) == ["labels"]
    assert task.requests.conditions["labels"].tolist() == labels
    assert task.answers is not None
    assert task.answers.tolist() == labels
    assert task.prompts == ()


def test_noise_is_that_of_the_seeds_and_guidance_that_of_the_search(of_labels: Model, of_prompts: Model) -> None:
    for model, subjects in ((of_labels, Subjects()), (of_prompts, Subjects(PROMPTS))):
        requests = draw_task(model, tiny_problem(model), subjects, first_seed=3, count=4).requests
        assert len(requests) == 4
        expected = noise_from_seeds([3, 4, 5, 6], model.family.latent_shape)
        np.testing.assert_array_equal(requests.noise.numpy(), expected)
        assert requests.guidance.tolist() == [3.0] * 4


def test_prompts_are_drawn_by_chance_each_once_before_any_is_drawn_again(of_prompts: Model) -> None:
    task = draw_task(of_prompts, tiny_problem(of_prompts), Subjects(PROMPTS), first_seed=5, count=12)
    first, second, rest = task.prompts[:5], task.prompts[5:10], task.prompts[10:]
    assert set(first) == set(PROMPTS)
    assert second == first
    assert rest == first[:2]


def test_the_same_seed_draws_the_same_prompts_and_another_draws_others(of_prompts: Model) -> None:
    asked = tiny_problem(of_prompts)
    by_seed = {seed: replace(asked, options=replace(asked.options, seed=seed)) for seed in (0, 1, 2)}
    drawn = {seed: draw_task(of_prompts, by_seed[seed], Subjects(PROMPTS), 0, count=5) for seed in by_seed}
    again = draw_task(of_prompts, by_seed[0], Subjects(PROMPTS), 0, count=5)
    assert again.prompts == drawn[0].prompts
    for name, values in again.requests.conditions.items():
        assert torch.equal(values, drawn[0].requests.conditions[name])
    assert len({task.prompts for task in drawn.values()}) == 3  # of 120 orders


def test_prompts_that_are_left_to_others_come_last(of_prompts: Model) -> None:
    asked = tiny_problem(of_prompts)
    searched = draw_task(of_prompts, asked, Subjects(PROMPTS), 0, count=2)
    held_out = draw_task(of_prompts, asked, Subjects(PROMPTS), 9, count=3, skipped=2)
    assert sorted(searched.prompts + held_out.prompts) == sorted(PROMPTS)


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 2), (0.0, 1)])
def test_conditions_are_the_embedded_prompts_in_their_order(of_prompts: Model, scale: float, rows: int) -> None:
    problem = tiny_problem(of_prompts, guidance_scale=scale)
    task = draw_task(of_prompts, problem, Subjects(PROMPTS), first_seed=5, count=3)
    conditions = task.requests.conditions
    assert conditions["text_embeddings"].shape == (3, rows, TEXT_TOKENS, of_prompts.family.width)
    assert conditions["text_mask"].shape == (3, rows, TEXT_TOKENS)
    for i, prompt in enumerate(task.prompts):
        alone = embed_prompts(of_prompts, [prompt], is_guided=rows == 2)
        assert all(torch.equal(conditions[name][i], values[0]) for name, values in alone.items())


def test_answers_are_those_of_the_prompts_that_were_drawn(of_prompts: Model) -> None:
    task = draw_task(of_prompts, tiny_problem(of_prompts), Subjects(PROMPTS, ANSWERS), first_seed=5, count=7)
    assert task.answers is not None
    assert task.answers.tolist() == [ANSWERS[prompt] for prompt in task.prompts]


def test_without_an_answer_to_every_prompt_there_are_none(of_prompts: Model) -> None:
    some = {prompt: ANSWERS[prompt] for prompt in PROMPTS[1:]}
    for answers in ({}, some):
        task = draw_task(of_prompts, tiny_problem(of_prompts), Subjects(PROMPTS, answers), first_seed=5, count=5)
        assert task.answers is None


def test_without_prompts_a_model_that_draws_them_is_refused(of_prompts: Model) -> None:
    with pytest.raises(SearchError, match=r"the model draws prompts; name a file .* with --prompts"):
        draw_task(of_prompts, tiny_problem(of_prompts), Subjects(), first_seed=0, count=2)


def test_guidance_of_the_options_is_what_is_drawn_with(of_prompts: Model) -> None:
    asked = tiny_problem(of_prompts, guidance_scale=7.5)
    assert draw_task(of_prompts, asked, Subjects(PROMPTS), 0, 2).requests.guidance.tolist() == [7.5, 7.5]


# the prompts of a judge


def test_a_judge_knows_its_prompts_and_their_answers(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(ANSWERS | {"ein grüner Kreis": 3}, ensure_ascii=False), "utf-8")
    subjects = judged_prompts(tmp_path)
    assert subjects.prompts == (*PROMPTS, "ein grüner Kreis")
    assert subjects.answers == ANSWERS | {"ein grüner Kreis": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the prompts of the judge, .*prompts.json.*Name a file with --prompts"),
        ("{", "cannot read the prompts of the judge, .*prompts.json"),
        ("{}", "prompts.json is no object of prompts with the number of what their pictures show"),
        ('["a"]', "is no object of prompts"),
        ('{"a": "1"}', "is no object of prompts"),
        ('{"a": 1.5}', "is no object of prompts"),
        ('{"a": true}', "is no object of prompts"),
    ],
)
def test_a_judge_without_prompts_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(SearchError, match=message):
        judged_prompts(tmp_path)
