from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hemiola_export.model import Model
from hemiola_export.solver import measure_solver
from hemiola_runtime.errors import BundleError
from hemiola_search import problems
from hemiola_search.budget import Budget
from hemiola_search.costs import FlopsModel, MeasuredCosts
from hemiola_search.errors import SearchError
from hemiola_search.problems import SolverTables, problem_for
from labs import OPTIONS, cost_row, cost_table, load_tiny, load_tiny_text, tiny_problem
from models import TEXT_TOKENS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny(tmp_path_factory.mktemp("problems") / "model")


def test_a_problem_is_of_its_model_and_sampler(model: Model) -> None:
    problem = tiny_problem(model, "3")
    assert (problem.latent_shape, problem.grid, problem.num_tokens) == ((1, 8, 8), (4, 4), 16)
    assert (problem.num_blocks, problem.branches, problem.deep_start) == (2, ("attention", "mlp"), 1)
    assert problem.costs == problem.flops == FlopsModel(32, 16, 2, 2)
    assert (problem.num_evaluations, problem.scheduler.label) == (6, "DDIM-6")
    assert problem.budget == Budget(3, "full")


def test_a_model_of_prompts_has_cross_attention_and_shares_its_modulation(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    problem = tiny_problem(load_tiny_text(tmp_path_factory.mktemp("problems") / "model"))
    assert problem.branches == ("attention", "cross", "mlp")
    assert problem.flops == FlopsModel(48, 16, 2, 2, TEXT_TOKENS)


@pytest.mark.parametrize(("scale", "guidance", "rows"), [(3.0, "classifier_free", 2), (0.0, "none", 1)])
def test_without_a_guidance_scale_an_image_is_one_row(model: Model, scale: float, guidance: str, rows: int) -> None:
    problem = tiny_problem(model, guidance_scale=scale)
    assert (problem.guidance, problem.flops.rows_per_image) == (guidance, rows)


def test_a_solver_is_measured_once_for_each_number_of_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def recorded(scheduler: Any, num_steps: int) -> Any:
        measured.append(num_steps)
        return measure_solver(scheduler, num_steps)

    monkeypatch.setattr(problems, "measure_solver", recorded)
    tables = SolverTables(model.scheduler)
    assert [tables(count).scheduler.num_inference_steps for count in (6, 5, 6, 5, 6)] == [6, 5, 6, 5, 6]
    assert measured == [6, 5]


def test_measured_costs_take_the_place_of_flops(model: Model) -> None:
    table = replace(cost_table([cost_row("full", 10), cost_row("reuse", 1)]), model=model.identity)
    problem = problem_for(model, model.scheduler, 6, OPTIONS, Budget(2, "full"), tables=[table])
    assert isinstance(problem.costs, MeasuredCosts)
    assert problem.costs.unit == "ms"
    assert problem.flops == FlopsModel(32, 16, 2, 2)
    with pytest.raises(SearchError, match="at batch 1, not at 2"):
        problem_for(model, model.scheduler, 6, OPTIONS, Budget(2, "full"), tables=[table], batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"weights_sha256": "f" * 64}}, "weights ffffffffffff"),
        ({"model": {"latent_shape": (1, 16, 16)}}, r"latents of shape \[1, 16, 16\]"),
        ({"guidance": "none"}, "guidance `none`"),
    ],
)
def test_costs_of_another_model_are_refused(model: Model, changes: dict[str, Any], message: str) -> None:
    table = cost_table([cost_row("full", 10)], guidance=changes.get("guidance", "classifier_free"))
    table = replace(table, model=replace(model.identity, **changes.get("model", {})))
    with pytest.raises(BundleError, match=f"was measured of .*{message}.*, but here is .*`hemiola measure BUNDLE`"):
        problem_for(model, model.scheduler, 6, OPTIONS, Budget(2, "full"), tables=[table])


def test_costs_of_a_model_that_is_called_otherwise_are_its_own(model: Model) -> None:
    table = replace(cost_table([cost_row("full", 10)]), model=replace(model.identity, name="another name"))
    assert problem_for(model, model.scheduler, 6, OPTIONS, Budget(2, "full"), tables=[table]).limit > 0
