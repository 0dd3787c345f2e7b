from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hemiola_export.errors import ExportError, UnsupportedSolverError
from hemiola_export.model import Model, load_model
from hemiola_runtime.codec import write_json
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.schedule import Forward, TokenSelector, read_schedule, write_schedule
from hemiola_search import tasks
from hemiola_search.errors import SearchError
from hemiola_search.evaluator import Evaluator
from hemiola_search.judge import Judge
from hemiola_search.problem import Candidate, Problem, SearchOptions
from hemiola_search.record import Point, SearchRecord, read_record
from hemiola_search.rhythms import Constraints, monotone_rhythms
from hemiola_search.search import HELD_OUT_SEED, Found, find_schedule, problem_for, unmeasured_schedule
from hemiola_search.tasks import Subjects, draw_task
from models import TEXT_TOKENS, save_tiny_model, save_tiny_text_model, tiny_dit, tiny_pixart

NUM_STEPS = 6
OPTIONS = SearchOptions(
    budget=2,
    v_min=0,
    v_max=4,
    selective="tokens",
    token_ratio=0.25,
    deep_ratio=0.5,
    selector=TokenSelector("value_norm", 0.0625, 0.6, 2, 0),
    guidance_scale=3.0,
    num_images=2,
    num_held_out=3,
    seed=5,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute with one thread: more only wait for one another on a model as small as this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random DiT of pixels: 2 blocks, images of 8 × 8."""
    transformer = tiny_dit(0, num_blocks=2, channels=1, has_learned_sigma=False)
    folder = tmp_path_factory.mktemp("search") / "model"
    return load_model(str(save_tiny_model(folder, transformer=transformer, has_vae=False)))


def _problem(
    model: Model,
    scheduler: Any | None = None,
    guidance: Literal["classifier_free", "none"] = "classifier_free",
    **options: Any,
) -> Problem:
    return problem_for(model, scheduler or model.scheduler, NUM_STEPS, replace(OPTIONS, **options), guidance)


@pytest.fixture(scope="module")
def found(model: Model) -> Found:
    return find_schedule(model, _problem(model), "procache", None)


def _points(record: SearchRecord, images: str) -> list[Point]:
    return [point for point in record.points if point.images == images]


def test_the_same_seed_finds_the_same_schedule_with_the_same_figures(model: Model, found: Found) -> None:
    again = find_schedule(model, _problem(model), "procache", None)
    assert again.schedule == found.schedule
    assert again.baselines == found.baselines
    assert again.record == found.record


def test_another_seed_draws_other_images(model: Model, found: Found) -> None:
    other = find_schedule(model, _problem(model, seed=6), "procache", None)
    assert other.schedule.found_by.seed == 6
    assert other.schedule.measured["relative_l2"] != found.schedule.measured["relative_l2"]


def test_what_was_found_reads_back_from_its_files(found: Found, tmp_path: Path) -> None:
    write_json(found.record, tmp_path / "search.json")
    assert read_record(tmp_path / "search.json") == found.record
    for name, schedule in {"best": found.schedule, **found.baselines}.items():
        write_schedule(schedule, tmp_path / f"{name}.json")
        assert read_schedule(tmp_path / f"{name}.json") == schedule
    assert sorted(found.baselines) == ["fewer_steps", "uniform"]


def test_the_schedule_is_bound_to_what_it_was_searched_for(model: Model, found: Found) -> None:
    schedule = found.schedule
    assert schedule.model == model.identity
    assert schedule.scheduler.label == "DDIM-6"
    assert schedule.guidance == "classifier_free"
    assert (schedule.deep_start, schedule.selector) == (1, OPTIONS.selector)  # half of 2 blocks is deep
    assert {step.tokens for step in schedule.steps if step.forward is Forward.TOKENS} == {4}  # a quarter of 16
    assert (schedule.found_by.strategy, schedule.found_by.seed) == ("procache", 5)
    assert schedule.num_full == OPTIONS.budget


def test_the_best_plain_rhythm_is_chosen_and_given_selective_steps(found: Found) -> None:
    searched = _points(found.record, "searched")
    assert len(searched) == len(monotone_rhythms(Constraints(6, 2, 0, 4))) + 1 == 4  # 5-1, 4-2, 3-3 and the injected
    plain = [point for point in searched if "S" not in point.rhythm]
    best = min(plain, key=lambda point: point.quality["relative_l2"])
    assert found.record.chosen == found.schedule.rhythm == searched[-1].rhythm
    assert searched[-1].name == f"{best.name} selective"
    assert found.schedule.rhythm.replace("S", "C") == best.rhythm


@pytest.mark.parametrize("strategy", ["procache", "uniform", "fewer_steps"])
def test_the_record_holds_the_uncached_run_and_both_baselines(model: Model, strategy: str) -> None:
    record = find_schedule(model, _problem(model), strategy, None).record
    held_out = _points(record, "held_out")
    assert {point.strategy for point in held_out} == {"full", "uniform", "fewer_steps", strategy}
    assert held_out[0].strategy == "full"
    assert held_out[0].rhythm == "FFFFFF"
    assert held_out[0].quality == {"relative_l2": 0.0, "psnr": 100.0, "ssim": pytest.approx(1.0)}
    at_budget = {point.strategy for point in held_out if point.rhythm.count("F") == OPTIONS.budget}
    assert at_budget >= {"uniform", "fewer_steps", strategy}


def test_the_record_holds_the_baselines_at_other_budgets_too(found: Found) -> None:
    held_out = _points(found.record, "held_out")
    uniform = [point.rhythm.count("F") for point in held_out if point.strategy == "uniform"]
    # shares 0.2, 0.26 and 0.5 of 6 steps are 1, 2 and 3 full steps; 2 are the budget, which comes first
    assert uniform == [2, 1, 3]
    assert [point.rhythm for point in held_out if point.strategy == "fewer_steps"] == ["FF", "F", "FFF"]


def test_figures_of_the_schedules_are_those_of_held_out_images(found: Found) -> None:
    held_out = {(point.strategy, point.rhythm): point for point in _points(found.record, "held_out")}
    for schedule in (found.schedule, *found.baselines.values()):
        point = held_out[schedule.found_by.strategy, schedule.rhythm]
        assert schedule.measured == {**point.quality, "tera_flops_per_image": point.tera_flops}
    assert (found.record.num_images, found.record.num_held_out) == (2, 3)


def test_held_out_images_are_none_of_those_that_were_searched_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []

    def recorded(seeds: Sequence[int], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        drawn.append(list(seeds))
        return noise_from_seeds(seeds, shape)

    monkeypatch.setattr(tasks, "noise_from_seeds", recorded)
    find_schedule(model, _problem(model), "uniform", None)
    searched, held_out = drawn
    assert searched == [5, 6]
    assert len(set(held_out)) == 3
    assert not set(searched) & set(held_out)


def test_computing_everything_at_every_step_has_no_error(model: Model) -> None:
    problem = _problem(model)
    scorer = Evaluator(model, problem, draw_task(model, problem, Subjects(), 0, 2), None, lambda: None)
    uncached = scorer.score_uncached()
    assert uncached.quality["relative_l2"] == 0.0
    again = scorer.score(Candidate("by_hand", "again", NUM_STEPS, uncached.candidate.steps))
    assert again.quality == uncached.quality


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [("classifier_free", 2), ("none", 1)],
)
def test_guidance_decides_how_many_rows_an_image_has(
    model: Model, guidance: Literal["classifier_free", "none"], rows: int
) -> None:
    schedule = find_schedule(model, _problem(model, guidance=guidance), "fewer_steps", None).schedule
    assert schedule.guidance == guidance
    # 2 full steps of 2 blocks, D = 32, N = 16: 2·(24·16·32² + 4·16²·32 + 12·32²) = 876544 for one row
    assert schedule.measured["tera_flops_per_image"] == pytest.approx(2 * rows * 876544 / 1e12)


class FakeJudge(Judge):
    """Reads label 0 off every image; its features are the brightness of the four corners' pixels."""

    def __init__(self) -> None:
        pass

    def look(self, images: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        corners = images[:, ::7, ::7, 0].reshape(len(images), 4)
        return np.zeros(len(images), dtype=np.int64), corners.astype(np.float32)

    def frechet(self, features: NDArray[np.floating]) -> float:
        return float(len(features))


@pytest.mark.parametrize(
    ("held_out", "agreement", "has_frechet"),
    [
        (4, 1 / 4, False),  # labels 0, 1, 2, 3; as many images as features: their covariance has not full rank
        (5, 1 / 5, True),
        (12, 2 / 12, True),  # 0 and 10 are both of class 0
    ],
)
def test_a_judge_is_asked_about_held_out_images_only(
    model: Model, held_out: int, agreement: float, has_frechet: bool
) -> None:
    record = find_schedule(model, _problem(model, num_held_out=held_out), "uniform", FakeJudge()).record
    assert all("agreement" not in point.quality for point in _points(record, "searched"))
    for point in _points(record, "held_out"):
        assert point.quality["agreement"] == pytest.approx(agreement)
        assert point.quality.get("frechet") == (held_out if has_frechet else None)


def test_progress_is_told_for_every_step_and_stage(model: Model) -> None:
    steps: list[None] = []
    stages: list[str] = []
    find_schedule(model, _problem(model), "uniform", None, on_step=lambda: steps.append(None), on_stage=stages.append)
    # 6 uncached and 6 of FORA; 6 uncached, FORA at 3 budgets, and fewer steps: 1, 2 and 3
    assert len(steps) == 6 + 6 + 6 + 3 * 6 + (1 + 2 + 3)
    assert [stages[0], stages[2]] == ["uncached run", "uncached run of held-out images"]
    assert stages[1].startswith("uniform period")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDPMScheduler(), "DDPM-6 is stochastic"),
        (diffusers.DDIMScheduler(clip_sample=True), "set clip_sample or thresholding to False"),
    ],
    ids=["stochastic", "clips"],
)
def test_a_sampler_that_cannot_be_compiled_is_refused_before_anything_runs(
    model: Model, scheduler: Any, message: str
) -> None:
    stages: list[str] = []
    with pytest.raises(UnsupportedSolverError, match=message):
        find_schedule(model, _problem(model, scheduler), "procache", None, on_stage=stages.append)
    assert stages == []


