"""Where schedules are scored: which images, whose figures are shared, and how an interrupted search goes on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hemiola_export import trajectory
from hemiola_export.model import Model
from hemiola_runtime.schedule import FULL, REUSE, Forward, Step
from hemiola_search.budget import Budget
from hemiola_search.calibration import Calibration
from hemiola_search.errors import SearchError
from hemiola_search.evaluator import Evaluator
from hemiola_search.judge import Judge
from hemiola_search.laboratory import CALIBRATED_IMAGES, HELD_OUT_SEED, Here, Laboratory, Site
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.search import Found, find_schedule
from hemiola_search.store import Store
from hemiola_search.tasks import Subjects
from labs import OPTIONS, load_tiny, load_tiny_text, tiny_problem

STRATEGIES: Final = ("toca", "smoothcache", "shortest_path", "optimised")  # without a calibration, and with one
PROMPTS: Final = tuple(f"a {color} {form}" for color in ("red", "green", "blue") for form in ("circle", "square"))


class FakeJudge(Judge):
    """Reads label 0 off every image; its features are the brightness of the four corners' pixels."""

    def __init__(self, digest: str = "a judge") -> None:
        self.digest = digest

    def look(self, images: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        corners = images[:, ::7, ::7, 0].reshape(len(images), 4)
        return np.zeros(len(images), dtype=np.int64), corners.astype(np.float32)

    def frechet(self, features: NDArray[np.floating]) -> float:
        return float(len(features))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny(tmp_path_factory.mktemp("laboratory") / "model")


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny_text(tmp_path_factory.mktemp("laboratory") / "model", num_blocks=1)


def site(
    model: Model, images: Any = "searched", judge: Judge | None = None, subjects: Any = PROMPTS, **of: Any
) -> Site:
    return Site(
        model,
        tiny_problem(model, **of),
        subjects if isinstance(subjects, Subjects) else Subjects(subjects),
        judge,
        images,
    )


def _schedule(problem: Problem, rhythm: str) -> Candidate:
    return problem.candidate("by_hand", rhythm, tuple({"F": FULL, "C": REUSE}[letter] for letter in rhythm))


# which images


def test_held_out_images_have_noise_of_their_own(model: Model) -> None:
    searched, held_out = (site(model, images, num_images=4, num_held_out=6).task for images in ("searched", "held_out"))
    assert (len(searched.requests), len(held_out.requests)) == (4, 6)
    distances = torch.cdist(searched.requests.noise.flatten(1), held_out.requests.noise.flatten(1))
    assert distances.min() > 1  # of 64 numbers each: no two are the same
    assert HELD_OUT_SEED > 1e5  # searches of more images take long


def test_held_out_prompts_are_others_as_long_as_there_are_enough(of_prompts: Model) -> None:
    for seed in (0, 1, 5):
        searched, held_out = (
            site(of_prompts, images, num_images=2, num_held_out=4, seed=seed).task.prompts
            for images in ("searched", "held_out")
        )
        assert sorted((*searched, *held_out)) == sorted(PROMPTS)
    repeated = site(of_prompts, "held_out", num_images=2, num_held_out=9).task.prompts
    assert Counter(repeated).most_common(1)[0][1] == 2


# whose figures are shared


CHANGES: Final[dict[str, dict[str, Any]]] = {
    "images": {"images": "held_out"},
    "seed": {"seed": 6},
    "number of images": {"num_images": 3},
    "guidance scale": {"guidance_scale": 2.0},
    "no guidance": {"guidance_scale": 0.0},
    "steps": {"num_steps": 7},
    "sampler": {"scheduler": diffusers.EulerDiscreteScheduler()},
    "option of the sampler": {"scheduler": diffusers.DDIMScheduler(clip_sample=False)},
    "judge": {"judge": FakeJudge()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_figures_depend_on_tells_contexts_apart(model: Model, change: str) -> None:
    assert site(model).context == site(model).context
    assert site(model, **CHANGES[change]).context != site(model).context


def test_other_models_judges_prompts_and_answers_share_nothing(
    of_prompts: Model, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = load_tiny_text(tmp_path_factory.mktemp("other") / "model", num_blocks=2)
    answers = [Subjects(PROMPTS, {prompt: i + shift for i, prompt in enumerate(PROMPTS)}) for shift in (0, 1)]
    contexts = [
        site(of_prompts).context,
        site(other).context,
        site(of_prompts, subjects=PROMPTS[::-1]).context,
        site(of_prompts, subjects=answers[0]).context,
        site(of_prompts, subjects=answers[1]).context,
        site(of_prompts, judge=FakeJudge("one")).context,
        site(of_prompts, judge=FakeJudge("another")).context,
    ]
    assert len(set(contexts)) == len(contexts)


@pytest.mark.parametrize(
    "same",
    [{"budget": "3"}, {"max_order": 0}, {"selective": "none"}, {"v_max": 3}, {"deep_ratio": 0.0}],
    ids=lambda same: next(iter(same)),
)
def test_what_a_candidate_says_itself_or_is_of_no_effect_is_shared(model: Model, same: dict[str, Any]) -> None:
    assert site(model, **same).context == site(model).context


# how they are scored


def test_the_uncached_run_has_no_error_and_every_other_has_some(model: Model) -> None:
    here = site(model)
    evaluator = here.evaluator(lambda _: None)
    uncached = evaluator.score(_schedule(here.problem, "FFFFFF"))
    assert uncached.samples["relative_l2"] == (0.0, 0.0)
    assert uncached.quality == {"relative_l2": 0.0, "psnr": 100.0, "ssim": pytest.approx(1.0)}
    cached = [evaluator.score(_schedule(here.problem, rhythm)) for rhythm in ("FFCFFF", "FCCCCC")]
    assert 0 < cached[0].error < cached[1].error
    assert all(scored.path == () for scored in (uncached, *cached))
    assert all(len(values) == 2 for scored in cached for values in scored.samples.values())


def test_held_out_images_are_followed_step_by_step(model: Model) -> None:
    here = site(model, "held_out")
    evaluator = here.evaluator(lambda _: None)
    followed = evaluator.score(_schedule(here.problem, "FFCCFF"))
    assert followed.path[:2] == pytest.approx((0, 0), abs=1e-6)
    assert min(followed.path[2:]) > 1e-5
    assert followed.path[-1] == pytest.approx(followed.quality["relative_l2"])
    shorter = Candidate("fewer_steps", "2 steps", 2, (FULL, FULL))
    assert evaluator.score(shorter).path == ()


def test_following_changes_nothing_and_many_images_are_run_a_few_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site(model, "held_out", num_held_out=5)
    candidate = _schedule(here.problem, "FCCFCC")
    done: list[int] = []  # images, of every step
    monkeypatch.setattr(trajectory, "TOKENS_AT_ONCE", 2 * here.problem.num_tokens)
    for follows in (False, True):
        evaluator = Evaluator(model, here.problem, here.task, None, done.append, follows=follows)
        scored = evaluator.score(candidate)
        assert len(scored.path) == (6 if follows else 0)
    assert done == ([2] * 6 + [2] * 6 + [1] * 6) * 2 * 2  # uncached and cached, twice
    monkeypatch.undo()
    at_once = here.evaluator(lambda _: None).score(candidate)
    np.testing.assert_allclose(scored.samples["relative_l2"], at_once.samples["relative_l2"], rtol=1e-3)
    np.testing.assert_allclose(scored.path, at_once.path, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "agreement", "has_frechet"),
    [
        (4, 1 / 4, False),  # labels 0, 1, 2, 3; as many images as features: their covariance has not full rank
        (5, 1 / 5, True),
        (12, 2 / 12, True),  # 0 and 10 are both of class 0
    ],
)
def test_a_judge_is_asked_about_every_image(model: Model, count: int, agreement: float, has_frechet: bool) -> None:
    here = site(model, judge=FakeJudge(), num_images=count)
    scored = here.evaluator(lambda _: None).score(_schedule(here.problem, "FCCFCC"))
    assert scored.quality["agreement"] == pytest.approx(agreement)
    assert scored.samples["agreement"][:3] == (1.0, 0.0, 0.0)
    assert scored.totals == ({"frechet": count} if has_frechet else {})


@pytest.mark.parametrize(
    ("num_known", "agreement"),
    [(6, 1 / 6), (5, None), (0, None)],  # `FakeJudge` reads 0 off all; of one of six there is no answer
)
def test_a_judge_agrees_only_where_the_answers_are_known(
    of_prompts: Model, num_known: int, agreement: float | None
) -> None:
    subjects = Subjects(PROMPTS, {prompt: i for i, prompt in enumerate(PROMPTS[:num_known])})
    here = site(of_prompts, judge=FakeJudge(), subjects=subjects, num_images=6)
    scored = here.evaluator(lambda _: None).score(_schedule(here.problem, "FCCFCC"))
    assert scored.quality.get("agreement") == (None if agreement is None else pytest.approx(agreement))


def test_a_trajectory_that_diverges_is_refused_by_name(model: Model) -> None:
    here = site(model, guidance_scale=1e30)
    with pytest.raises(SearchError, match=r"the uncached images are not finite.*Lower --guidance-scale"):
        here.evaluator(lambda _: None)


def test_a_schedule_that_diverges_has_an_infinite_error_and_no_other_figure(model: Model) -> None:
    here = site(model, judge=FakeJudge())
    wild = (FULL, FULL, *[Step(Forward.REUSE, None, (1e30, -1e30))] * 4)
    scored = here.evaluator(lambda _: None).score(here.problem.candidate("by_hand", "wild", wild))
    assert scored.diverges
    assert (scored.quality, scored.path) == ({"relative_l2": math.inf}, ())


# interruptions, other workers


def _found(model: Model, store: Store, workers: Callable[..., Any] = Here, **options: Any) -> Found:
    problem = tiny_problem(model, "2", **options)
    laboratory = Laboratory(model, problem, subjects=Subjects(), judge=None, store=store, workers=workers)
    return find_schedule(laboratory, STRATEGIES, [Budget(2, "full")])


@pytest.fixture(scope="module")
def uninterrupted(model: Model) -> Found:
    with Store(None) as store:
        return _found(model, store)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is evaluated: the images and the candidate's key, or a calibration."""
    seen: list[tuple[str, str]] = []
    score, calibrate = Evaluator.score, Site.calibrate

    def recorded(self: Evaluator, candidate: Candidate) -> Scored:
        scored = score(self, candidate)
        seen.append(("held_out" if self._follows else "searched", candidate.key))
        return scored

    def calibrated(self: Site, on_step: Callable[[int], None]) -> Calibration:
        seen.append((self.images, "calibration"))
        return calibrate(self, on_step)

    monkeypatch.setattr(Evaluator, "score", recorded)
    monkeypatch.setattr(Site, "calibrate", calibrated)
    return seen


def test_nothing_is_evaluated_twice(model: Model, uninterrupted: Found, ran: list[tuple[str, str]]) -> None:
    with Store(None) as store:
        assert _found(model, store) == uninterrupted
        assert len(set(ran)) == len(ran) > 15
        assert ran.count(("searched", "calibration")) == 1
        before = len(ran)
        assert _found(model, store) == uninterrupted
        assert len(ran) == before


@pytest.mark.parametrize("after", [1, 9, 15])
def test_an_interrupted_search_goes_on_where_it_was(
    model: Model,
    uninterrupted: Found,
    ran: list[tuple[str, str]],
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score = Evaluator.score

    def interrupted(self: Evaluator, candidate: Candidate) -> Scored:
        if len(ran) >= after:
            raise KeyboardInterrupt
        return score(self, candidate)

    path = tmp_path / "search.sqlite"
    with monkeypatch.context() as patch, Store(path) as store:
        patch.setattr(Evaluator, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _found(model, store)
    assert len(ran) >= after
    with Store(path) as store:
        assert _found(model, store) == uninterrupted
    assert len(set(ran)) == len(ran)


def test_a_search_with_more_budgets_or_strategies_runs_only_what_is_new(
    model: Model, ran: list[tuple[str, str]]
) -> None:
    with Store(None) as store:
        problem = tiny_problem(model, "2")
        laboratory = Laboratory(model, problem, subjects=Subjects(), judge=None, store=store)
        first = find_schedule(laboratory, ("uniform",), [Budget(2, "full")])
        before = set(ran)
        more = find_schedule(laboratory, ("uniform", "shortest_path"), [Budget(2, "full"), Budget(3, "full")])
    assert len(set(ran)) == len(ran) > len(before)
    assert all(point in more.record.points for point in first.record.points)
    assert len(more.record.points) > len(first.record.points)


class Backwards(Here):
    """Workers who answer in another order than they were asked in."""

    def score(self, candidates: Sequence[Candidate], on_scored: Callable[[Scored], None]) -> None:
        super().score(candidates[::-1], on_scored)


def test_workers_that_answer_in_another_order_find_the_same(model: Model, uninterrupted: Found) -> None:
    with Store(None) as store:
        assert _found(model, store, Backwards) == uninterrupted


def test_seeds_share_no_figures_in_one_store(model: Model, ran: list[tuple[str, str]]) -> None:
    with Store(None) as store:
        found = {seed: _found(model, store, seed=seed) for seed in (OPTIONS.seed, 6)}
        with Store(None) as other:
            assert _found(model, other, seed=6) == found[6]
    assert found[5].schedule.measured != found[6].schedule.measured


def test_a_calibration_is_of_as_many_images_as_the_effort_and_the_search_have(model: Model) -> None:
    quick = CALIBRATED_IMAGES["quick"]
    for num_images, effort, count in ((2, "quick", 2), (10, "quick", quick), (10, "thorough", 10)):
        here = site(model, num_images=num_images, effort=effort)
        found = here.calibrate(lambda _: None).outputs
        first = replace(here, problem=tiny_problem(model, num_images=count, effort="thorough")).calibrate(
            lambda _: None
        )
        np.testing.assert_allclose(found, first.outputs, rtol=1e-4, atol=1e-7)
