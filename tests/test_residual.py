"""The residual of the whole model as a cache: what it costs less, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch

from bundles import make_bundle, schedule_from_rhythm
from forward_runs import after, assert_alike, run
from hemiola_export.conditioning import ForwardConfig
from hemiola_export.families import open_transformer
from hemiola_export.forwards import Deep, Full, Residual, Reuse
from hemiola_export.model import load_model
from hemiola_export.named_module import Tensors
from hemiola_runtime.graph_set import read_graph_set
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.schedule import keeps_layers, keeps_residual
from models import save_tiny_model, tiny_dit
from test_forwards import given_tensors, stale_tensors

FAMILY: Final = open_transformer(tiny_dit())
CONFIG: Final = ForwardConfig(is_guided=True, state_rows=1, deep_start=2, keeps_residual=True)
NAME: Final = "residual_cache.all"


def test_the_residual_of_a_step_and_its_embedded_tokens_make_the_step() -> None:
    tensors = given_tensors(FAMILY, CONFIG)
    full = run(Full(FAMILY, CONFIG), tensors)
    again = run(Residual(FAMILY, CONFIG), after(tensors, full))
    assert_alike(again, {"next_state": full["next_state"]})


def test_deep_leaves_a_residual_of_its_own() -> None:
    tensors = stale_tensors(FAMILY, CONFIG)
    deep = run(Deep(FAMILY, CONFIG), tensors)
    again = run(Residual(FAMILY, CONFIG), after(tensors, deep))
    assert_alike(again, {"next_state": deep["next_state"]})
    assert not torch.equal(deep[f"next_{NAME}"], tensors[NAME])


def test_forecasts_weigh_the_residuals_of_the_last_full_steps() -> None:
    tensors = stale_tensors(FAMILY, CONFIG)
    generator = torch.Generator().manual_seed(3)
    older = torch.randn(tensors[NAME].shape, generator=generator)
    weighed = 1.5 * tensors[NAME] - 0.5 * older
    expected = run(Residual(FAMILY, CONFIG), tensors | {NAME: weighed})
    given = tensors | {f"{NAME}.1": older, "forecast": torch.tensor([1.5, -0.5])}
    assert_alike(run(Residual(FAMILY, CONFIG, order=1), given), expected)


def test_it_reads_one_tensor_where_reuse_reads_one_for_each_layer() -> None:
    residual, reuse = Residual(FAMILY, CONFIG), Reuse(FAMILY, CONFIG)
    assert [spec.name for spec in residual.reads] == [NAME]
    assert len(reuse.reads) == 2 * len(FAMILY.blocks)
    assert {spec.name for spec in residual.inputs} < {spec.name for spec in reuse.inputs} | {NAME}


def test_full_steps_leave_no_layers_where_nobody_reads_them() -> None:
    config = replace(CONFIG, deep_start=None, keeps_layers=False)
    tensors: Tensors = given_tensors(FAMILY, config)
    assert set(run(Full(FAMILY, config), tensors)) == {"next_state", f"next_{NAME}"}


@pytest.mark.parametrize(
    ("kinds", "layers", "residual"),
    [
        (["full"], False, False),
        (["full", "reuse"], True, False),
        (["full", "residual_2"], False, True),
        (["full", "deep", "residual"], True, True),
    ],
)
def test_what_full_steps_leave_follows_from_the_kinds_of_steps(kinds: list[str], layers: bool, residual: bool) -> None:
    assert (keeps_layers(kinds), keeps_residual(kinds)) == (layers, residual)


@pytest.mark.parametrize("rhythm", ["FF¹F²²", "FFC¹DF1²"], ids=["alone", "beside layers"])
def test_engines_forecast_residuals_as_pytorch_does(rhythm: str, tmp_path: Path) -> None:
    model = load_model(str(save_tiny_model(tmp_path / "model")))
    schedule = schedule_from_rhythm(model, model.scheduler, rhythm)
    made = make_bundle(tmp_path, tmp_path / "model", {"mine": schedule}, max_batch_size=2)  # compares with PyTorch
    with Sampler.open(made.bundle) as sampler:
        result = sampler.generate(labels=[1, 2], seeds=0, schedule="mine")
        assert sampler.manifest.parity["mine"] < 1e-4
    assert result.report.rhythm == rhythm
    (graphs,) = read_graph_set(made.graphs).precisions.values()
    left = {spec.name for spec in graphs.graphs["full"].outputs}
    assert ("next_attention_cache.0" in left) == ("C" in rhythm)
