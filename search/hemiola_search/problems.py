"""State what is searched for, of a model and a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from hemiola_export.model import Model
from hemiola_export.solver import measure_solver
from hemiola_runtime.cost_table import CostTable
from hemiola_runtime.solver_table import SolverTable
from hemiola_search.budget import Budget
from hemiola_search.costs import FlopsModel, MeasuredCosts
from hemiola_search.problem import Problem, SearchOptions

Guidance = Literal["classifier_free", "none"]


class SolverTables:
    """Solver tables of a scheduler by number of steps; each is measured once."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._known: dict[int, SolverTable] = {}

    def __call__(self, num_steps: int) -> SolverTable:
        """Return the table for a number of steps.

        Raises:
            UnsupportedSolverError: there is none.
        """
        if num_steps not in self._known:
            self._known[num_steps] = measure_solver(self._scheduler, num_steps)
        return self._known[num_steps]


def problem_for(
    model: Model,
    scheduler: Any,
    num_inference_steps: int,
    options: SearchOptions,
    budget: Budget,
    *,
    tables: Sequence[CostTable] = (),
    batch_size: int = 1,
) -> Problem:
    """State what is searched for.

    Args:
        model: the model.
        scheduler: a diffusers scheduler object.
        num_inference_steps: T.
        options: what the user asks for; without a guidance scale every image is one row.
        budget: how much a schedule may cost.
        tables: what forwards cost where they will run; the FLOPs model stands in for none.
        batch_size: of the measurements that count.

    Raises:
        BundleError: the costs were measured of another model.
        SearchError: nothing was measured for the batch size.
    """
    family = model.family
    guidance: Guidance = "classifier_free" if options.guidance_scale else "none"
    for measured in tables:
        measured.check_model(model.identity, guidance)

    flops = FlopsModel(
        width=family.width,
        num_tokens=family.num_tokens,
        num_blocks=len(family.blocks),
        rows_per_image=2 if guidance == "classifier_free" else 1,
        num_text_tokens=None if model.text is None else model.text.tokenizer.num_tokens,
    )
    return Problem(
        table=SolverTables(scheduler),
        num_inference_steps=num_inference_steps,
        guidance=guidance,
        options=options,
        latent_shape=family.latent_shape,
        grid=family.grid,
        num_blocks=len(family.blocks),
        branches=family.branches,
        costs=MeasuredCosts(tables, flops, batch_size) if tables else flops,
        flops=flops,
        budget=budget,
    )
