from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import diffusers
import pytest

from hemiola_export.errors import ExportError, UnsupportedSolverError
from hemiola_export.model import Model
from hemiola_runtime.schedule import Forward
from hemiola_search.budget import Budget, budget_from_text
from hemiola_search.errors import SearchError
from hemiola_search.evaluator import Evaluator
from hemiola_search.laboratory import Laboratory
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.published import unmeasured_schedule
from hemiola_search.record import Point, SearchRecord
from hemiola_search.search import BASELINES, Found, find_schedule
from hemiola_search.store import Store
from hemiola_search.strategies import STRATEGIES
from hemiola_search.targets import target_from_text
from hemiola_search.tasks import Subjects
from labs import OPTIONS, load_tiny, load_tiny_text, tiny_problem
from models import TEXT_TOKENS

SUBJECTS: Final = Subjects(("a red circle", "a blue square", "a green triangle", "above", "left of red"))
BUDGETS: Final = ("2", "2.2x")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny(tmp_path_factory.mktemp("search") / "model")


def search(
    model: Model,
    problem: Problem,
    strategies: tuple[str, ...] = ("procache",),
    budgets: tuple[str, ...] = ("2",),
    target: str | None = None,
    **laboratory: Any,
) -> Found:
    with Store(None) as store:
        given: dict[str, Any] = {"subjects": SUBJECTS, "judge": None, "store": store} | laboratory
        return find_schedule(
            Laboratory(model, problem, **given),
            strategies,
            [budget_from_text(budget) for budget in budgets],
            None if target is None else target_from_text(target),
        )


@pytest.fixture(scope="module")
def found(model: Model) -> Found:
    """What all strategies find for two budgets."""
    return search(model, tiny_problem(model), tuple(STRATEGIES), BUDGETS)


def _points(record: SearchRecord, images: str, budget: str = "2 full") -> list[Point]:
    return [point for point in record.points if point.images == images and point.budget == budget]


# the schedule


def test_the_same_seed_finds_the_same_schedule_with_the_same_figures(model: Model, found: Found) -> None:
    again = search(model, tiny_problem(model), tuple(STRATEGIES), BUDGETS)
    assert again.schedule == found.schedule
    assert again.baselines == found.baselines
    assert again.record == found.record


def test_another_seed_draws_other_images(model: Model) -> None:
    one, other = (search(model, tiny_problem(model, seed=seed), ("uniform",)) for seed in (5, 6))
    assert (one.schedule.found_by.seed, other.schedule.found_by.seed) == (5, 6)
    assert one.schedule.rhythm == other.schedule.rhythm
    assert one.schedule.measured["relative_l2"] != other.schedule.measured["relative_l2"]


def test_the_schedule_is_bound_to_what_it_was_searched_for(model: Model) -> None:
    schedule = search(model, tiny_problem(model), ("toca",), ("1.5x",)).schedule
    assert schedule.model == model.identity
    assert schedule.scheduler.label == "DDIM-6"
    assert schedule.guidance == "classifier_free"
    assert schedule.deep_start == 0
    assert schedule.selector is not None
    assert (schedule.found_by.strategy, schedule.found_by.seed) == ("toca", 5)
    arguments = schedule.found_by.arguments
    assert (arguments["budget"], arguments["guidance_scale"], arguments["num_images"]) == ("1.5×", 3.0, 2)
    assert arguments["name"].startswith("N = ")


def test_what_was_found_is_the_best_of_all_strategies_on_the_images_of_the_search(found: Found) -> None:
    searched = _points(found.record, "searched")
    assert {point.strategy for point in searched} == set(STRATEGIES) - set(found.record.failures["2 full"])
    fitting = [point for point in searched if point.cost <= found.record.limits["2 full"] * (1 + 1e-9)]
    (chosen, *_) = [point for point in fitting if point.key == found.record.chosen]
    assert chosen.rhythm == found.schedule.rhythm
    # means of two images order schedules nearly as geometric means do
    assert chosen.quality["relative_l2"] <= 1.5 * min(point.quality["relative_l2"] for point in fitting)


def test_no_schedule_costs_more_than_its_budget(found: Found) -> None:
    for budget, limit in found.record.limits.items():
        of_budget = [point for point in found.record.points if point.budget == budget]
        assert {point.strategy for point in of_budget} == set(STRATEGIES) - found.record.failures[budget].keys()
        assert all(point.cost <= limit * (1 + 1e-9) for point in of_budget)
        assert all(point.rhythm.startswith("F") for point in of_budget)


