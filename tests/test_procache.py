from __future__ import annotations

from typing import Any, Final

import pytest

from hemiola_runtime.schedule import FULL, Forward
from hemiola_search.budget import Budget
from hemiola_search.errors import SearchError
from hemiola_search.problem import Candidate
from hemiola_search.rhythms import Constraints, monotone_rhythms
from hemiola_search.strategies import procache
from labs import DIT_XL_2, FakeWorkers, lab_of, paper_problem, plain, schedule_of, table_of

EIGHT: Final = ("FCCCFCFC", "FCCFCCFC")  # all rhythms of 8 steps with 3 full ones and 1 to 3 cached after each


def _errors(table: dict[str, float]) -> FakeWorkers:
    """Give every rhythm the error of a table, 1 if it has none."""
    return FakeWorkers(lambda candidate: table.get(plain(candidate), 1.0))


def _found(num_steps: int, budget: str, workers: FakeWorkers | None = None, **options: Any) -> list[Candidate]:
    problem = paper_problem(num_steps, budget, **options)
    return [scored.candidate for scored in procache.search(lab_of(problem, workers))]


def test_the_rhythm_of_lowest_error_comes_first() -> None:
    for best in EIGHT:
        first, *_ = _found(8, "3", _errors({best: 0.1}), v_max=3)
        assert plain(first) == best


def test_the_whole_space_is_scored_and_returned_from_lowest_error_to_highest() -> None:
    space = monotone_rhythms(Constraints(20, 6, 1, 4))
    rhythms = ["".join("F" + "C" * (length - 1) for length in segments) for segments in space]
    workers = _errors({rhythm: 1 / (i + 1) for i, rhythm in enumerate(rhythms)})  # the last enumerated is the best
    found = _found(20, "6", workers, v_max=4, selective="none")
    assert 3 < len(rhythms) <= procache.MAX_RHYTHMS["quick"]
    assert [plain(candidate) for candidate in found] == rhythms[::-1]
    assert len({candidate.name for candidate in found}) == len(rhythms)


@pytest.mark.parametrize(("effort", "most"), [("quick", 10), ("thorough", 64)])
def test_a_large_space_is_sampled_from_one_end_to_the_other(effort: str, most: int) -> None:
    space = monotone_rhythms(Constraints(50, 13, 0, 9))
    assert len(space) > 64
    found = _found(50, "13", v_min=0, v_max=9, selective="none", effort=effort)
    names = {procache.name_of(segments) for segments in space}
    assert len(found) == most
    assert {candidate.name for candidate in found} <= names
    assert {procache.name_of(space[0]), procache.name_of(space[-1])} <= {candidate.name for candidate in found}


def test_names_tell_segments() -> None:
    assert procache.name_of((4, 4, 3, 2, 2, 2)) == "4×2 3×1 2×3"


# selective steps


def test_selective_steps_stand_where_the_paper_injects_them() -> None:
    found = _found(50, "2.9x", token_ratio=0.05)  # the paper's 2.90×
    selective = [candidate for candidate in found if "selective" in candidate.name]
    assert selective
    for candidate in selective:
        injected = plain(candidate)
        assert {segment for segment in injected.split("F") if segment} <= {"C", "CS", "CSC", "CSCS"}
        assert "S" in injected
        assert candidate.name.removesuffix(" selective") == procache.name_of(
            tuple(1 + len(rest) for rest in injected.split("F")[1:])
        )


def test_the_released_rhythm_is_among_those_that_are_tried() -> None:
    """With a limit that its selective steps keep to: 17 full steps of 50, and 10 steps that recompute few tokens."""
    budget = Budget(DIT_XL_2.schedule([FULL] * 50) / 8211, "speedup")  # GFLOP, METHODS.md §14.1
    problem = paper_problem(50, budget, v_max=3, token_ratio=0.05, effort="thorough")
    rhythms = {plain(scored.candidate) for scored in procache.search(lab_of(problem))}
    assert "FCSCFCSCFCSCFCSCFCSCFCSCFCSFCSFCSFCSFCFCFCFCFCFCFC" in rhythms


def test_selective_steps_take_the_place_of_a_full_step_where_they_would_exceed_the_limit() -> None:
    found = _found(50, "17", selective="deep")
    assert {candidate.num_full for candidate in found if "selective" not in candidate.name} == {17}
    # 10 to 12 steps of a quarter of the blocks are worth 2.5 to 3 full steps
    (num_full,) = {candidate.num_full for candidate in found if "selective" in candidate.name}
    assert num_full in (14, 15)


@pytest.mark.parametrize(
    ("selective", "forward", "count"),
    [
        ("tokens", Forward.TOKENS, 38),  # 0.15 · 256 = 38.4
        ("deep", Forward.DEEP, None),
    ],
)
def test_a_selective_step_is_what_the_options_say(selective: str, forward: Forward, count: int | None) -> None:
    problem = paper_problem(16, "6", v_max=6, selective=selective)
    found = [scored.candidate for scored in procache.search(lab_of(problem))]
    injected = {(step.forward, step.tokens) for candidate in found for step in candidate.steps}
    assert injected == {(Forward.FULL, None), (Forward.REUSE, None), (forward, count)}
    for candidate in found:
        is_selective = "selective" in candidate.name
        assert (candidate.deep_start == 21) == is_selective
        assert (candidate.selector is not None) == (is_selective and forward is Forward.TOKENS)
        assert schedule_of(candidate).num_full <= 6


@pytest.mark.parametrize("options", [{"selective": "none"}, {"deep_ratio": 0.0}])
def test_without_selective_steps_it_only_caches(options: dict[str, Any]) -> None:
    found = _found(8, "3", v_max=3, **options)
    assert {plain(candidate) for candidate in found} == set(EIGHT)
    assert {candidate.deep_start for candidate in found} == {None}


def test_a_tiny_share_of_tokens_still_is_one_token() -> None:
    step = paper_problem(8, "3", token_ratio=0.0001).selective_step
    assert step is not None
    assert step.tokens == 1


def test_tight_limits_may_leave_no_room_for_selective_steps() -> None:
    found = _found(8, "1", v_min=0, v_max=7, selective="deep")
    assert {plain(candidate) for candidate in found} == {"FCCCCCCC"}


# constraints


@pytest.mark.parametrize(("v_max", "expected"), [(None, 3), (5, 5)])
def test_the_longest_reuse_is_the_users_or_the_mean_segment(v_max: int | None, expected: int) -> None:
    problem = paper_problem(50, "17", v_max=v_max)
    assert procache.constraints_of(problem, 17) == Constraints(50, 17, 1, expected)


def test_model_evaluations_count_and_not_steps() -> None:
    heun = table_of(lambda num_steps: 2 * num_steps - 1)
    for candidate in _found(6, "4", v_max=3, table=heun, selective="none"):
        assert (len(candidate.steps), candidate.num_steps, candidate.num_full) == (11, 6, 4)


def test_constraints_that_no_schedule_meets_are_refused_before_anything_is_scored() -> None:
    workers = FakeWorkers()
    with pytest.raises(SearchError, match="Nearest that work: a budget from 13 to 25"):
        _found(50, "30", workers, v_max=3)
    assert workers.ran == []
