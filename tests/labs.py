"""Labs, with a tiny model and without: there with the papers' problems, made-up figures and calibrations by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np

from hemiola_export.errors import UnsupportedSolverError
from hemiola_export.model import Model, load_model
from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.cost_table import CostRow, CostTable
from hemiola_runtime.machine import Machine
from hemiola_runtime.manifest import BackendSpec
from hemiola_runtime.schedule import FoundBy, ModelIdentity, Schedule, SchedulerIdentity, TokenSelector
from hemiola_runtime.solver_table import SolverTable
from hemiola_search.budget import Budget, budget_from_text
from hemiola_search.calibration import MAX_LAG, Calibration
from hemiola_search.costs import Costs, FlopsModel
from hemiola_search.lab import Lab
from hemiola_search.problem import Candidate, Problem, Scored, SearchOptions
from hemiola_search.problems import problem_for
from hemiola_search.store import Store
from models import save_tiny_model, save_tiny_text_model, tiny_dit, tiny_pixart

Table = Callable[[int], SolverTable]

SELECTOR: Final = TokenSelector("value_norm", 0.0625, 0.6, 2, 0)
DIT_XL_2: Final = FlopsModel(width=1152, num_tokens=256, num_blocks=28, rows_per_image=2)  # at 256 × 256, guided
PIXART_XL_2: Final = replace(DIT_XL_2, num_text_tokens=120)
OPTIONS: Final = SearchOptions(
    v_min=0,
    v_max=None,
    selective="tokens",
    token_ratio=0.25,
    deep_ratio=0.5,
    selector=SELECTOR,
    max_order=2,
    guidance_scale=3.0,
    num_images=2,
    num_held_out=3,
    effort="quick",
    seed=5,
)


def table_of(evaluations: Callable[[int], int]) -> Table:
    """Make tables of a sampler that takes so many evaluations for so many steps; 0 is a number that it refuses."""

    def table(num_steps: int) -> SolverTable:
        count = evaluations(num_steps)
        if not count:
            raise UnsupportedSolverError(f"no {num_steps} steps")
        identity = SchedulerIdentity("FakeScheduler", {}, num_steps, tuple(float(t) for t in reversed(range(count))))
        return SolverTable(1, identity, 1.0, (1.0,) * count, (((1.0, 0.0),),) * count, 0.0)

    return table


def paper_problem(
    num_steps: int,
    budget: str | Budget = "1",
    *,
    table: Table | None = None,
    flops: FlopsModel = DIT_XL_2,
    costs: Costs | None = None,
    **options: Any,
) -> Problem:
    """State a problem on DiT-XL/2, or PixArt's with the FLOPs of PIXART_XL_2, with ProCache's numbers."""
    papers = replace(OPTIONS, v_min=1, token_ratio=0.15, deep_ratio=0.25)
    side = round(flops.num_tokens**0.5)
    return Problem(
        table=table_of(lambda count: count) if table is None else table,
        num_inference_steps=num_steps,
        guidance="classifier_free",
        options=replace(papers, **options),
        latent_shape=(4, 2 * side, 2 * side),
        grid=(side, side),
        num_blocks=flops.num_blocks,
        branches=("attention", "mlp") if flops.num_text_tokens is None else ("attention", "cross", "mlp"),
        costs=flops if costs is None else costs,
        flops=flops,
        budget=budget if isinstance(budget, Budget) else budget_from_text(budget),
    )


def cost_row(kind: str, milliseconds: float, batch_size: int = 1, tokens: int = 0) -> CostRow:
    """Make a row of a cost table whose launches all took as long."""
    return CostRow(kind, tokens, batch_size, milliseconds, milliseconds, milliseconds, 10)


def cost_table(rows: Sequence[CostRow], **changes: Any) -> CostTable:
    """Make a table with 2 ms of conditioning for 50 steps, and 4 ms for the decoder."""
    batch_sizes = {found.batch_size for found in rows}
    around = [
        cost_row(kind, time, size) for size in batch_sizes for kind, time in (("conditioning", 2), ("vae_decoder", 4))
    ]
    made = CostTable(
        schema=1,
        model=ModelIdentity("dit", "paper", "ab" * 32, (4, 32, 32)),
        guidance="classifier_free",
        deep_start=None,
        selector=None,
        mask=None,
        has_block_counts=False,
        backend=BackendSpec("onnxruntime", "1.23", None, ()),
        precision="fp32",
        gpu=None,
        machine=Machine("A Processor", 16, "Linux x86_64", "3.11.7"),
        num_steps=50,
        rows=(*rows, *around),
        made_by=MadeBy.here(),
    )
    return replace(made, **changes)


def load_tiny(folder: Path, *, num_blocks: int = 2) -> Model:
    """Make a random DiT of pixels, images of 8 × 8, which predicts v: as one of noise it would blow them up."""
    transformer = tiny_dit(num_blocks=num_blocks, channels=1, has_learned_sigma=False)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return load_model(str(save_tiny_model(folder, transformer=transformer, scheduler=scheduler, has_vae=False)))


def load_tiny_text(folder: Path, *, num_blocks: int = 2) -> Model:
    """Make a random PixArt of pixels, images of 8 × 8."""
    transformer = tiny_pixart(num_blocks=num_blocks, channels=3, has_learned_sigma=False)
    return load_model(str(save_tiny_text_model(folder, transformer=transformer, has_vae=False)))


def tiny_problem(
    model: Model, budget: str = "2", num_steps: int = 6, scheduler: Any | None = None, **options: Any
) -> Problem:
    """State a problem on a tiny model."""
    chosen = replace(OPTIONS, **options)
    return problem_for(model, scheduler or model.scheduler, num_steps, chosen, budget_from_text(budget))


def plain(candidate: Candidate) -> str:
    """Return the steps of a candidate as letters, each with the forward's whatever it forecasts."""
    return "".join(step.forward.symbol for step in candidate.steps)


