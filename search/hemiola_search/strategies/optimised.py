"""Optimised: the best schedules of all other strategies, improved on real trajectories by Optuna (Akiba et al. 2019).

A tree-structured Parzen estimator moves full steps, chooses order and weights of the forecasts, and may give up full
steps for such as refresh the deep blocks. What a proposal leaves of the limit is filled with full steps, and what
exceeds it taken away, where the estimate of `shortest_path` says that it matters most and least. Proposals are made
some at a time, the same number whoever runs them, so that a search gives the same on one machine and on many.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
import optuna

from hemiola_runtime.schedule import FULL, REUSE, Forward, Step
from hemiola_search.forecasts import Fitted, Weigh, polynomial, taylor, with_forecasts
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Effort, Problem, Scored
from hemiola_search.strategies.shortest_path import forecast_step, forecasts_of

ROUNDS: Final[dict[Effort, int]] = {"quick": 1, "thorough": 3}  # each begins at the best so far
TRIALS: Final[dict[Effort, int]] = {"quick": 16, "thorough": 32}  # of a round
AT_ONCE: Final = 8  # proposals between two looks at what became of them
FARTHEST: Final = 2  # steps that one full step is moved at most, in one round
MOST_GIVEN_UP: Final = 2  # full steps, for such as refresh

Refresh = Literal["none", "deep", "tokens"]


class Moves:
    """Schedules around one that is known, by the numbers that the optimiser chooses."""

    def __init__(self, problem: Problem, fitted: dict[Forward, Fitted], start: Candidate) -> None:
        self._problem = problem
        self._fitted = fitted
        self._full_steps = [i for i, step in enumerate(start.steps) if step.forward is Forward.FULL]
        self._kinds = {forecast_step(forward, order).kind: (forward, order) for forward, order in forecasts_of(problem)}
        last = max(start.steps, key=lambda step: (step.order, step.forward is Forward.REUSE)).kind
        self._start_kind = last if last in self._kinds else REUSE.kind
        selective = problem.selective_step
        self._refreshes: list[Refresh] = ["none"]
        if selective is not None:
            self._refreshes.append("deep" if selective.forward is Forward.DEEP else "tokens")

    def start(self) -> dict[str, int | str]:
        """Return the numbers of the schedule that is known."""
        shifts: dict[str, int | str] = {f"shift {i}": 0 for i in range(1, len(self._full_steps))}
        return shifts | {"cached": self._start_kind, "rule": "fitted", "refresh": "none", "given up": 1}

    def propose(self, trial: optuna.trial.BaseTrial, name: str) -> Candidate:
        """Return the schedule that a trial chooses."""
        moved = {0}
        for i, place in enumerate(self._full_steps[1:], 1):
            shifted = place + trial.suggest_int(f"shift {i}", -FARTHEST, FARTHEST)
            moved.add(min(max(shifted, 1), self._problem.num_evaluations - 1))
        forward, order = self._kinds[trial.suggest_categorical("cached", list(self._kinds))]
        rules: dict[str, Weigh] = {"fitted": self._fitted[forward].weigh, "polynomial": polynomial, "taylor": taylor}
        rule = trial.suggest_categorical("rule", list(rules))
        refresh = trial.suggest_categorical("refresh", self._refreshes)
        given_up = trial.suggest_int("given up", 1, MOST_GIVEN_UP)
        sure = self._problem.max_full(forecast_step(forward, order))
        if refresh != "none":
            places = self._filled(moved, forward, order, max(1, sure - given_up))
            steps = self._refreshed(self._written(places, forward, order, rules[rule]), places, forward, order)
            return self._problem.candidate("optimised", name, steps)
        best = None
        for count in range(max(1, sure), self._problem.num_evaluations + 1):
            moved = self._filled(moved, forward, order, count)
            longer = self._problem.candidate("optimised", name, self._written(moved, forward, order, rules[rule]))
            if best is not None and not self._problem.fits(longer):
                break
            best = longer
        assert best is not None, "there is one count at least"
        return best

    def _written(self, places: set[int], forward: Forward, order: int, weigh: Weigh) -> tuple[Step, ...]:
        plain = tuple(FULL if i in places else REUSE for i in range(self._problem.num_evaluations))
        return with_forecasts(plain, order, weigh, forward) if order else plain

    def _filled(self, places: set[int], forward: Forward, order: int, count: int) -> set[int]:
        """Return as many full steps as `count`, near those that are given."""
        places = set(places)
        while len(places) > count:
            others = sorted(places - {0})
            places.remove(min(others, key=lambda place: self._errors(places - {place}, forward, order).sum()))
        while len(places) < count:
            free = [i for i in range(self._problem.num_evaluations) if i not in places]
            places.add(min(free, key=lambda place: self._errors(places | {place}, forward, order).sum()))
        return places

    def _refreshed(self, steps: tuple[Step, ...], places: set[int], forward: Forward, order: int) -> tuple[Step, ...]:
        """Let as many cached steps as the limit allows refresh the deep blocks, those with the largest errors first."""
        selective = self._problem.selective_step
        assert selective is not None, "there is no refresh without such a step"
        errors = self._errors(places, forward, order)
        for place in sorted(set(range(len(steps))) - places, key=lambda place: -errors[place]):
            step = Step(selective.forward, selective.tokens, steps[place].forecast)
            tried = (*steps[:place], step, *steps[place + 1 :])
            if not self._problem.fits(self._problem.candidate("optimised", "", tried)):
                break
            steps = tried
        return steps

    def _errors(
        self, places: Iterable[int], forward: Forward, order: int
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the estimated errors of all steps, 0 for full ones."""
        errors = np.zeros(self._problem.num_evaluations)
        ordered = [*sorted(places), len(errors)]
        for i, place in enumerate(ordered[:-1]):
            history = tuple(reversed(ordered[max(0, i - order) : i + 1]))
            count = ordered[i + 1] - place - 1
            errors[place + 1 : place + 1 + count] = self._fitted[forward].errors(history)[:count]
        return errors


def search(lab: Lab) -> list[Scored]:
    """Improve the best schedule that was found by then, round by round.

    Raises:
        SearchError: nothing keeps to the limit.
    """
    problem, effort = lab.problem, lab.problem.options.effort
    fitted = {forward: Fitted(lab.calibration, forward) for forward in (Forward.REUSE, Forward.RESIDUAL)}
    best = lab.start()
    found = [best]
    for round_ in range(ROUNDS[effort]):
        moves = Moves(problem, fitted, best.candidate)
        study = _study(problem.options.seed + round_)
        study.enqueue_trial(moves.start())
        for first in range(0, TRIALS[effort], AT_ONCE):
            trials = [study.ask() for _ in range(AT_ONCE)]
            names = (f"round {round_ + 1}, trial {first + i + 1}" for i in range(AT_ONCE))
            proposed = [moves.propose(trial, name) for trial, name in zip(trials, names, strict=True)]
            scored = lab.score(proposed)
            for trial, result in zip(trials, scored, strict=True):
                study.tell(trial, result.error)
            found += scored
        best = min(found, key=lambda scored: scored.error)
    mine = [scored for scored in found if scored.candidate.strategy == "optimised"]
    return sorted(mine, key=lambda scored: scored.error)


def _study(seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=AT_ONCE)
    return optuna.create_study(sampler=sampler)
