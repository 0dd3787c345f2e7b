"""Where strategies have their schedules scored: what was scored before is not run again, and everything is counted."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.schedule import FULL
from hemiola_search.calibration import Calibration
from hemiola_search.errors import SearchError
from hemiola_search.problem import Candidate, Problem, Scored
from hemiola_search.store import Store


class Workers(Protocol):
    """Who runs candidates: this process, or others."""

    def score(self, candidates: Sequence[Candidate], on_scored: Callable[[Scored], None]) -> None:
        """Score candidates; each is handed on as soon as it is."""

    def calibrate(self) -> Calibration:
        """Measure the uncached run."""


class Lab:
    """Scores candidates on the images of the search.

    Attributes:
        problem: what is searched for.
        tried: everything that was scored and does not diverge, in order.
    """

    def __init__(
        self, problem: Problem, workers: Workers, store: Store, context: str, on_stage: Callable[[str], None]
    ) -> None:
        """Set up.

        Args:
            problem: what is searched for.
            workers: who runs candidates.
            store: what was evaluated before.
            context: digest of all but the candidate that its figures depend on.
            on_stage: told what is being done.
        """
        self.problem = problem
        self.tried: list[Scored] = []
        self._workers = workers
        self._store = store
        self._context = context
        self._on_stage = on_stage

    def score(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """Score candidates, in their order; equal ones are run once."""
        found = {candidate.key: self._known(candidate) for candidate in candidates}
        missing = {candidate.key: candidate for candidate in candidates if found[candidate.key] is None}

        def keep(scored: Scored) -> None:
            value = {"samples": scored.samples, "totals": scored.totals, "path": scored.path}
            self._store.put(self._key(scored.candidate.key), value)
            found[scored.candidate.key] = scored

        if missing:
            first = next(iter(missing.values()))
            self._on_stage(f"{first.strategy} {first.name}" + (f" and {n} more" if (n := len(missing) - 1) else ""))
            self._workers.score(list(missing.values()), keep)
        scored = []
        for candidate in candidates:
            same = found[candidate.key]
            assert same is not None, "every candidate was scored"
            scored.append(Scored(candidate, same.samples, same.totals, same.path))
        self.tried += [one for one in scored if not one.diverges]
        return scored

    def uncached(self) -> Scored:
        """Return the figures of the uncached run itself."""
        steps = (FULL,) * self.problem.num_evaluations
        return self.score([Candidate("full", "uncached", self.problem.num_inference_steps, steps)])[0]

    def best(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """Score candidates and return them, the best first."""
        return sorted(self.score(candidates), key=lambda scored: scored.error)

    def start(self) -> Scored:
        """Return the best of what was tried by others, is for the problem's own steps and keeps to the limit.

        Raises:
            SearchError: nothing does.
        """
        mine = [
            scored
            for scored in self.tried
            if scored.candidate.num_steps == self.problem.num_inference_steps and self.problem.fits(scored.candidate)
        ]
        if not mine:
            raise SearchError(f"no schedule that was tried keeps to {self.problem.budget}")
        return min(mine, key=lambda scored: scored.error)

    @cached_property
    def calibration(self) -> Calibration:
        """What the uncached run shows; measured when it is first asked for."""
        known = self._store.get(self._key("calibration"))
        if known is None:
            self._on_stage("calibration")
            measured = self._workers.calibrate()
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **asdict(measured))
            known = base64.b64encode(buffer.getvalue()).decode()
            self._store.put(self._key("calibration"), known)
        with np.load(io.BytesIO(base64.b64decode(known)), allow_pickle=False) as arrays:
            return Calibration(**arrays)

    def _known(self, candidate: Candidate) -> Scored | None:
        value: dict[str, Any] | None = self._store.get(self._key(candidate.key))
        if value is None:
            return None
        samples = {name: tuple(values) for name, values in value["samples"].items()}
        return Scored(candidate, samples, value["totals"], tuple(value["path"]))

    def _key(self, what: str) -> str:
        return sha256_of(f"{self._context} {what}".encode())
