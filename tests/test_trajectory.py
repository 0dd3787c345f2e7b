from __future__ import annotations

from dataclasses import replace
from typing import Final

import diffusers
import pytest
import torch

from forward_runs import relative
from hemiola_export import trajectory
from hemiola_export.families import open_transformer
from hemiola_export.solver import measure_solver
from hemiola_export.trajectory import Requests, Trajectory
from hemiola_runtime.schedule import FULL, REUSE, Step
from models import NUM_TOKENS, tiny_dit

LINE: Final = replace(REUSE, forecast=(2.0, -1.0))
CURVE: Final = replace(REUSE, forecast=(3.0, -3.0, 1.0))
SCHEDULER: Final = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")


def trajectory_of(*steps: Step) -> Trajectory:
    return Trajectory(open_transformer(tiny_dit()), measure_solver(SCHEDULER, len(steps)), steps, is_guided=True)


def requests_of(count: int) -> Requests:
    noise = torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return Requests({"labels": torch.arange(count)}, noise, torch.full((count,), 3.0))


@pytest.mark.parametrize(
    ("steps", "num_batches"),
    [((FULL, FULL, FULL, REUSE), 1), ((FULL, FULL, FULL, LINE), 2), ((FULL, FULL, FULL, CURVE), 3)],
)
def test_fewer_images_run_at_once_where_caches_of_older_steps_are_kept(
    steps: tuple[Step, ...], num_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory, "TOKENS_AT_ONCE", 6 * NUM_TOKENS)
    drawn = trajectory_of(*steps)
    parts = drawn.parts(requests_of(6))
    assert [len(part) for part in parts] == [6 // num_batches] * num_batches
    assert relative(drawn.run(requests_of(6)), drawn.run(requests_of(6), batch_size=6)) < 1e-5


@torch.inference_mode()
def test_a_forecast_reads_what_the_last_full_steps_left() -> None:
    moments = list(trajectory_of(FULL, FULL, LINE, FULL, REUSE, CURVE).walk(requests_of(2)))
    left = [moment.after.get("next_mlp_cache.3") for moment in moments]
    for index, sources in {2: [1, 0], 5: [3, 1, 0]}.items():
        names = ["mlp_cache.3", "mlp_cache.3.1", "mlp_cache.3.2"][: len(sources)]
        for name, source in zip(names, sources, strict=True):
            assert moments[index].before[name] is left[source]