def schedule_of(candidate: Candidate) -> Schedule:
    """Make the schedule of a candidate; raises ValueError where it is none."""
    return Schedule(
        schema=2,
        model=ModelIdentity("dit", "paper", "ab" * 32, (4, 32, 32)),
        scheduler=table_of(lambda _: len(candidate.steps))(candidate.num_steps).scheduler,
        guidance="classifier_free",
        deep_start=candidate.deep_start,
        selector=candidate.selector,
        mask=candidate.mask,
        steps=candidate.steps,
        found_by=FoundBy(candidate.strategy, {"name": candidate.name}, 0, MadeBy.here()),
        measured={},
    )


def error_by_chance(candidate: Candidate) -> float:
    """Return an error that the key of a candidate decides, from 0 to 1."""
    return int(candidate.key[:8], 16) / 16**8


@dataclass
class FakeWorkers:
    """Workers that run nothing.

    Attributes:
        errors: the error that a candidate gets.
        calibration: what they measure.
        ran: what was scored, in order.
        num_calibrations: how often was calibrated.
        backwards: whether results come in another order than candidates went.
    """

    errors: Callable[[Candidate], float] = error_by_chance
    calibration: Calibration | None = None
    ran: list[Candidate] = field(default_factory=list)
    num_calibrations: int = 0
    backwards: bool = False

    def score(self, candidates: Sequence[Candidate], on_scored: Callable[[Scored], None]) -> None:
        for candidate in reversed(candidates) if self.backwards else candidates:
            self.ran.append(candidate)
            error = self.errors(candidate)
            on_scored(Scored(candidate, {"relative_l2": (error, error)}, {}))

    def calibrate(self) -> Calibration:
        assert self.calibration is not None, "nothing was to be calibrated"
        self.num_calibrations += 1
        return self.calibration


def lab_of(problem: Problem, workers: FakeWorkers | None = None, store: Store | None = None) -> Lab:
    """Make a lab with fake workers, which by default have a calibration by chance."""
    if workers is None:
        workers = FakeWorkers(calibration=calibration_of(problem))
    return Lab(problem, workers, Store(None) if store is None else store, "context", lambda _: None)


def calibration_of(problem: Problem, seed: int = 0) -> Calibration:
    """Draw the calibration of some model whose outputs wander smoothly, the faster the later."""
    num_steps, num_branches, num_blocks = problem.num_evaluations, len(problem.branches), problem.num_blocks
    draw = np.random.default_rng(seed)
    speed = np.linspace(0.2, 1, num_steps)[:, None]
    of_step = np.cumsum(np.cumsum(speed * draw.normal(size=(num_steps, 6)), axis=0), axis=0)  # by whose cache it is
    outputs = np.zeros((2, *(num_steps,) * 3))
    for products in outputs:
        for t in range(num_steps):
            drawn = of_step[: t + 1] @ (np.eye(6) + 0.1 * draw.normal(size=(6, 6)))
            products[t, : t + 1, : t + 1] = drawn @ drawn.T
    lags = np.arange(1, MAX_LAG + 1)[:, None, None, None] * speed[:, 0, None, None]
    errors = lags * draw.uniform(0.01, 0.05, size=(1, num_steps, num_branches, num_blocks))
    errors *= np.arange(num_steps)[:, None, None] >= np.arange(1, MAX_LAG + 1)[:, None, None, None]
    return Calibration(
        outputs=outputs[0],
        residual_outputs=outputs[1],
        sensitivity=np.concatenate([[0.0], draw.uniform(0.5, 1.5, num_steps - 1)]),
        layer_errors=errors,
        layer_changes=errors * draw.uniform(0.1, 1, size=(num_branches, num_blocks)),
        residual_ratios=np.concatenate([[1.0], draw.uniform(0.9, 1.1, num_steps - 1)]),
    )
