from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.schedule import FULL, REUSE
from hemiola_search.budget import Budget, budget_from_text
from hemiola_search.costs import FlopsModel
from hemiola_search.errors import SearchError
from hemiola_search.problem import Problem
from labs import DIT_XL_2, paper_problem
from strategies import examples

UNCACHED = DIT_XL_2.schedule([FULL] * 50)


@pytest.mark.parametrize(
    ("text", "budget", "words"),
    [
        ("17", Budget(17.0, "full"), "17 full"),
        (" 17 ", Budget(17.0, "full"), "17 full"),
        ("250ms", Budget(250.0, "ms"), "250 ms"),
        ("12.5 ms", Budget(12.5, "ms"), "12.5 ms"),
        ("2.5x", Budget(2.5, "speedup"), "2.5×"),
        ("2.5×", Budget(2.5, "speedup"), "2.5×"),
    ],
)
def test_a_budget_is_read_and_written(text: str, budget: Budget, words: str) -> None:
    assert budget_from_text(text) == budget
    assert str(budget) == words
    assert budget_from_text(words.removesuffix(" full")) == budget


@pytest.mark.parametrize(
    "text", ["", "many", "-3", "0", "0x", "0.0ms", "x2", "2.5X", "17 full", "1e3", "nan", "inf", "2,5x", "2.x", "3 s"]
)
def test_what_is_no_budget_is_refused_with_the_three_that_are(text: str) -> None:
    with pytest.raises(SearchError) as raised:
        budget_from_text(text)
    message = str(raised.value)
    assert message.startswith(f"{text!r} is no budget: ")
    assert all(example in message for example in ("(17)", "(250ms)", "(2.5x)"))


def test_full_steps_are_worth_what_they_cost_with_reuse_between() -> None:
    limit = Budget(17, "full").limit(DIT_XL_2, 50)
    assert limit == DIT_XL_2.schedule([FULL] * 17 + [REUSE] * 33)
    assert limit == pytest.approx(8094, abs=0.5)  # GFLOP, METHODS.md §14.1


def test_a_speedup_is_a_share_of_the_uncached_cost() -> None:
    assert Budget(2.5, "speedup").limit(DIT_XL_2, 50) == pytest.approx(UNCACHED / 2.5)
    assert Budget(1, "speedup").limit(DIT_XL_2, 50) == UNCACHED


@given(num_steps=st.integers(1, 60), data=st.data())
@examples(80)
def test_full_steps_and_the_speedup_that_they_are_agree(num_steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_steps))
    by_steps = paper_problem(num_steps, Budget(count, "full"))
    speedup = DIT_XL_2.schedule([FULL] * num_steps) / by_steps.limit
    by_speedup = paper_problem(num_steps, Budget(speedup, "speedup"))
    assert by_speedup.limit == pytest.approx(by_steps.limit)
    assert by_steps.max_full() == by_speedup.max_full() == count


@pytest.mark.parametrize("amount", [0, 51, 17.5, -1])
def test_full_steps_are_whole_and_no_more_than_there_are(amount: float) -> None:
    with pytest.raises(SearchError, match=f"a budget of {amount:g} full steps, where a schedule has 1 to 50"):
        Budget(amount, "full").limit(DIT_XL_2, 50)


def test_milliseconds_need_measured_costs() -> None:
    with pytest.raises(SearchError, match=r"needs measured costs: .*`hemiola measure`.*--costs.*\(17\).*\(2\.5x\)"):
        Budget(250, "ms").limit(DIT_XL_2, 50)


def test_a_speedup_beyond_one_full_step_is_refused_with_the_most_that_can_be() -> None:
    least = DIT_XL_2.schedule([FULL] + [REUSE] * 49)
    assert UNCACHED / least == pytest.approx(45.783, abs=0.0005)  # adaLN alone is 1 / 532 of a full step
    assert Budget(45.78, "speedup").limit(DIT_XL_2, 50) > least
    with pytest.raises(SearchError, match=r"a budget of 90× is beyond caching: .* GFLOP, 45\.78× less than uncached"):
        Budget(90, "speedup").limit(DIT_XL_2, 50)


# how many full steps a limit allows


@given(num_steps=st.integers(1, 60), share=st.floats(0.05, 1))
@examples(80)
def test_as_many_steps_are_full_as_fit_and_no_more(num_steps: int, share: float) -> None:
    most = DIT_XL_2.schedule([FULL] * num_steps) / DIT_XL_2.schedule([FULL] + [REUSE] * (num_steps - 1))
    problem = paper_problem(num_steps, Budget(max(1.0, share * most), "speedup"))
    count = problem.max_full()

    def fits(problem: Problem, count: int) -> bool:
        steps = (FULL,) * count + (REUSE,) * (num_steps - count)
        return problem.fits(problem.candidate("by_hand", "", steps))

    assert 1 <= count <= num_steps
    assert fits(problem, count)
    assert count == num_steps or not fits(problem, count + 1)


class CostlyCache(FlopsModel):
    """Reading the cache costs as much as computing, as it may on a very small model."""

    def step(self, *_: object) -> float:
        return 1.0


def test_where_caching_saves_nothing_every_step_may_be_full() -> None:
    costs = CostlyCache(1152, 256, 28, 2)
    assert paper_problem(10, "3", costs=costs).max_full() == 10
