from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hemiola_runtime.schedule import FULL, REUSE, Forward, Step, tokens
from hemiola_search.errors import SearchError
from hemiola_search.rhythms import (
    Constraints,
    default_v_max,
    monotone_rhythms,
    sampled,
    steps_from_segments,
    with_selective_steps,
)
from strategies import examples

# ProCache's released rhythm for DiT-XL/2 with DDIM-50 (METHODS.md §14.2), in sampling order.
RELEASED_RHYTHM = "FCSCFCSCFCSCFCSCFCSCFCSCFCSFCSFCSFCSFCFCFCFCFCFCFC"
RELEASED_SEGMENTS = (*(4,) * 6, *(3,) * 4, *(2,) * 7)  # 24 + 12 + 14 = 50 steps


def _letters(steps: Iterable[Step]) -> str:
    return "".join(step.forward.symbol for step in steps)


@st.composite
def met_constraints(draw: st.DrawFn) -> Constraints:
    """Draw constraints that a schedule meets."""
    budget, v_min, more = draw(st.integers(1, 7)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    num_steps = draw(st.integers(budget * (v_min + 1), budget * (v_min + more + 1)))
    return Constraints(num_steps, budget, v_min, v_min + more)


@st.composite
def unmet_constraints(draw: st.DrawFn) -> Constraints:
    """Draw constraints of which no schedule can meet all: the segments are too short, or too long."""
    budget, v_min, more = draw(st.integers(2, 12)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    v_max = v_min + more
    shorter, longer = st.integers(budget, budget * (v_min + 1) - 1), st.integers(budget * (v_max + 1) + 1, 99)
    return Constraints(draw(shorter | longer), budget, v_min, v_max)


def _can_be_met(space: Constraints) -> bool:
    try:
        space.check()
    except SearchError:
        return False
    return True


def _by_brute_force(space: Constraints) -> set[tuple[int, ...]]:
    """Try every combination of segment lengths."""
    lengths = range(space.v_min + 1, space.v_max + 2)
    return {
        segments
        for segments in itertools.product(lengths, repeat=space.budget)
        if sum(segments) == space.num_steps and list(segments) == sorted(segments, reverse=True)
    }


@pytest.mark.parametrize(
    ("space", "count"),
    [
        # 13 segments of 2 to 5: what is above 2 adds up to 50 - 26 = 24, so this counts the partitions of 24 into at
        # most 13 parts of at most 3. With i threes, j twos, k ones: 3i + 2j + k = 24 and i + j + k ≤ 13, that is
        # 2i + j ≥ 11. From i = 8 down to 0, j is 0; 0, 1; 0 to 3; 1 to 4; 3 to 6; 5 to 7; 7 to 9; 9, 10; 11, 12:
        # 1 + 2 + 4 + 4 + 4 + 3 + 3 + 2 + 2 = 25
        (Constraints(50, 13, 1, 4), 25),
        # 17 segments of 2 to 4: 16 = 2i + j, i + j ≤ 17, so i from 0 to 8
        (Constraints(50, 17, 1, 3), 9),
        # 21 segments of 2 or 3: 8 of them are 3
        (Constraints(50, 21, 1, 2), 1),
        # 7 segments of 2 or 3: 6 of them are 3
        (Constraints(20, 7, 1, 2), 1),
    ],
)
def test_a_space_holds_as_many_rhythms_as_arithmetic_says(space: Constraints, count: int) -> None:
    assert len(monotone_rhythms(space)) == count


@given(space=met_constraints())
@examples(60)
def test_every_rhythm_meets_its_constraints_and_none_comes_twice(space: Constraints) -> None:
    rhythms = monotone_rhythms(space)
    assert len(set(rhythms)) == len(rhythms) >= 1
    assert {sum(segments) for segments in rhythms} == {space.num_steps}
    assert {len(segments) for segments in rhythms} == {space.budget}
    assert all(list(segments) == sorted(segments, reverse=True) for segments in rhythms)
    assert min(map(min, rhythms)) >= space.v_min + 1
    assert max(map(max, rhythms)) <= space.v_max + 1


@given(num_steps=st.integers(5, 10), budget=st.integers(1, 5), v_min=st.integers(0, 2), more=st.integers(0, 3))
@examples(60)
def test_no_rhythm_is_missing(num_steps: int, budget: int, v_min: int, more: int) -> None:
    space = Constraints(num_steps, budget, v_min, v_min + more)
    expected = _by_brute_force(space)
    assert _can_be_met(space) == bool(expected)
    if expected:
        assert set(monotone_rhythms(space)) == expected


@given(space=unmet_constraints())
@example(Constraints(5, 2, 3, 3))  # no budget at all: 4 or 8 steps, never 5
@example(Constraints(50, 17, 2, 4))
@examples(80)
def test_constraints_that_no_schedule_meets_name_the_nearest_that_one_meets(space: Constraints) -> None:
    with pytest.raises(SearchError, match=f"no schedule of {space.num_steps} steps has {space.budget} full") as raised:
        monotone_rhythms(space)
    message = str(raised.value)
    bounds = re.search(r"v_min ≤ (\d+) and v_max ≥ (\d+)$", message)
    assert bounds is not None
    v_min, v_max = int(bounds[1]), int(bounds[2])
    assert monotone_rhythms(Constraints(space.num_steps, space.budget, v_min, v_max))
    assert not _can_be_met(Constraints(space.num_steps, space.budget, v_min + 1, v_max + 9))
    budgets = re.search(r"a budget from (\d+) to (\d+)", message)
    named = range(int(budgets[1]), int(budgets[2]) + 1) if budgets else range(0)
    met = [b for b in range(1, space.num_steps + 1) if _can_be_met(Constraints(space.num_steps, b, *_bounds(space)))]
    assert list(named) == met
    assert all(monotone_rhythms(Constraints(space.num_steps, b, *_bounds(space))) for b in named)


def _bounds(space: Constraints) -> tuple[int, int]:
    return space.v_min, space.v_max


@pytest.mark.parametrize(
    "space",
    [
        Constraints(50, 0, 1, 3),
        Constraints(50, 51, 0, 3),
        Constraints(50, 17, -1, 3),
        Constraints(50, 17, 3, 2),
        Constraints(50, -1, 1, 3),
    ],
)
def test_constraints_that_mean_nothing_are_refused_with_their_values(space: Constraints) -> None:
    found = f"found budget {space.budget}, v_min {space.v_min}, v_max {space.v_max}"
    with pytest.raises(SearchError, match=found):
        monotone_rhythms(space)


def test_procaches_released_rhythm_comes_out_of_its_segments() -> None:
    steps = with_selective_steps(steps_from_segments(RELEASED_SEGMENTS), tokens(38))
    assert _letters(steps) == RELEASED_RHYTHM
    counts = Counter(step.forward for step in steps)
    assert counts == {Forward.FULL: 17, Forward.REUSE: 23, Forward.TOKENS: 10}
    assert {step.tokens for step in steps if step.forward is Forward.TOKENS} == {38}


def test_procaches_released_rhythm_lies_in_the_space_that_is_searched() -> None:
    assert RELEASED_SEGMENTS in monotone_rhythms(Constraints(50, 17, 1, 3))


def test_the_rhythm_that_procache_intends_for_pixart_is_the_only_one_of_its_space() -> None:
    (segments,) = monotone_rhythms(Constraints(20, 7, 1, 2))
    steps = with_selective_steps(steps_from_segments(segments), tokens(1))
    assert _letters(steps) == "FCS" * 6 + "FC"  # METHODS.md §14.2


@pytest.mark.parametrize(
    ("cached", "injected"),
    [  # 0 cached, 2 selective, as ProCache's code writes them
        ("", ""),
        ("0", "0"),
        ("00", "02"),
        ("000", "020"),
        ("0000", "0202"),
        ("00000", "02020"),
    ],
)
def test_every_second_cached_step_of_a_segment_becomes_selective(cached: str, injected: str) -> None:
    selective = tokens(5)
    steps = with_selective_steps((FULL, *(REUSE for _ in cached)), selective)
    assert steps == (FULL, *({"0": REUSE, "2": selective}[digit] for digit in injected))


@given(segments=st.lists(st.integers(1, 6), min_size=1, max_size=8))
@examples(50)
def test_segments_become_one_full_step_each_and_cached_ones_after_it(segments: list[int]) -> None:
    letters = _letters(steps_from_segments(segments))
    assert [1 + len(rest) for rest in letters.split("F")[1:]] == segments
    assert letters.startswith("F")
    assert set(letters) <= {"F", "C"}


@given(segments=st.lists(st.integers(1, 6), min_size=1, max_size=8))
@examples(50)
def test_injection_begins_anew_in_each_segment(segments: list[int]) -> None:
    whole = with_selective_steps(steps_from_segments(segments), tokens(1))
    parts = [with_selective_steps(steps_from_segments([length]), tokens(1)) for length in segments]
    assert whole == tuple(itertools.chain.from_iterable(parts))


@pytest.mark.parametrize(("num_steps", "budget", "v_max"), [(50, 17, 3), (50, 13, 4), (20, 7, 3), (50, 25, 2)])
def test_the_longest_reuse_is_the_mean_segment_rounded_up(num_steps: int, budget: int, v_max: int) -> None:
    # 50 / 17 = 2.94, 50 / 13 = 3.85, 20 / 7 = 2.86, 50 / 25 = 2
    assert default_v_max(num_steps, budget) == v_max


@given(budget=st.integers(1, 30), more=st.integers(0, 30))
@examples(60)
def test_the_default_space_is_never_empty(budget: int, more: int) -> None:
    num_steps = budget + more
    assert _can_be_met(Constraints(num_steps, budget, 0, default_v_max(num_steps, budget)))


@given(size=st.integers(0, 50), most=st.integers(2, 20))
@examples(60)
def test_a_sample_is_as_large_as_it_may_be_and_holds_both_ends(size: int, most: int) -> None:
    space = list(range(size))
    found = sampled(space, most)
    assert len(found) == min(size, most)
    assert found == sorted(set(found))
    assert [*found[:1], *found[-1:]] == [*space[:1], *space[-1:]]
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_a_sample_of_one_is_the_first() -> None:
    assert sampled([7, 8, 9], 1) == [7]