def test_a_baseline_that_the_sampler_cannot_do_is_left_out(model: Model) -> None:
    # PNDM's first three steps take 4 evaluations each, so no number of steps takes 3 or fewer: 6 steps take 15
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=False)
    given = find_schedule(model, _problem(model, scheduler, budget=3, v_max=6), "uniform", None)
    assert len(given.schedule.steps) == 15
    assert "fewer_steps" not in given.baselines


# models that draw prompts

SUBJECTS = Subjects(("a red circle", "a blue square", "a green triangle"))


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random PixArt of pixels: 2 blocks, images of 8 × 8."""
    transformer = tiny_pixart(0, num_blocks=2, channels=3, has_learned_sigma=False)
    folder = tmp_path_factory.mktemp("search") / "model"
    return load_model(str(save_tiny_text_model(folder, transformer=transformer, has_vae=False)))


def test_a_search_on_prompts_records_those_of_its_held_out_images(of_prompts: Model, tmp_path: Path) -> None:
    chosen_by = replace(OPTIONS.selector, score="cross_attention_entropy")
    problem = _problem(of_prompts, selector=chosen_by)
    found = find_schedule(of_prompts, problem, "procache", None, subjects=SUBJECTS)
    seed, skipped = OPTIONS.seed + HELD_OUT_SEED, OPTIONS.num_images
    held_out = draw_task(of_prompts, problem, SUBJECTS, seed, OPTIONS.num_held_out, skipped=skipped)
    assert found.record.prompts == held_out.prompts
    assert set(held_out.prompts) <= set(SUBJECTS.prompts)
    assert found.schedule.selector == chosen_by
    assert found.schedule.model == of_prompts.identity
    write_json(found.record, tmp_path / "search.json")
    assert read_record(tmp_path / "search.json") == found.record
    assert _points(found.record, "held_out")[0].quality["relative_l2"] == 0.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"score": "cross_attention_entropy"}, "needs cross-attention"), ({"spatial_size": 3}, "does not divide")],
)
def test_a_selector_that_cannot_rank_is_refused_before_anything_runs(
    model: Model, changes: dict[str, Any], said: str
) -> None:
    problem = _problem(model, selector=replace(OPTIONS.selector, **changes))
    with pytest.raises(ExportError, match=said):
        find_schedule(model, problem, "procache", None, on_stage=_nothing_runs)


def _nothing_runs(stage: str) -> None:
    raise AssertionError(stage)


def test_a_search_on_labels_records_no_prompts(found: Found) -> None:
    assert found.record.prompts == ()


@pytest.mark.parametrize(
    ("answers", "agreement"),
    [
        ({"a red circle": 0, "a blue square": 1, "a green triangle": 2}, 1 / 3),  # `FakeJudge` reads 0 off all
        ({"a red circle": 0, "a blue square": 1}, None),  # one of the three has no answer
        ({}, None),
    ],
)
def test_a_judge_agrees_only_where_the_answers_are_known(
    of_prompts: Model, answers: dict[str, int], agreement: float | None
) -> None:
    subjects = Subjects(SUBJECTS.prompts, answers)
    record = find_schedule(of_prompts, _problem(of_prompts), "uniform", FakeJudge(), subjects=subjects).record
    for point in _points(record, "held_out"):
        assert point.quality.get("agreement") == (None if agreement is None else pytest.approx(agreement))


def test_without_prompts_nothing_is_searched(of_prompts: Model) -> None:
    with pytest.raises(SearchError, match="the model draws prompts; name a file"):
        find_schedule(of_prompts, _problem(of_prompts), "procache", None)


def test_the_costs_of_a_model_of_prompts_count_cross_attention(of_prompts: Model) -> None:
    flops = _problem(of_prompts).flops
    assert flops.num_text_tokens == TEXT_TOKENS
    # 2 blocks, D = 48, N = 16, S = 8: 2·(28·16·48² + 4·16²·48 + 4·16·8·48) = 2 211 840 for one row, and two rows
    schedule = find_schedule(of_prompts, _problem(of_prompts), "fewer_steps", None, subjects=SUBJECTS).schedule
    assert schedule.measured["tera_flops_per_image"] == pytest.approx(2 * 2 * 2211840 / 1e12)


def test_a_published_schedule_needs_no_prompts(of_prompts: Model) -> None:
    problem = problem_for(of_prompts, of_prompts.scheduler, 20, replace(OPTIONS, budget=7, v_min=1, v_max=2), "none")
    schedule = unmeasured_schedule(of_prompts, problem)
    # METHODS §2.8, PixArt-α: 7 full, 7 reuse, 6 selective steps in segments 3 × 6, 2
    assert schedule.rhythm == "FCS" * 6 + "FC"
    assert schedule.scheduler.label == "DPMSolverMultistep-20"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*search.json: No such file.*`hemiola search` writes it"),
        ("{", "search.json: not valid JSON.*`hemiola search` writes valid records"),
        ('{"schema": 2}', "search.json: missing key 'model'"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "search.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SearchError, match=message):
        read_record(path)
