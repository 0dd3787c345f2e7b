"""The search stage as one function: a model, a sampler and budgets become a schedule and a record of the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from hemiola_export.selection import check_selector
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import Schedule
from hemiola_search.budget import Budget
from hemiola_search.costs import MeasuredCosts
from hemiola_search.errors import SearchError
from hemiola_search.laboratory import Laboratory
from hemiola_search.problem import Problem, Scored
from hemiola_search.record import CostSource, Point, SearchRecord
from hemiola_search.schedules import schedule_of
from hemiola_search.statistics import bootstrap_interval
from hemiola_search.strategies import EXPECTED, STRATEGIES
from hemiola_search.targets import Target

BASELINES: Final = ("fewer_steps", "uniform", "procache")  # which are exported beside what was found


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gives.

    Attributes:
        schedule: the best that was found.
        baselines: what every report compares it with, at its budget, by strategy.
        record: everything that was tried.
    """

    schedule: Schedule
    baselines: dict[str, Schedule]
    record: SearchRecord


@dataclass
class _Outcome:
    """What the strategies found for one budget."""

    problem: Problem
    tried: list[Scored]
    best: dict[str, Scored] = field(default_factory=dict)  # by strategy, on the images of the search
    held_out: dict[str, Scored] = field(default_factory=dict)  # the same on the others
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def reasons(self) -> str:
        """Why strategies found nothing."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())

    def drop_diverging(self, scored: Mapping[str, Scored]) -> None:
        """Take schedules of some strategies for nothing if they diverge where they were scored."""
        for name in [name for name, one in scored.items() if one.diverges]:
            self.failures[name] = f"the trajectory of {self.best.pop(name).candidate.name} diverges"
            self.held_out.pop(name, None)


def find_schedule(
    laboratory: Laboratory,
    strategies: Sequence[str],
    budgets: Sequence[Budget],
    target: Target | None = None,
) -> Found:
    """Search a schedule, and measure it and the best of every other strategy on images that were not searched on.

    Args:
        laboratory: the problem, and who runs schedules.
        strategies: keys of STRATEGIES; the best schedule of all of them is the one that was found. The baselines are
            added.
        budgets: the schedule is for the first; the record holds the best of every strategy for each.
        target: makes the smallest budget of full steps with which it is met the first.

    Raises:
        SearchError: no schedule meets the constraints.
        UnsupportedSolverError: the sampler cannot be compiled.
    """
    problem, options = laboratory.problem, laboratory.problem.options
    problem.table(problem.num_inference_steps)  # refuse early what cannot be compiled
    if options.selective == "tokens":
        check_selector(options.selector, laboratory.model.family, problem.num_tokens)
    names = [name for name in STRATEGIES if name in {*strategies, *BASELINES}]
    asked = list(budgets)
    for one in asked:
        one.limit(problem.costs, problem.num_evaluations)  # and what cannot be met
    if target is not None:
        asked.insert(0, _smallest_budget(laboratory, names, strategies, target))
    distinct = list(dict.fromkeys(asked))
    outcomes = {
        str(budget): _outcome(laboratory, names, budget, len(distinct) - i - 1) for i, budget in enumerate(distinct)
    }
    first = outcomes[str(asked[0])]
    _found(first, strategies)  # or nothing is worth judging
    _judge(laboratory, outcomes)
    found = _found(first, strategies)
    made_by = MadeBy.here("torch", "diffusers", "numpy", "optuna")
    points = [_point(problem, "", laboratory.uncached(), "held_out")]
    for budget, outcome in outcomes.items():
        points += [_point(outcome.problem, budget, scored, "searched") for scored in outcome.tried]
        points += [_point(outcome.problem, budget, scored, "held_out") for scored in outcome.held_out.values()]
    record = SearchRecord(
        schema=3,
        model=laboratory.model.identity.name,
        sampler=problem.scheduler.label,
        guidance_scale=options.guidance_scale,
        num_images=options.num_images,
        num_held_out=options.num_held_out,
        effort=options.effort,
        costs=_cost_source(laboratory),
        limits={budget: outcome.problem.limit for budget, outcome in outcomes.items()},
        chosen=found.candidate.key,
        points=tuple(points),
        failures={budget: outcome.failures for budget, outcome in outcomes.items()},
        made_by=made_by,
        prompts=laboratory.held_out_prompts,
    )
    schedules = {
        name: schedule_of(laboratory.model, first.problem, scored, made_by)
        for name, scored in first.held_out.items()
        if name == found.candidate.strategy or (name in BASELINES and scored.candidate.key != found.candidate.key)
    }
    return Found(schedules.pop(found.candidate.strategy), schedules, record)


def _outcome(laboratory: Laboratory, names: Sequence[str], budget: Budget, num_later: int = 0) -> _Outcome:
    """Run strategies for one budget, each beginning at what those before it found; as many budgets are to follow."""
    problem = replace(laboratory.problem, budget=budget)
    problem.limit  # noqa: B018 - refuses what cannot be met
    lab = laboratory.searched(problem)
    outcome = _Outcome(problem, lab.tried)
    expected = {name: EXPECTED[name][problem.options.effort] for name in names}
    for i, name in enumerate(names):
        left = sum(expected[other] for other in names[i:]) + num_later * sum(expected.values())
        laboratory.expect(left, len(names) * (num_later + 1) + 1)
        try:
            outcome.best[name] = STRATEGIES[name](lab)[0]
        except SearchError as error:
            outcome.failures[name] = str(error)
    outcome.drop_diverging(outcome.best)
    if not outcome.best:
        raise SearchError(outcome.reasons)
    return outcome


def _found(outcome: _Outcome, strategies: Sequence[str]) -> Scored:
    """Return the best schedule of some strategies.

    Raises:
        SearchError: none of them found any.
    """
    if (found := _best(outcome, strategies)) is None:
        raise SearchError(outcome.reasons)
    return found


def _best(outcome: _Outcome, strategies: Sequence[str]) -> Scored | None:
    """Return the best schedule of some strategies; None if none of them found any."""
    found = [outcome.best[name] for name in strategies if name in outcome.best]
    return min(found, key=lambda scored: scored.error, default=None)


def _smallest_budget(laboratory: Laboratory, names: Sequence[str], strategies: Sequence[str], target: Target) -> Budget:
    """Return the fewest full steps whose best schedule meets a target on the images of the search, by bisection.

    Raises:
        SearchError: not even the uncached run meets it.
    """
    uncached = laboratory.searched(laboratory.problem).uncached().quality
    if not target.is_met(uncached, uncached):
        raise SearchError(f"the uncached run itself does not keep to {target}")
    fails, meets = 0, laboratory.problem.num_evaluations
    while meets - fails > 1:
        middle = (meets + fails) // 2
        outcome = _outcome(laboratory, names, Budget(middle, "full"))
        found = _best(outcome, strategies)
        if found is not None and target.is_met(found.quality, uncached):
            meets = middle
        else:
            fails = middle
    return Budget(meets, "full")


def _judge(laboratory: Laboratory, outcomes: dict[str, _Outcome]) -> None:
    """Score the best of every strategy on held-out images, each schedule once: two strategies may find the same."""
    lab, best = laboratory.held_out(), [(outcome, name) for outcome in outcomes.values() for name in outcome.best]
    scored = lab.score([outcome.best[name].candidate for outcome, name in best])
    for (outcome, name), held_out in zip(best, scored, strict=True):
        outcome.held_out[name] = held_out
    for outcome in outcomes.values():
        outcome.drop_diverging(outcome.held_out)


def _cost_source(laboratory: Laboratory) -> CostSource:
    costs = laboratory.problem.costs
    if not isinstance(costs, MeasuredCosts):
        return CostSource("GFLOP", "", ())
    return CostSource("ms", costs.source, tuple(sorted(costs.estimated)))


def _point(problem: Problem, budget: str, scored: Scored, images: str) -> Point:
    candidate = scored.candidate
    return Point(
        budget=budget,
        strategy=candidate.strategy,
        name=candidate.name,
        key=candidate.key,
        num_steps=candidate.num_steps,
        rhythm=candidate.rhythm,
        max_tokens=max(step.max_tokens for step in candidate.steps),
        images=images,  # type: ignore[arg-type]
        quality=scored.quality,
        intervals={name: bootstrap_interval(values) for name, values in scored.samples.items() if images == "held_out"},
        path=scored.path,
        cost=problem.cost(candidate),
        tera_flops=problem.flops.schedule(candidate.steps, candidate.deep_start, candidate.mask) / 1e3,
    )
