"""Probes: schedules with a step of every kind, whose bundles are measured for what the kinds cost."""

from __future__ import annotations

from typing import Final

from hemiola_export.model import Model
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import DEEP, FULL, REUSE, Forward, FoundBy, Schedule, Step, tokens
from hemiola_search.errors import SearchError
from hemiola_search.problem import Candidate, Problem
from hemiola_search.strategies import toca
from hemiola_search.strategies.shortest_path import forecast_step

DEEP_PROBE: Final = "deep"  # with ProCache's deep blocks
ALL_PROBE: Final = "all"  # with ToCa's tokens in all blocks


def probe_schedules(model: Model, problem: Problem) -> dict[str, Schedule]:
    """Return the probes by name: one for ProCache's deep blocks, one for ToCa's tokens in all blocks.

    Raises:
        SearchError: the sampler has too few steps for a step of every kind.
    """
    most = problem.options.max_order
    forecasts = [forecast_step(f, order) for f in (Forward.REUSE, Forward.RESIDUAL) for order in range(1, most + 1)]
    some = max(1, problem.num_tokens // 4)
    deep = [] if problem.deep_start == problem.num_blocks else [DEEP, tokens(some)]
    counts = tuple((some,) * problem.num_blocks for _ in problem.branches[1:])
    selector = toca.recipe_of(problem).selector
    probes = {
        DEEP_PROBE: problem.candidate("probe", DEEP_PROBE, _steps(problem, most, [REUSE, *forecasts, *deep])),
        ALL_PROBE: Candidate(
            "probe", ALL_PROBE, problem.num_inference_steps, _steps(problem, 0, [REUSE, tokens(counts)]), 0, selector
        ),
    }
    made_by = MadeBy.here("torch", "diffusers")
    return {
        name: Schedule(
            schema=2,
            model=model.identity,
            scheduler=problem.scheduler,
            guidance=problem.guidance,
            deep_start=probe.deep_start,
            selector=probe.selector,
            mask=None,
            steps=probe.steps,
            found_by=FoundBy("probe", {"name": name}, 0, made_by),
            measured={},
        )
        for name, probe in probes.items()
    }


def _steps(problem: Problem, order: int, kinds: list[Step]) -> tuple[Step, ...]:
    """Return full steps, enough for forecasts of some order, one step of every kind, and full ones to the end."""
    steps = [*(FULL,) * (order + 1), *kinds]
    missing = problem.num_evaluations - len(steps)
    if missing < 0:
        raise SearchError(f"{problem.scheduler.label} has fewer than {len(steps)} steps: too few for one of every kind")
    return (*steps, *(FULL,) * missing)
