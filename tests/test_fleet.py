"""Workers of a Ray cluster, each in a process of its own: this test's cluster is of this machine alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed")

SCORES: Final = """
import json, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from hemiola_runtime.errors import HemiolaError
from hemiola_search.fleet import Fleet
from hemiola_search.laboratory import Here, Site
from hemiola_search.strategies.procache import plain_candidates
from hemiola_search.tasks import Subjects
from labs import load_tiny, tiny_problem

said = {}
for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"):
    try:
        Fleet(None, print, address=address)
    except HemiolaError as error:
        said[address] = str(error)

torch.set_num_threads(1)
model = load_tiny(Path(sys.argv[1]) / "model")
problem = tiny_problem(model, v_max=4)
site = Site(model, problem, Subjects(), None, "searched")
steps, candidates = [], plain_candidates(problem)
workers = {"here": Here(site, lambda _: None), "there": Fleet(site, steps.append, address="local")}
for name, worker in workers.items():
    scored = []
    worker.score(candidates, scored.append)
    said[name] = {of.candidate.key: of.samples for of in scored}
    said[f"calibrated {name}"] = worker.calibrate().outputs.tolist()
said |= {"steps": steps, "rhythms": len(candidates)}
try:
    workers["there"].score([replace(candidates[0], num_steps=10**6)], print)
except HemiolaError as error:
    said["refused"] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds by itself, and with a fleet."""
    command = [sys.executable, "-c", SCORES, str(tmp_path_factory.mktemp("fleet")), str(Path(__file__).parent)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_fleet_finds_the_same_as_one_process(said: dict[str, Any]) -> None:
    here, there = said["here"], said["there"]
    assert len(there) == said["rhythms"] > 2
    assert there.keys() == here.keys()
    for key, figures in here.items():
        for name, values in figures.items():
            assert there[key][name] == pytest.approx(values, rel=1e-3)  # of other numbers of threads
    np.testing.assert_allclose(said["calibrated there"], said["calibrated here"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_fleet_tells_how_far_it_is(said: dict[str, Any]) -> None:
    assert said["steps"] == [2] * 6 * said["rhythms"]  # images, of each step


@pytest.mark.slow
def test_what_a_worker_refuses_is_told_as_it_was(said: dict[str, Any]) -> None:
    kind, message = said["refused"]
    assert kind == "UnsupportedSolverError"
    assert "cannot make 1000000 steps" in message
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_where_nobody_answers_it_is_said_at_once(said: dict[str, Any], address: str) -> None:
    message = said[address]
    assert message.startswith(f"no Ray cluster answers at {address!r}: ")
    assert "`ray start --head`" in message
    assert "--ray" in message