def test_the_schedule_is_for_the_first_budget(model: Model, found: Found) -> None:
    assert list(found.record.limits) == ["2 full", "2.2×"]
    assert found.schedule.found_by.arguments["budget"] == "2 full"
    assert found.schedule.measured["gflop"] <= found.record.limits["2 full"] * (1 + 1e-9)
    turned = search(model, tiny_problem(model), ("uniform",), BUDGETS[::-1])
    assert list(turned.record.limits) == ["2.2×", "2 full"]
    assert turned.schedule.found_by.arguments["budget"] == "2.2×"


def test_a_budget_that_is_given_twice_is_searched_once(model: Model) -> None:
    found = search(model, tiny_problem(model), ("uniform",), ("2", "2", "3"))
    assert list(found.record.limits) == ["2 full", "3 full"]


@pytest.mark.parametrize("asked", [("uniform",), ("procache",), ("fewer_steps",), ("magcache", "smoothcache")])
def test_what_was_found_is_of_a_strategy_that_was_asked_for(model: Model, asked: tuple[str, ...]) -> None:
    found = search(model, tiny_problem(model, selective="none"), asked, ("3",))
    assert found.schedule.found_by.strategy in asked
    assert {point.strategy for point in _points(found.record, "held_out", "3 full")} == {*asked, *BASELINES}


def test_baselines_are_those_schedules_that_were_not_chosen(found: Found, model: Model) -> None:
    keys = {point.strategy: point.key for point in _points(found.record, "held_out")}
    assert set(found.baselines) == {name for name in BASELINES if keys[name] != found.record.chosen}
    assert all(schedule.found_by.strategy == name for name, schedule in found.baselines.items())
    same = search(model, tiny_problem(model, selective="none", v_max=2), ("uniform",), ("2",))
    assert same.schedule.rhythm == "FCCFCC"  # all that ProCache has with v_max 2 too
    assert set(same.baselines) == {"fewer_steps"}


def test_a_baseline_that_the_sampler_cannot_do_is_left_out(model: Model) -> None:
    # PNDM's first three steps take 4 evaluations each, so no number of steps takes 3 or fewer: 6 steps take 15
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=False)
    found = search(model, tiny_problem(model, scheduler=scheduler, v_max=6), ("uniform",), ("3",))
    assert len(found.schedule.steps) == 15
    assert "fewer_steps" not in found.baselines
    assert "fewer_steps" in found.record.failures["3 full"]


def test_strategies_that_found_nothing_say_why(model: Model) -> None:
    found = search(model, tiny_problem(model), tuple(STRATEGIES), ("1",))
    failures = found.record.failures["1 full"]
    assert {"toca", "taylorseer"} <= failures.keys()
    assert all("1 full" in reason for reason in failures.values())
    assert found.schedule.num_full == 1


def test_where_no_strategy_that_was_asked_for_finds_anything_the_reasons_are_told(model: Model) -> None:
    with pytest.raises(SearchError, match=r"taylorseer: no such schedule keeps to 1 full.*"):
        search(model, tiny_problem(model), ("taylorseer",), ("1",))


# the record


def test_the_record_holds_the_uncached_run(found: Found) -> None:
    (uncached,) = [point for point in found.record.points if point.strategy == "full"]
    assert (uncached.images, uncached.budget, uncached.rhythm, uncached.path) == ("held_out", "", "FFFFFF", ())
    assert uncached.quality == {"relative_l2": 0.0, "psnr": 100.0, "ssim": pytest.approx(1.0)}
    assert uncached.intervals["relative_l2"] == (0.0, 0.0)


def test_the_record_holds_the_best_of_every_strategy_on_held_out_images(found: Found) -> None:
    for budget in found.record.limits:
        searched, held_out = (_points(found.record, images, budget) for images in ("searched", "held_out"))
        assert len({point.strategy for point in held_out}) == len(held_out)
        for point in held_out:
            best = next(other for other in searched if other.key == point.key and other.strategy == point.strategy)
            assert best.rhythm == point.rhythm
            assert best.cost == point.cost
            low, high = point.intervals["relative_l2"]
            assert low <= point.quality["relative_l2"] <= high
            if point.num_steps == 6:
                assert len(point.path) == 6
                assert point.path[-1] == pytest.approx(point.quality["relative_l2"])
                assert point.path[0] < 1e-6  # the first step is full
            else:
                assert point.path == ()
        assert all(not point.intervals and not point.path for point in searched)


