"""The search stage as one function: a model, a sampler and a budget become a schedule and a record of the trials."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from hemiola_export.errors import UnsupportedSolverError
from hemiola_export.model import Model
from hemiola_export.selection import check_selector
from hemiola_export.solver import measure_solver
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.schedule import FoundBy, Schedule
from hemiola_runtime.solver_table import SolverTable
from hemiola_search.costs import FlopsModel
from hemiola_search.errors import SearchError
from hemiola_search.evaluator import Evaluator
from hemiola_search.judge import Judge
from hemiola_search.problem import Candidate, Problem, Scored, SearchOptions, first_deep_block
from hemiola_search.record import Point, SearchRecord
from hemiola_search.strategies import BASELINES, STRATEGIES
from hemiola_search.strategies.published import published_candidate
from hemiola_search.tasks import Subjects, draw_task

HELD_OUT_SEED: Final = 1_000_000  # added to the seeds of held-out images: none of them was searched on
OTHER_BUDGETS: Final = (0.2, 0.26, 0.5)  # shares of T at which the record holds the baselines too

Guidance = Literal["classifier_free", "none"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gives.

    Attributes:
        schedule: the best that the strategy found.
        baselines: what every report compares it with, at its budget, by strategy.
        record: everything that was tried.
    """

    schedule: Schedule
    baselines: dict[str, Schedule]
    record: SearchRecord


def problem_for(
    model: Model, scheduler: Any, num_inference_steps: int, options: SearchOptions, guidance: Guidance
) -> Problem:
    """State what is searched for.

    Args:
        model: the model.
        scheduler: a diffusers scheduler object.
        num_inference_steps: T.
        options: what the user asks for.
        guidance: whether every image is two rows.
    """
    family = model.family

    @functools.cache
    def table(num_steps: int) -> SolverTable:
        return measure_solver(scheduler, num_steps)

    flops = FlopsModel(
        width=family.width,
        num_tokens=family.num_tokens,
        num_blocks=len(family.blocks),
        deep_start=first_deep_block(len(family.blocks), options.deep_ratio),
        rows_per_image=2 if guidance == "classifier_free" else 1,
        num_text_tokens=None if model.text is None else model.text.tokenizer.num_tokens,
    )
    return Problem(
        table=table,
        num_inference_steps=num_inference_steps,
        guidance=guidance,
        options=options,
        latent_shape=family.latent_shape,
        num_blocks=len(family.blocks),
        num_tokens=family.num_tokens,
        flops=flops,
    )


