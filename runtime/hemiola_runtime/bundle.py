"""Open a bundle: every check that can be made before anything of it runs.

In this order: schema and paths (the manifest), links, sizes, digests. What is handed on are the very bytes that were
hashed: small files as `bytes`, the weight file as a mapping that stays open.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.codec import parse
from hemiola_runtime.errors import BundleError, IntegrityError, ScheduleError
from hemiola_runtime.graphs import WEIGHTS_FILE
from hemiola_runtime.manifest import Manifest, read_manifest
from hemiola_runtime.schedule import Schedule
from hemiola_runtime.solver_table import SolverTable, solver_table_from_json


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose bytes have been checked.

    Attributes:
        folder: where it lies.
        manifest: what it says it is.
        files: content by path, of all files but the weights.
        weights: the weight file, mapped read-only; empty where the engines hold their weights.
    """

    folder: Path
    manifest: Manifest
    files: dict[str, bytes]
    weights: NDArray[np.uint8]

    @property
    def weights_folder(self) -> Path:
        """Where the weight file lies; the bundle's own folder if it has none."""
        found = [path for path in self.manifest.files if path.endswith(WEIGHTS_FILE)]
        return self.folder.joinpath(*found).parent if found else self.folder

    def schedule(self, name: str) -> Schedule:
        """Return one of the bundle's schedules.

        Raises:
            ScheduleError: it has none of this name, or it does not fit the engines.
        """
        if name not in self.manifest.schedules:
            raise ScheduleError(f"the bundle has no schedule {name!r}; it has {', '.join(self.manifest.schedules)}")
        file = self.manifest.schedules[name]
        try:
            schedule = parse(Schedule, self.files[file], file)
        except ValueError as error:
            raise BundleError(f"{error}. Build the bundle again with `hemiola build`") from error
        self.check_schedule(schedule)
        return schedule

    def check_schedule(self, schedule: Schedule) -> None:
        """Make sure that this bundle can run a schedule.

        Raises:
            ScheduleError: it cannot; the message names both sides.
        """
        self.manifest.pipeline.check_schedule(schedule, set(self.manifest.forwards))
        self.manifest.solver_file(schedule.scheduler)

    def solver_table(self, schedule: Schedule) -> SolverTable:
        """Return the solver table of a schedule's scheduler, with as many state rows as the engines have."""
        file = self.manifest.solver_file(schedule.scheduler)
        return solver_table_from_json(self.files[file], file).padded(self.manifest.pipeline.state_rows)


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle and check all its bytes.

    Raises:
        BundleError: there is none, or its manifest is not valid.
        IntegrityError: a file is missing, lies outside, or is not the one that was built.
    """
    manifest = read_manifest(folder)
    root = folder.resolve()
    files: dict[str, bytes] = {}
    weights: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
    for name, expected in manifest.files.items():
        path = _resolved(root / name, name)
        if not path.is_relative_to(root):
            raise IntegrityError(f"{name} of the bundle {folder} is a link that leaves it, to {path}")
        data = _map(path, name) if name.endswith(WEIGHTS_FILE) else _read(path, name)
        if len(data) != expected.num_bytes:
            raise IntegrityError(
                f"{name} of the bundle {folder} has {len(data)} bytes instead of {expected.num_bytes}: it is "
                "truncated or was replaced. Copy the bundle again, or build it again with `hemiola build`"
            )
        if (digest := sha256_of(data)) != expected.sha256:
            raise IntegrityError(
                f"{name} of the bundle {folder} has SHA-256 {digest[:12]}… instead of {expected.sha256[:12]}…: its "
                "bytes are not those that were built. Copy the bundle again, or build it again with `hemiola build`"
            )
        if isinstance(data, bytes):
            files[name] = data
        else:
            weights = data
    if manifest.uses_weight_file and not len(weights):
        raise BundleError(f"the manifest of {folder} names no weight file. Build it again with `hemiola build`")
    return Bundle(root, manifest, files, weights)


def _resolved(path: Path, name: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise IntegrityError(f"{name} of the bundle cannot be followed: {error}") from error


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(
            f"cannot read {name} of the bundle: {error.strerror}. Copy the bundle again, or build it again with "
            "`hemiola build`"
        ) from error


def _map(path: Path, name: str) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return np.zeros(0, dtype=np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except OSError as error:
        raise IntegrityError(
            f"cannot read {name} of the bundle: {error.strerror}. Copy the bundle again, or build it again with "
            "`hemiola build`"
        ) from error