def test_figures_of_the_schedules_are_those_of_held_out_images(found: Found) -> None:
    held_out = {point.strategy: point for point in _points(found.record, "held_out")}
    for schedule in (found.schedule, *found.baselines.values()):
        point = held_out[schedule.found_by.strategy]
        assert schedule.measured == {**point.quality, "gflop": pytest.approx(point.cost)}
        assert point.tera_flops == pytest.approx(point.cost / 1e3)
    assert (found.record.num_images, found.record.num_held_out) == (2, 3)
    assert (found.record.costs.unit, found.record.costs.estimated) == ("GFLOP", ())


@pytest.mark.parametrize(("scale", "guidance", "rows"), [(3.0, "classifier_free", 2), (0.0, "none", 1)])
def test_guidance_decides_how_many_rows_an_image_has(model: Model, scale: float, guidance: str, rows: int) -> None:
    schedule = search(model, tiny_problem(model, guidance_scale=scale), ("fewer_steps",)).schedule
    assert schedule.guidance == guidance
    # 2 full steps of 2 blocks, D = 32, N = 16: 2·(24·16·32² + 4·16²·32 + 12·32²) = 876544 for one row
    assert schedule.measured["gflop"] == pytest.approx(2 * rows * 876544 / 1e9)


# trajectories that diverge


def _diverging(monkeypatch: pytest.MonkeyPatch, strategy: str, *, follows: bool) -> None:
    """Let the schedules of a strategy diverge on the images of the search, or on those that are held out."""
    score = Evaluator.score

    def wild(self: Evaluator, candidate: Candidate) -> Scored:
        scored = score(self, candidate)
        if candidate.strategy == strategy and self._follows == follows:
            return Scored(candidate, {"relative_l2": (math.inf,) * len(scored.samples["relative_l2"])}, {})
        return scored

    monkeypatch.setattr(Evaluator, "score", wild)


