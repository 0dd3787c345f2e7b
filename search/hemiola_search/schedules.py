"""Write what was found as a schedule."""

from __future__ import annotations

from dataclasses import asdict

from hemiola_export.model import Model
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import FoundBy, Schedule
from hemiola_search.problem import Problem, Scored


def schedule_of(model: Model, problem: Problem, scored: Scored, made_by: MadeBy) -> Schedule:
    """Return a candidate as a schedule that is bound to its model and sampler, with its figures."""
    candidate, options = scored.candidate, problem.options
    arguments = {key: value for key, value in asdict(options).items() if key not in ("seed", "selector")}
    cost = {"milliseconds" if problem.costs.unit == "ms" else "gflop": problem.cost(candidate)}
    return Schedule(
        schema=2,
        model=model.identity,
        scheduler=problem.table(candidate.num_steps).scheduler,
        guidance=problem.guidance,
        deep_start=candidate.deep_start,
        selector=candidate.selector,
        mask=candidate.mask,
        steps=candidate.steps,
        found_by=FoundBy(
            candidate.strategy,
            {"name": candidate.name, "budget": str(problem.budget), **arguments},
            options.seed,
            made_by,
        ),
        measured={**scored.quality, **cost},
    )
