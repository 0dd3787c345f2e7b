"""FORA: a full step every N-th step, everything between reused (arXiv:2407.01425). The baseline of even spacing.

N is the period with the fewest full steps that are not less than the budget, so that the baseline is never given less
computation than what it is compared with; of several such periods the smallest, which spaces them most evenly.
"""

from __future__ import annotations

from hemiola_runtime.schedule import FULL, REUSE, Step
from hemiola_search.problem import Candidate, Problem, Score, Scored


def uniform_steps(num_steps: int, budget: int) -> tuple[Step, ...]:
    """Return the steps of FORA for a budget of full steps."""
    counts = {period: -(-num_steps // period) for period in range(1, num_steps + 1)}
    fewest = min(count for count in counts.values() if count >= budget)
    period = min(period for period, count in counts.items() if count == fewest)
    return tuple(FULL if i % period == 0 else REUSE for i in range(num_steps))


def search(problem: Problem, score: Score) -> list[Scored]:
    """Score the one schedule of the budget's period."""
    steps = uniform_steps(problem.num_evaluations, problem.options.budget)
    return [
        score(
            Candidate(
                "uniform",
                f"period {steps.index(FULL, 1) if FULL in steps[1:] else len(steps)}",
                problem.scheduler.num_inference_steps,
                steps,
            )
        )
    ]