@pytest.mark.parametrize("follows", [False, True], ids=["searched", "held out"])
def test_a_strategy_whose_schedules_diverge_found_nothing(
    model: Model, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _diverging(monkeypatch, "toca", follows=follows)
    found = search(model, tiny_problem(model), ("uniform", "toca"), ("1.5x",))
    (reason,) = found.record.failures["1.5×"].values()
    assert reason.startswith("the trajectory of N = ")
    assert reason.endswith("diverges")
    assert found.schedule.found_by.strategy == "uniform"
    assert "toca" not in {point.strategy for point in found.record.held_out}
    assert all(math.isfinite(value) for point in found.record.points for value in point.quality.values())


@pytest.mark.parametrize("follows", [False, True], ids=["searched", "held out"])
def test_where_every_schedule_diverges_nothing_is_found(
    model: Model, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _diverging(monkeypatch, "toca", follows=follows)
    with pytest.raises(SearchError, match=r"toca: the trajectory of N = .* diverges"):
        search(model, tiny_problem(model), ("toca",), ("1.5x",))


# progress


def test_progress_is_told_for_every_step_and_stage(model: Model) -> None:
    done: list[int] = []
    left: list[int] = []
    stages: list[str] = []
    told: dict[str, Any] = {"on_work": done.append, "on_left": left.append, "on_stage": stages.append}
    search(model, tiny_problem(model, selective="none", v_max=2), ("uniform",), **told)
    # on 2 images 6 uncached steps, 2 of fewer steps and 6 of FORA, which is all that ProCache has too; on 3 the same
    assert sorted(done) == [2] * 14 + [3] * 14
    assert left[0] > left[-1] > 0
    assert stages == ["fewer_steps 2 steps", "uniform period 3", "fewer_steps 2 steps and 1 more", "full uncached"]


# refusals


def _nothing_runs(stage: str) -> None:
    raise AssertionError(stage)


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
    with pytest.raises(UnsupportedSolverError, match=message):
        search(model, tiny_problem(model, scheduler=scheduler), on_stage=_nothing_runs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"score": "cross_attention_entropy"}, "needs cross-attention"), ({"spatial_size": 3}, "does not divide")],
)
def test_a_selector_that_cannot_rank_is_refused_before_anything_runs(
    model: Model, changes: dict[str, Any], said: str
) -> None:
    problem = tiny_problem(model, selector=replace(OPTIONS.selector, **changes))
    with pytest.raises(ExportError, match=said):
        search(model, problem, on_stage=_nothing_runs)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (("7",), "a budget of 7 full steps, where a schedule has 1 to 6"),
        (("2", "7"), "a budget of 7 full steps, where a schedule has 1 to 6"),
        (("2", "9x"), "a budget of 9× is beyond caching"),
        (("20ms",), "a budget in milliseconds needs measured costs"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_before_anything_runs(
    model: Model, budgets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        search(model, tiny_problem(model), budgets=budgets, on_stage=_nothing_runs)


# targets


def _on_searched(found: Found, budget: str) -> float:
    """Return the relative L2 of what was found, on the images of the search."""
    (point, *_) = [p for p in _points(found.record, "searched", budget) if p.key == found.record.chosen]
    return point.quality["relative_l2"]


@pytest.mark.parametrize("bound", [0.3, 0.1, 0.02])
def test_a_target_gives_the_smallest_budget_that_keeps_to_it(model: Model, bound: float) -> None:
    problem = tiny_problem(model)
    found = search(model, problem, ("shortest_path",), (), f"relative_l2<={bound}")
    (budget,) = found.record.limits
    count = int(budget.split()[0])
    assert found.schedule.found_by.arguments["budget"] == budget == f"{count} full"
    assert _on_searched(found, budget) <= bound
    fewer = search(model, problem, ("shortest_path",), (str(count - 1),)) if count > 1 else None
    assert fewer is None or _on_searched(fewer, f"{count - 1} full") > bound


def test_other_budgets_come_behind_that_of_a_target(model: Model) -> None:
    found = search(model, tiny_problem(model), ("uniform",), ("5",), "psnr>=20")
    assert list(found.record.limits)[1:] == ["5 full"]
    assert found.schedule.found_by.arguments["budget"] == next(iter(found.record.limits))


def test_a_target_that_only_the_uncached_run_meets_takes_all_steps(model: Model) -> None:
    found = search(model, tiny_problem(model), ("uniform",), (), "relative_l2<=uncached")
    assert found.schedule.rhythm == "FFFFFF"
    assert list(found.record.limits) == ["6 full"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("psnr>=101", "the uncached run itself does not keep to psnr >= 101"),
        ("agreement>=0.5", r"agreement cannot be a target: there is no judge.*--judge"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(model: Model, target: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        search(model, tiny_problem(model), ("uniform",), (), target)


# models that draw prompts


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny_text(tmp_path_factory.mktemp("search") / "model")


def test_all_strategies_search_on_prompts_too(of_prompts: Model) -> None:
    chosen_by = replace(OPTIONS.selector, score="cross_attention_entropy")
    problem = tiny_problem(of_prompts, selector=chosen_by)
    found = search(of_prompts, problem, tuple(STRATEGIES), ("2.2x",))
    assert len(found.record.prompts) == 3
    assert set(found.record.prompts) <= set(SUBJECTS.prompts)
    assert {point.strategy for point in _points(found.record, "held_out", "2.2×")} >= set(STRATEGIES) - {
        *found.record.failures["2.2×"]
    }
    assert found.schedule.model == of_prompts.identity
    assert math.isfinite(found.schedule.measured["relative_l2"])


def test_a_search_on_labels_records_no_prompts(found: Found) -> None:
    assert found.record.prompts == ()


def test_without_prompts_nothing_is_searched(of_prompts: Model) -> None:
    with pytest.raises(SearchError, match="the model draws prompts; name a file"):
        search(of_prompts, tiny_problem(of_prompts), subjects=Subjects())


def test_the_costs_of_a_model_of_prompts_count_cross_attention(of_prompts: Model) -> None:
    assert tiny_problem(of_prompts).flops.num_text_tokens == TEXT_TOKENS
    # 2 blocks, D = 48, N = 16, S = 8: 2·(28·16·48² + 4·16²·48 + 4·16·8·48) = 2 211 840 for one row, and two rows
    schedule = search(of_prompts, tiny_problem(of_prompts), ("fewer_steps",)).schedule
    assert schedule.measured["gflop"] == pytest.approx(2 * 2 * 2211840 / 1e9)


def test_a_published_schedule_needs_no_prompts(of_prompts: Model) -> None:
    problem = tiny_problem(of_prompts, "7", num_steps=20, guidance_scale=0.0)
    schedule = unmeasured_schedule(of_prompts, problem)
    # METHODS §2.8, PixArt-α: 7 full, 7 reuse, 6 selective steps in segments 3 × 6, 2
    assert schedule.rhythm == "FCS" * 6 + "FC"
    assert schedule.scheduler.label == "DPMSolverMultistep-20"
    assert list(schedule.measured) == ["gflop"]
    assert {step.tokens for step in schedule.steps if step.forward is Forward.TOKENS} == {4}  # a quarter of 16


def test_a_budget_of_the_problem_counts_where_nothing_else_was_asked_for(model: Model) -> None:
    assert tiny_problem(model, "3").budget == Budget(3, "full")
    assert tiny_problem(model, "3").max_full() == 3