def find_schedule(
    model: Model,
    problem: Problem,
    strategy: str,
    judge: Judge | None,
    *,
    subjects: Subjects | None = None,
    on_step: Callable[[], None] = lambda: None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Found:
    """Search a schedule, and measure it and the baselines on images that were not searched on.

    Args:
        model: the model.
        problem: from `problem_for`.
        strategy: a key of STRATEGIES.
        judge: for agreement and Fréchet distance; None where there is none.
        subjects: prompts, for a model that draws them.
        on_step: told after every step that is computed.
        on_stage: told what is being done.

    Raises:
        SearchError: no schedule meets the constraints.
        UnsupportedSolverError: the sampler cannot be compiled.
    """
    options, subjects = problem.options, subjects or Subjects()
    problem.table(problem.num_inference_steps)  # refuse early what cannot be compiled
    if options.selective == "tokens":
        check_selector(options.selector, model.family, model.family.num_tokens)
    on_stage("uncached run")
    task = draw_task(model, problem, subjects, options.seed, options.num_images)
    searched = Evaluator(model, problem, task, None, on_step)
    tried: list[Scored] = []

    def score(candidate: Candidate) -> Scored:
        on_stage(f"{candidate.strategy} {candidate.name}")
        tried.append(searched.score(candidate))
        return tried[-1]

    best = STRATEGIES[strategy](problem, score)[0].candidate
    on_stage("uncached run of held-out images")
    first = options.seed + HELD_OUT_SEED
    task = draw_task(model, problem, subjects, first, options.num_held_out, skipped=options.num_images)
    held_out = Evaluator(model, problem, task, judge, on_step)
    compared = _comparison(problem, best, tried)
    final = [held_out.score_uncached()]
    for candidate in compared:
        on_stage(f"held-out images: {candidate.strategy} {candidate.name}")
        final.append(held_out.score(candidate))
    by_candidate = {scored.candidate: scored for scored in final}
    made_by = MadeBy.here("torch", "diffusers", "numpy")
    schedules = {
        name: _schedule(model, problem, by_candidate[candidate], made_by)
        for name, candidate in {strategy: best, **_baselines(problem)}.items()
    }
    record = SearchRecord(
        schema=2,
        model=model.identity.name,
        sampler=problem.scheduler.label,
        guidance_scale=options.guidance_scale,
        num_images=options.num_images,
        num_held_out=options.num_held_out,
        chosen=schedules[strategy].rhythm,
        points=tuple(
            [_point(problem, scored, "searched") for scored in tried]
            + [_point(problem, scored, "held_out") for scored in final]
        ),
        made_by=made_by,
        prompts=task.prompts,
    )
    chosen = schedules.pop(strategy)
    return Found(chosen, schedules, record)


def unmeasured_schedule(model: Model, problem: Problem) -> Schedule:
    """Return the published schedule without drawing a single image: on random weights there is nothing to judge.

    Raises:
        SearchError: none was published for these numbers.
        UnsupportedSolverError: the sampler cannot be compiled.
    """
    return _schedule(model, problem, Scored(published_candidate(problem), {}), MadeBy.here("torch", "diffusers"))


def _comparison(problem: Problem, best: Candidate, tried: list[Scored]) -> list[Candidate]:
    """What is measured on held-out images: the best, its rhythm without selective steps, baselines at all budgets."""
    plain = [scored.candidate for scored in tried if scored.candidate.name == best.name.removesuffix(" selective")]
    compared = [best, *plain, *_baselines(problem).values()]
    for share in OTHER_BUDGETS:
        budget = max(1, round(share * problem.num_evaluations))
        compared += _baselines(replace(problem, options=replace(problem.options, budget=budget))).values()
    return list(dict.fromkeys(compared))


def _baselines(problem: Problem) -> dict[str, Candidate]:
    """The baselines at the problem's budget; one that the solver refuses is left out."""
    found = {}
    for name in BASELINES:
        try:
            found[name] = STRATEGIES[name](problem, lambda candidate: Scored(candidate, {}))[0].candidate
        except (SearchError, UnsupportedSolverError):
            continue
    return found


def _schedule(model: Model, problem: Problem, scored: Scored, made_by: MadeBy) -> Schedule:
    candidate, options = scored.candidate, problem.options
    arguments = {key: value for key, value in asdict(options).items() if key not in ("seed", "selector")}
    return Schedule(
        schema=1,
        model=model.identity,
        scheduler=problem.table(candidate.num_steps).scheduler,
        guidance=problem.guidance,
        deep_start=problem.deep_start if candidate.is_deep else None,
        selector=options.selector if candidate.is_selective else None,
        steps=candidate.steps,
        found_by=FoundBy(candidate.strategy, {"name": candidate.name, **arguments}, options.seed, made_by),
        measured={**scored.quality, "tera_flops_per_image": problem.flops.schedule(candidate.steps) / 1e12},
    )


def _point(problem: Problem, scored: Scored, images: Literal["searched", "held_out"]) -> Point:
    candidate = scored.candidate
    return Point(
        strategy=candidate.strategy,
        name=candidate.name,
        num_steps=candidate.num_steps,
        rhythm="".join(step.forward.symbol for step in candidate.steps),
        tokens=max(step.tokens or 0 for step in candidate.steps),
        images=images,
        quality=scored.quality,
        tera_flops=problem.flops.schedule(candidate.steps) / 1e12,
    )
