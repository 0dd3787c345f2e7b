"""A slot: the workspace of one request at a time, and the programs that were bound to it.

Everything here is ordered on the workspace's stream. Within a trajectory nothing is allocated, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.backends import Engine, Replay, Workspace
from hemiola_runtime.pipeline import Size
from hemiola_runtime.program import Launch, Placed, Program
from hemiola_runtime.storage import from_bytes, pack

MAX_PROGRAMS: Final = 64  # a captured trajectory takes some MB of device memory

ProgramKey = tuple[str, int, Size]  # name of the schedule, or of an engine that runs alone; B; (H, W) of the latents


@dataclass(frozen=True, slots=True)
class Ran:
    """What ran for one request.

    Attributes:
        engines: names, in order, counted where they ran.
        engine_ms: time of each of them, in the same order; empty for a captured trajectory, which runs as one.
        trajectory_ms: from the begin of the first to the end of the last.
        graph_bytes: device memory of the captured trajectory; None if it was not captured.
    """

    engines: tuple[str, ...]
    engine_ms: tuple[float, ...]
    trajectory_ms: float
    graph_bytes: int | None


class BoundProgram:
    """A program whose launches are bound to one workspace."""

    def __init__(self, program: Program, engines: Mapping[str, Engine], workspace: Workspace) -> None:
        self.program = program
        self._workspace = workspace
        self._bound = tuple(engines[launch.engine].bind(launch, workspace) for launch in program.launches)
        self._constants = pack(
            (constant.place, np.array(constant.values).reshape(constant.place.shape)) for constant in program.constants
        )
        self._timeline = workspace.timeline(2 * len(program.launches))  # before and after each launch
        self._replay: Replay | None = None
        self.was_captured = False  # or found to be beyond the backend
        self._engines: list[str] = []  # those that ran in the last trajectory, counted as they were enqueued
        self._ran_as_one = False

    def capture(self) -> None:
        """Capture the trajectory, where the backend can; what the workspace holds is overwritten."""
        self.write_constants()
        # What another program has left here may be no label, and engines look labels up without a check.
        self.write_inputs({name: np.zeros(place.shape) for name, place in self.program.inputs.items()})
        self._replay = self._workspace.capture(self._bound)
        self.was_captured = True

    def write_constants(self) -> None:
        """Write what the launches take as given."""
        if self.program.constants:
            self._workspace.write(*self._constants)

    def write_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Write what a request gives, in one copy."""
        self._workspace.write(*pack((place, inputs[name]) for name, place in self.program.inputs.items()))

    def run(self) -> None:
        """Enqueue the whole trajectory, as one if it was captured."""
        if self._replay is None:
            for _ in self.steps():
                pass
        else:
            self._timeline.mark(0)
            self._replay.enqueue()
            self._timeline.mark(self._last)
            self._engines, self._ran_as_one = list(self._replay.engines), True

    def steps(self) -> Iterator[Launch]:
        """Enqueue launch after launch, yielding each when it is enqueued."""
        self._engines, self._ran_as_one = [], False
        for i, (launch, bound) in enumerate(zip(self.program.launches, self._bound, strict=True)):
            self._timeline.mark(2 * i)
            bound.enqueue()
            self._timeline.mark(2 * i + 1)
            self._engines.append(bound.engine)
            yield launch

    def wait_for(self, launch_index: int) -> None:
        """Return when a launch that `steps` enqueued is done."""
        self._timeline.wait(2 * launch_index + 1)

    def ran(self) -> Ran:
        """Tell what the last trajectory did, once its results were read."""
        engines, total_ms = tuple(self._engines), self._timeline.elapsed_ms(0, self._last)
        if self._ran_as_one:
            assert self._replay is not None
            return Ran(engines, (), total_ms, self._replay.num_bytes)
        each = tuple(self._timeline.elapsed_ms(2 * i, 2 * i + 1) for i in range(len(self._bound)))
        return Ran(engines, each, total_ms, None)

    @property
    def _last(self) -> int:
        return 2 * len(self._bound) - 1

    def read_results(self) -> dict[str, NDArray[np.float32]]:
        """Wait for the trajectory, and return what it gives: `latents` (B, N, P), and `images` if a decoder ran."""
        return {name: self.read(place) for name, place in self.program.results.items()}

    def read(self, place: Placed) -> NDArray[Any]:
        """Wait for what was enqueued, and return a copy of a tensor; bfloat16 as float32."""
        return from_bytes(self._workspace.read(place.offset, place.num_bytes), place)

    def first_not_finite(self, inputs: Mapping[str, NDArray[Any]]) -> str | None:
        """Run a request again, one launch at a time, and name the first tensor that holds NaN or infinity."""
        self.write_constants()
        self.write_inputs(inputs)
        checked: set[Placed] = set()
        for launch in self.steps():
            for name, place in launch.tensors.items():
                if place.dtype == "int64" or (place in checked and not name.startswith("next_")):
                    continue
                checked.add(place)
                if not np.isfinite(self.read(place)).all():
                    when = "" if launch.step is None else f" at step {launch.step}"
                    return f"the tensor {name} of `{launch.engine}`{when}"
        return None


class Slot:
    """The workspace of one request at a time. Not shared by threads: whoever holds it has it alone."""

    def __init__(self, workspace: Workspace, engines: Mapping[str, Engine], *, captures: bool) -> None:
        self._workspace = workspace
        self._engines = engines
        self._captures = captures
        self._programs: dict[ProgramKey, BoundProgram] = {}
        self._current: BoundProgram | None = None  # the program whose constants are in the workspace

    def prepared(self, key: ProgramKey, *, as_one: bool) -> BoundProgram | None:
        """Return what `prepare` would, if there is nothing left to do for it; else None."""
        program = self._programs.get(key)
        if program is None or (as_one and self._captures and not program.was_captured):
            return None
        return program

    def prepare(self, key: ProgramKey, lower: Callable[[], Program], *, as_one: bool) -> BoundProgram:
        """Lower and bind a program, and capture it if it is to run as one; each is done once for a key, and kept.

        Of MAX_PROGRAMS at most: who asks for one more, as pictures of ever other sizes do, starts all of them anew.
        """
        if key not in self._programs:
            if len(self._programs) == MAX_PROGRAMS:
                self._current = None
                self._programs.clear()
                self._workspace.release()
            self._programs[key] = BoundProgram(lower(), self._engines, self._workspace)
        program = self._programs[key]
        if as_one and self._captures and not program.was_captured:
            self._current = None
            program.capture()
        program.read_results()  # once, so that no request waits for the memory that results are copied to
        return program

    def begin(self, program: BoundProgram, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Write what a request gives, and the program's constants if another program has used the memory since."""
        if self._current is not program:
            self._current = None
            program.write_constants()
            self._current = program
        program.write_inputs(inputs)

    def forget(self) -> None:
        """Trust nothing that the workspace holds: what a request enqueued before it failed may never have run."""
        self._current = None

    def settle(self) -> None:
        """Wait for what was enqueued, so that the next request finds the workspace at rest."""
        self._workspace.wait()

    def close(self) -> None:
        """Free the workspace and all that was bound to it."""
        self._current = None
        self._programs.clear()
        self._workspace.close()
