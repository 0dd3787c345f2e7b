"""Schedules scored on many machines: the nodes of a Ray cluster, each of which has Hemiola's extra `ray` installed.

Every GPU of the cluster has a worker of its own, and so has every node without one. The model and the images are sent
to them; figures come back. What is proposed does not depend on how many workers there are, and each schedule is run by
one worker alone, so a search finds the same as on one machine of their kind.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import ray
import torch
from ray.util.actor_pool import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hemiola_runtime.errors import HemiolaError
from hemiola_search.calibration import Calibration
from hemiola_search.errors import SearchError
from hemiola_search.laboratory import Here, Site
from hemiola_search.problem import Candidate, Scored

ANSWERS_WITHIN_SECONDS: Final = 10.0

logger = logging.getLogger(__name__)


class Worker:
    """Scores candidates at a site; lives on one node."""

    def __init__(self, site: Site, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._here = Here(site, lambda _: None)

    def score(self, candidate: Candidate) -> Scored:
        """Score one candidate."""
        scored: list[Scored] = []
        self._here.score([candidate], scored.append)
        return scored[0]

    def calibrate(self) -> Calibration:
        """Measure the uncached run."""
        return self._here.calibrate()


class Fleet:
    """Workers: those of a cluster. The connection to it is shared by all fleets of a process, and ends with it."""

    def __init__(self, site: Site, on_step: Callable[[int], None], *, address: str) -> None:
        """Start the workers.

        Args:
            site: what they score at.
            on_step: told after every step of how many images it was; of all of a schedule when it comes back.
            address: of the cluster, as Ray takes it: `auto`, `host:port`, `ray://host:port`; `local` for this machine.

        Raises:
            SearchError: there is no such cluster.
        """
        self._on_step = on_step
        if not ray.is_initialized():
            try:
                _check_that_somebody_answers(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            except (OSError, ValueError, RuntimeError) as error:
                raise SearchError(
                    f"no Ray cluster answers at {address!r}: {error}. Start one with `ray start --head`, and give its "
                    "address with --ray"
                ) from error
        sent = ray.put(site)
        self._workers = [_worker(node, sent) for node in ray.nodes() if node["Alive"] for _ in range(_places(node))]
        logger.info("%d workers in the cluster at %s", len(self._workers), address)

    def score(self, candidates: Sequence[Candidate], on_scored: Callable[[Scored], None]) -> None:
        pool = ActorPool(self._workers)
        with _errors_as_they_were():
            scores = pool.map_unordered(lambda worker, candidate: worker.score.remote(candidate), list(candidates))
            for scored in scores:
                for _ in scored.candidate.steps:
                    self._on_step(len(scored.samples["relative_l2"]))
                on_scored(scored)

    def calibrate(self) -> Calibration:
        with _errors_as_they_were():
            measured: Calibration = ray.get(self._workers[0].calibrate.remote())
        return measured


@contextlib.contextmanager
def _errors_as_they_were() -> Iterator[None]:
    """Raise what a worker refused, without the place where it did."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HemiolaError):
            raise error.cause from None
        raise


def _check_that_somebody_answers(address: str) -> None:
    """Look for a cluster at a host and port: Ray itself would wait for minutes.

    Raises:
        OSError: nobody answers there.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_SECONDS).close()


def _places(node: dict[str, Any]) -> int:
    """Return how many workers a node has."""
    return max(1, int(node["Resources"].get("GPU", 0)))


def _worker(node: dict[str, Any], site: Any) -> Any:
    num_cpus = max(1, int(node["Resources"].get("CPU", 1)) // _places(node))
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    num_gpus = 1 if node["Resources"].get("GPU", 0) else 0
    # No CPU is reserved: the two sites of a search share their nodes, and are never busy at once.
    made = ray.remote(num_cpus=0, num_gpus=num_gpus / 2, scheduling_strategy=here)(Worker)
    return made.remote(site, num_cpus)
