from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hemiola_export.model import Model
from hemiola_runtime.schedule import Forward, read_schedule, write_schedule
from hemiola_search.errors import SearchError
from hemiola_search.probes import probe_schedules
from hemiola_search.strategies.shortest_path import forecast_step, forecasts_of
from labs import load_tiny, load_tiny_text, tiny_problem


@pytest.fixture(scope="module", params=[load_tiny, load_tiny_text], ids=["dit", "pixart"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    load: Callable[[Path], Model] = request.param
    return load(tmp_path_factory.mktemp("probes") / "model")


@pytest.mark.parametrize("max_order", [0, 1, 2, 3])
def test_probes_have_a_step_of_every_kind_that_a_search_may_price(model: Model, max_order: int) -> None:
    problem = tiny_problem(model, num_steps=20, max_order=max_order)
    probes = probe_schedules(model, problem)
    kinds = {"reuse", *(f"{name}_{order}" for name in ("reuse", "residual") for order in range(1, max_order + 1))}
    assert kinds >= {forecast_step(forward, order).kind for forward, order in forecasts_of(problem)}
    assert set(probes["deep"].kinds) == {"full", "deep", "tokens", *kinds}
    assert set(probes["all"].kinds) == {"full", "tokens", "reuse"}


def test_probes_are_of_procaches_deep_blocks_and_of_all_of_them(model: Model) -> None:
    problem = tiny_problem(model, num_steps=20)
    deep, everywhere = (probe_schedules(model, problem)[name] for name in ("deep", "all"))
    assert (deep.deep_start, deep.selector, deep.has_block_counts) == (1, problem.options.selector, False)
    assert (everywhere.deep_start, everywhere.has_block_counts) == (0, True)
    (tokens,) = [step.tokens for step in everywhere.steps if step.forward is Forward.TOKENS]
    assert tokens == ((4, 4),) * (len(problem.branches) - 1)  # a quarter of 16 in both blocks
    assert everywhere.selector is not None
    assert everywhere.selector.score == ("attention" if model.text is None else "cross_attention_entropy")


def test_probes_are_schedules_that_are_written_and_read(model: Model, tmp_path: Path) -> None:
    problem = tiny_problem(model, num_steps=20)
    for name, probe in probe_schedules(model, problem).items():
        write_schedule(probe, tmp_path / f"{name}.json")
        assert read_schedule(tmp_path / f"{name}.json") == probe
        assert (probe.model, probe.scheduler) == (model.identity, problem.scheduler)
        assert probe.found_by.strategy == "probe"


def test_without_deep_blocks_there_is_nothing_deep_to_measure(model: Model) -> None:
    probe = probe_schedules(model, tiny_problem(model, num_steps=20, deep_ratio=0.0))["deep"]
    assert not {Forward.DEEP, Forward.TOKENS} & set(probe.counts)
    assert (probe.deep_start, probe.selector) == (None, None)


def test_too_few_steps_for_a_step_of_every_kind_are_refused(model: Model) -> None:
    # 3 full ones, of `reuse` and `residual` 1 + 2 + 2, `deep` and `tokens`
    assert len(probe_schedules(model, tiny_problem(model, num_steps=10))["deep"].steps) == 10
    with pytest.raises(SearchError, match="-9 has fewer than 10 steps: too few for one of every kind"):
        probe_schedules(model, tiny_problem(model, num_steps=9))
