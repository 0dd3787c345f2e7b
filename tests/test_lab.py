from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from hemiola_runtime.schedule import FULL, REUSE, Step
from hemiola_search.errors import SearchError
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.store import Store
from labs import FakeWorkers, calibration_of, lab_of, paper_problem

PROBLEM = paper_problem(6, "2")


def candidate(rhythm: str, strategy: str = "by_hand", problem: Problem = PROBLEM) -> Candidate:
    steps: dict[str, Step] = {"F": FULL, "C": REUSE}
    return problem.candidate(strategy, rhythm, tuple(steps[letter] for letter in rhythm))


def test_candidates_come_back_in_their_order_with_the_figures_that_are_theirs() -> None:
    tried = [candidate(rhythm) for rhythm in ("FCCCCC", "FCCFCC", "FFCCCC")]
    expected = lab_of(PROBLEM).score(tried)
    assert [scored.candidate for scored in expected] == tried
    backwards = lab_of(PROBLEM, FakeWorkers(backwards=True)).score(tried)
    assert backwards == expected
    assert len({scored.error for scored in expected}) == 3


def test_the_best_comes_first_and_everything_is_on_record() -> None:
    lab = lab_of(PROBLEM)
    tried = [candidate(rhythm) for rhythm in ("FCCCCC", "FCCFCC", "FFCCCC")]
    best = lab.best(tried)
    assert [scored.error for scored in best] == sorted(scored.error for scored in lab.tried)
    assert [scored.candidate for scored in lab.tried] == tried


def test_what_computes_the_same_is_run_once_whoever_proposes_it() -> None:
    workers = FakeWorkers()
    lab = lab_of(PROBLEM, workers)
    mine, yours = candidate("FCCFCC", "mine"), replace(candidate("FCCFCC", "yours"), name="another name")
    first, second = lab.score([mine, yours])
    (third,) = lab.score([yours])
    assert workers.ran == [yours]
    assert [scored.candidate for scored in (first, second, third)] == [mine, yours, yours]
    assert first.samples == second.samples == third.samples
    assert len(lab.tried) == 3


@pytest.mark.parametrize(
    "other",
    [
        candidate("FCFCCC"),
        replace(candidate("FCCFCC"), num_steps=7),
        replace(candidate("FCCFCC"), deep_start=3),
        replace(candidate("FCCFCC"), selector=PROBLEM.options.selector),
        replace(candidate("FCCFCC"), mask=("x.", ".x")),
    ],
    ids=["steps", "sampler", "deep blocks", "selector", "mask"],
)
def test_what_computes_something_else_is_run(other: Candidate) -> None:
    workers = FakeWorkers()
    lab_of(PROBLEM, workers).score([candidate("FCCFCC"), other])
    assert len(workers.ran) == 2


def test_a_lab_runs_nothing_that_is_in_its_store(tmp_path: Path) -> None:
    tried = [candidate(rhythm) for rhythm in ("FCCCCC", "FCCFCC")]
    with Store(tmp_path / "search.sqlite") as store:
        expected = lab_of(PROBLEM, store=store).score(tried)
    with Store(tmp_path / "search.sqlite") as store:
        workers = FakeWorkers()
        assert lab_of(PROBLEM, workers, store).score([*tried, candidate("FFCCCC")])[:2] == expected
        assert [ran.rhythm for ran in workers.ran] == ["FFCCCC"]


def test_figures_come_out_of_a_store_as_they_went_in() -> None:
    steps = candidate("FCCFCC")
    scored = Scored(steps, {"relative_l2": (0.1, 1 / 3), "psnr": (40.0, 20.5)}, {"frechet": 0.7}, (0.0, 1e-9, 0.2))

    class Workers(FakeWorkers):
        def score(self, candidates: object, on_scored: object) -> None:
            assert callable(on_scored)
            on_scored(scored)

    with Store(None) as store:
        assert lab_of(PROBLEM, Workers(), store).score([steps]) == [scored]
        assert lab_of(PROBLEM, FakeWorkers(), store).score([steps]) == [scored]


def test_what_was_scored_before_an_interruption_is_kept() -> None:
    tried = [candidate(rhythm) for rhythm in ("FCCCCC", "FCCFCC", "FFCCCC")]

    def interrupted(asked: Candidate) -> float:
        if asked.rhythm == "FFCCCC":
            raise KeyboardInterrupt
        return 0.5

    with Store(None) as store:
        lab = lab_of(PROBLEM, FakeWorkers(interrupted), store)
        with pytest.raises(KeyboardInterrupt):
            lab.score(tried)
        workers = FakeWorkers()
        lab_of(PROBLEM, workers, store).score(tried)
        assert [ran.rhythm for ran in workers.ran] == ["FFCCCC"]


def test_labs_of_other_contexts_share_nothing() -> None:
    with Store(None) as store:
        for context in ("here", "there"):
            workers = FakeWorkers(calibration=calibration_of(PROBLEM))
            lab = Lab(PROBLEM, workers, store, context, lambda _: None)
            lab.score([candidate("FCCFCC")])
            assert lab.calibration is not None
            assert (len(workers.ran), workers.num_calibrations) == (1, 1)


def test_a_calibration_is_measured_once_and_comes_out_of_the_store_as_it_went_in() -> None:
    measured = calibration_of(PROBLEM)
    workers = FakeWorkers(calibration=measured)
    with Store(None) as store:
        for _ in range(2):
            found = lab_of(PROBLEM, workers, store).calibration
            for field in fields(found):
                np.testing.assert_array_equal(getattr(found, field.name), getattr(measured, field.name))
    assert workers.num_calibrations == 1


def test_the_uncached_run_is_a_schedule_like_any_other() -> None:
    workers = FakeWorkers()
    lab = lab_of(PROBLEM, workers)
    uncached = lab.uncached()
    assert (uncached.candidate.strategy, uncached.candidate.rhythm) == ("full", "FFFFFF")
    assert lab.uncached() == uncached
    assert len(workers.ran) == 1


def test_a_search_starts_at_the_best_that_fits_and_has_the_samplers_steps() -> None:
    errors = {"FFFCCC": 0.1, "FF": 0.2, "FCCFCC": 0.4, "FCCCCC": 0.3}
    lab = lab_of(PROBLEM, FakeWorkers(lambda tried: errors[tried.rhythm]))
    shorter = Candidate("fewer_steps", "2 steps", 2, (FULL, FULL))
    lab.score([candidate("FFFCCC"), shorter, candidate("FCCFCC"), candidate("FCCCCC")])
    assert lab.start().candidate.rhythm == "FCCCCC"


def test_where_nothing_fits_there_is_nothing_to_start_at() -> None:
    lab = lab_of(PROBLEM)
    lab.score([candidate("FFFCCC")])
    with pytest.raises(SearchError, match="no schedule that was tried keeps to 2 full"):
        lab.start()


# figures


def test_quality_is_a_mean_and_the_error_a_geometric_mean() -> None:
    scored = Scored(candidate("FCCFCC"), {"relative_l2": (0.1, 0.4), "psnr": (20.0, 40.0)}, {"frechet": 3.0})
    assert scored.quality == {"relative_l2": pytest.approx(0.25), "psnr": 30.0, "frechet": 3.0}
    assert scored.error == pytest.approx(0.2)  # √(0.1 · 0.4)


def test_an_image_without_error_does_not_make_the_mean_nothing() -> None:
    scored = Scored(candidate("FFFFFF"), {"relative_l2": (0.0, 1e-3)}, {})
    assert scored.error == pytest.approx(1e-6)  # √(10⁻⁹ · 10⁻³)
