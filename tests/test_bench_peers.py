from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch

from bundles import Made
from hemiola_export.model import load_model
from hemiola_runtime.sampler import Sampler

SCRIPTS: Final = Path(__file__).parents[1] / "scripts"
NUM_STEPS: Final = 6
SEEDS: Final = ([7, 8], [1, 2])


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("peers")


@pytest.fixture
def record(latent: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the script writes of a small bundle."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    out = tmp_path / "peers.json"
    few = ["--batch-size", 2, "--repeats", 1, "--images", 3]
    command = ["bench_peers.py", latent.bundle, "--model", latent.model, "--out", out, *few]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    importlib.import_module("bench_peers").main()
    written: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return written


def _loop(peers: ModuleType, latent: Made, peer: Any, guidance_scale: float = 4.0) -> Any:
    model = load_model(str(latent.model))
    settings = {"num_steps": NUM_STEPS, "guidance_scale": guidance_scale, "dtype": torch.float32}
    return peers.Loop(model, model.scheduler, peer, **settings)


def _calls(loop: Any) -> int:
    """Return how often a block's MLP ran in one request."""
    ran: list[None] = []
    handles = [
        block.ff.net[0].register_forward_hook(lambda *_: ran.append(None))
        for block in loop.transformer.transformer_blocks
    ]
    loop.draw(*SEEDS)
    for handle in handles:
        handle.remove()
    return len(ran)


def test_everybody_draws_the_same_images(record: dict[str, Any]) -> None:
    rows = {(row["who"], row["how"]): row for row in record["rows"]}
    assert rows["diffusers", "without a cache"]["relative_l2"] == 0
    assert rows["diffusers", "without a cache"]["over_diffusers"] == 1
    assert 0 < rows["Hemiola", "full"]["relative_l2"] < 1e-4  # the engines do what diffusers' own modules do
    assert rows["Hemiola", "full"]["over_own_uncached"] == 1
    assert rows["Hemiola", "fewer"]["relative_l2"] == pytest.approx(
        rows["diffusers", "3 steps"]["relative_l2"], rel=1e-3
    )
    assert record["num_images"] == 4
    page = importlib.import_module("bench_peers").table(record).splitlines()
    assert len(page) == 2 + len(rows)
    assert [
        line
        for line in page
        if line.startswith("| diffusers | without a cache | ") and " | 1.00× | 1.00× | 0 (0" in line
    ]


def test_caches_of_diffusers_leave_work_out_and_forget_the_request_before(peers: ModuleType, latent: Made) -> None:
    uncached = _loop(peers, latent, peers.Peer("diffusers", "without a cache"))
    assert _calls(uncached) == 4 * NUM_STEPS
    found = list(peers.diffusers_peers(torch.ones(NUM_STEPS)))
    assert len({peer.how for peer in found}) == len(found)
    fewer = {}
    for peer in found:
        loop = _loop(peers, latent, peer)
        fewer[peer.how] = _calls(loop)
        first, second = loop.draw(*SEEDS), loop.draw(*SEEDS)
        np.testing.assert_array_equal(first, second)
    assert {how.partition(",")[0] for how, calls in fewer.items() if calls < 4 * NUM_STEPS} >= {
        "MagCache",
        "TaylorSeer",
    }


def test_guidance_is_that_of_a_bundle(peers: ModuleType, latent: Made) -> None:
    with Sampler.open(latent.bundle) as sampler:
        scale = sampler.manifest.pipeline.guidance_scale
        schedule = sampler.schedules["full"]
        mine = sampler.generate(seeds=SEEDS[0], labels=SEEDS[1], schedule="full").latents
    module = importlib.import_module("hemiola_export.model")
    model = load_model(str(latent.model))
    loop = peers.Loop(
        model,
        module.scheduler_from_identity(schedule.scheduler),
        peers.Peer("diffusers", "without a cache"),
        num_steps=schedule.scheduler.num_inference_steps,
        guidance_scale=scale,
        dtype=torch.float32,
    )
    np.testing.assert_allclose(loop.draw(*SEEDS), mine, rtol=1e-3, atol=1e-4)


def test_magnitude_ratios_are_of_what_all_blocks_add(peers: ModuleType, latent: Made) -> None:
    loop = _loop(peers, latent, peers.Peer("diffusers", "without a cache"))
    ratios = peers.magnitude_ratios(loop, *SEEDS)
    assert ratios.shape == (NUM_STEPS,)
    assert ratios[0] == 1
    assert ratios.isfinite().all()
    assert (ratios[1:] != 1).all()
    assert _calls(loop) == 4 * NUM_STEPS  # the hooks are gone


def test_cache_dit_leaves_work_out(peers: ModuleType, latent: Made) -> None:
    pytest.importorskip("cache_dit")
    found = list(peers.cache_dit_peers())
    assert len(found) == 6
    for peer in found:
        loop = _loop(peers, latent, peer)
        np.testing.assert_array_equal(loop.draw(*SEEDS), loop.draw(*SEEDS))


def test_without_guidance_or_labels_it_is_refused(
    unguided: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    command = ["bench_peers.py", unguided.bundle, "--model", unguided.model, "--out", tmp_path / "peers.json"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit, match="models of labels, searched with guidance"):
        importlib.import_module("bench_peers").main()
    assert not (tmp_path / "peers.json").exists()
