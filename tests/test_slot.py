"""Slots over a workspace that notes what is asked of it, and engines that add up the bytes they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from hemiola_runtime import slot
from hemiola_runtime.backends import Bound, Workspace
from hemiola_runtime.program import Constant, Launch, Placed, Program
from hemiola_runtime.slot import BoundProgram, Ran, Slot

SIZES: Final = {"B": 1, "K": 0, "T": 2, "N": 1, "rows": 1, "columns": 1}
PICTURES: Final = (8, 8)  # (H, W) of the latents
LABELS: Final = Placed(512, (1,), "int64")
STATE: Final = Placed(768, (2,), "float32")
NEXT: Final = Placed(1024, (2,), "bfloat16")
INPUTS: Final[Mapping[str, NDArray[Any]]] = {
    "labels": np.array([3]),
    "state": np.array([0.5, -2.0], dtype=np.float32),
}


def program_of(scale: float) -> Program:
    """Make a program of three launches: conditioning, then two steps that multiply the state by a constant each."""
    scales = [Placed(0, (), "float32"), Placed(256, (), "float32")]
    launches = [Launch("conditioning", None, SIZES, {"labels": LABELS})]
    for step, place in enumerate(scales):
        read, written = (STATE, NEXT) if step == 0 else (NEXT, STATE)
        launches.append(Launch("scale", step, SIZES, {"input_scale": place, "state": read, "next_state": written}))
    constants = tuple(Constant(place, (scale + step,)) for step, place in enumerate(scales))
    inputs = {"labels": LABELS, "state": STATE}
    return Program(tuple(launches), constants, inputs, {"latents": STATE, "images": LABELS}, 1024, 1280)


@dataclass
class FakeTimeline:
    """A clock that goes on by 1 ms with every mark."""

    times: dict[int, float] = field(default_factory=dict)
    waited: list[int] = field(default_factory=list)
    now: float = 0.0

    def mark(self, index: int) -> None:
        self.now += 1
        self.times[index] = self.now

    def wait(self, index: int) -> None:
        self.waited.append(index)

    def elapsed_ms(self, first: int, last: int) -> float:
        return self.times[last] - self.times[first]


@dataclass
class FakeReplay:
    launches: Sequence[Bound]
    num_bytes: int = 4096

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(launch.engine for launch in self.launches)

    def enqueue(self) -> None:
        for launch in self.launches:
            launch.enqueue()


class FakeWorkspace:
    """Host memory that notes every write from the host, and refuses two of one range without a wait between them."""

    def __init__(self, *, can_capture: bool = False) -> None:
        self.memory = np.zeros(2048, dtype=np.uint8)
        self.writes: list[tuple[int, int]] = []  # offset and size
        self.on_their_way: list[range] = []  # written since the last wait
        self.timelines: list[FakeTimeline] = []
        self.num_captures = 0
        self.num_waits = 0
        self.num_releases = 0
        self.is_closed = False
        self.can_capture = can_capture

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        written = range(offset, offset + len(data))
        assert not any(set(written) & set(other) for other in self.on_their_way), "written twice between two waits"
        self.on_their_way.append(written)
        self.writes.append((offset, len(data)))
        self.memory[offset : offset + len(data)] = data

    def write_anywhere(self, offset: int, data: NDArray[np.uint8]) -> None:
        raise AssertionError("a slot writes what is staged alone")

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        self.on_their_way.clear()
        return self.memory[offset : offset + num_bytes].copy()

    def timeline(self, num_marks: int) -> FakeTimeline:
        self.timelines.append(FakeTimeline())
        return self.timelines[-1]

    def capture(self, launches: Sequence[Bound]) -> FakeReplay | None:
        self.num_captures += 1
        replay = FakeReplay(launches)
        replay.enqueue()  # backends warm up: what the workspace holds is overwritten
        return replay if self.can_capture else None

    def wait(self) -> None:
        self.num_waits += 1
        self.on_their_way.clear()

    def release(self) -> None:
        self.num_releases += 1

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeBound:
    launch: Launch
    workspace: FakeWorkspace
    ran: list[str]

    @property
    def engine(self) -> str:
        return self.launch.engine

    def enqueue(self) -> None:
        self.ran.append(self.engine)
        places = self.launch.tensors
        if self.engine == "scale":
            scaled = self._load(places["input_scale"]) * self._load(places["state"])
            self._store(places["next_state"], scaled)

    def _load(self, place: Placed) -> NDArray[np.float32]:
        raw = self.workspace.memory[place.offset : place.end]
        if place.dtype == "float32":
            return raw.view(np.float32)
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def _store(self, place: Placed, values: NDArray[np.float32]) -> None:
        stored: NDArray[Any] = values
        if place.dtype == "bfloat16":  # the tests' numbers have few digits: cutting is exact
            stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        self.workspace.memory[place.offset : place.end] = stored.view(np.uint8)


@dataclass
class FakeEngine:
    bound: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def bind(self, launch: Launch, workspace: Workspace) -> FakeBound:
        assert isinstance(workspace, FakeWorkspace)
        self.bound.append(launch.engine)
        return FakeBound(launch, workspace, self.ran)

    def close(self) -> None:
        raise AssertionError("a slot does not own the engines")


@dataclass
class Bench:
    """A slot with its workspace and the one engine behind all names."""

    workspace: FakeWorkspace
    engine: FakeEngine
    slot: Slot

    @property
    def new_writes(self) -> list[tuple[int, int]]:
        """What the host has written since this was last asked."""
        writes, self.workspace.writes = self.workspace.writes, []
        return writes

    def prepare(self, name: str, scale: float, batch_size: int = 1, size: tuple[int, int] = PICTURES) -> BoundProgram:
        return self.slot.prepare((name, batch_size, size), lambda: program_of(scale), as_one=True)


def bench(*, captures: bool = False, can_capture: bool = False) -> Bench:
    workspace, engine = FakeWorkspace(can_capture=can_capture), FakeEngine()
    return Bench(workspace, engine, Slot(workspace, {"conditioning": engine, "scale": engine}, captures=captures))


CONSTANTS: Final = (0, 260)  # two scalars, 256 bytes apart
STAGED: Final = (512, 264)  # one label, padded to 256 bytes, and a state of two numbers


def test_a_program_is_lowered_and_bound_once_for_each_schedule_batch_size_and_size_of_pictures() -> None:
    on = bench()
    first = on.prepare("fast", 2.0)
    assert on.slot.prepare(("fast", 1, PICTURES), lambda: pytest.fail("lowered again"), as_one=True) is first
    assert on.engine.bound == ["conditioning", "scale", "scale"]
    assert on.prepare("full", 2.0) is not first
    assert on.prepare("fast", 2.0, batch_size=2) is not first
    assert on.prepare("fast", 2.0, size=(8, 16)) is not on.prepare("fast", 2.0, size=(16, 8))
    assert len(on.engine.bound) == 15
    assert on.prepare("fast", 2.0) is first


def test_inputs_are_written_in_one_copy_and_constants_in_another() -> None:
    on = bench()
    on.slot.begin(on.prepare("fast", 2.0), INPUTS)
    assert on.new_writes == [CONSTANTS, STAGED]
    assert on.workspace.memory[512:520].view(np.int64).tolist() == [3]
    assert on.workspace.memory[768:776].view(np.float32).tolist() == [0.5, -2.0]


def test_constants_are_written_again_only_after_another_program_has_used_the_workspace() -> None:
    on = bench()
    fast, full = on.prepare("fast", 2.0), on.prepare("full", 8.0)
    written = []
    for program in (fast, fast, full, full, fast):
        on.slot.begin(program, INPUTS)
        on.slot.settle()
        written.append(CONSTANTS in on.new_writes)
    assert written == [True, False, True, False, True]


@pytest.mark.parametrize(("captures", "written"), [(False, [STAGED]), (True, [CONSTANTS, STAGED])])
def test_constants_are_written_again_after_another_program_was_captured(
    captures: bool, written: list[tuple[int, int]]
) -> None:
    on = bench(captures=captures, can_capture=True)
    fast = on.prepare("fast", 2.0)
    on.slot.begin(fast, INPUTS)
    on.slot.settle()
    on.prepare("full", 8.0)  # whose capture runs on the same memory
    on.workspace.writes.clear()
    on.slot.begin(fast, INPUTS)
    assert on.new_writes == written


def test_constants_whose_writing_failed_are_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    on = bench()
    fast = on.prepare("fast", 2.0)
    on.slot.begin(fast, INPUTS)
    full = on.prepare("full", 8.0)

    on.slot.settle()

    def fail(offset: int, data: NDArray[np.uint8]) -> None:
        raise OSError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(on.workspace, "write", fail)
        with pytest.raises(OSError, match="gone"):
            on.slot.begin(full, INPUTS)
    on.workspace.writes.clear()
    on.slot.begin(full, INPUTS)
    assert on.new_writes == [CONSTANTS, STAGED]


@pytest.mark.parametrize(("captures", "can_capture"), [(False, True), (True, False), (True, True)])
def test_a_trajectory_computes_the_same_whether_it_is_captured_or_not(captures: bool, can_capture: bool) -> None:
    on = bench(captures=captures, can_capture=can_capture)
    program = on.prepare("fast", 2.0)
    for _ in range(2):
        on.slot.begin(program, INPUTS)
        program.run()
        assert program.read(STATE).tolist() == [3.0, -12.0]  # 2 · 3 · (0.5, -2)
    assert on.workspace.num_captures == (1 if captures else 0)


def test_results_are_read_by_name() -> None:
    on = bench()
    program = on.prepare("fast", 2.0)
    on.slot.begin(program, INPUTS)
    program.run()
    assert {name: array.tolist() for name, array in program.read_results().items()} == {
        "latents": [3.0, -12.0],
        "images": [3],
    }


def test_a_program_without_constants_writes_its_inputs_alone() -> None:
    on = bench()
    program = on.slot.prepare(
        ("bare", 1, PICTURES), lambda: replace(program_of(2.0), launches=(), constants=()), as_one=False
    )
    on.slot.begin(program, INPUTS)
    assert on.new_writes == [STAGED]


def test_what_ran_is_told_launch_by_launch() -> None:
    on = bench()
    program = on.prepare("fast", 2.0)
    on.slot.begin(program, INPUTS)
    program.run()
    # six marks, 1 ms apart: before and after each of three launches
    assert program.ran() == Ran(("conditioning", "scale", "scale"), (1.0, 1.0, 1.0), 5.0, None)


def test_what_ran_as_one_is_told_as_one() -> None:
    on = bench(captures=True, can_capture=True)
    program = on.prepare("fast", 2.0)
    on.slot.begin(program, INPUTS)
    program.run()
    assert program.ran() == Ran(("conditioning", "scale", "scale"), (), 1.0, 4096)


def test_a_captured_program_can_still_be_stepped_through() -> None:
    on = bench(captures=True, can_capture=True)
    program = on.prepare("fast", 2.0)
    on.slot.begin(program, INPUTS)
    program.run()
    on.slot.settle()
    on.slot.begin(program, INPUTS)
    assert [(launch.engine, launch.step) for launch in program.steps()] == [
        ("conditioning", None),
        ("scale", 0),
        ("scale", 1),
    ]
    assert program.ran().engine_ms == (1.0, 1.0, 1.0)
    assert program.ran().graph_bytes is None
    assert program.read(STATE).tolist() == [3.0, -12.0]


def test_a_step_is_waited_for_only_when_somebody_asks() -> None:
    on = bench()
    program = on.prepare("fast", 2.0)
    (timeline,) = on.workspace.timelines
    on.slot.begin(program, INPUTS)
    before = on.workspace.num_waits
    for i, _ in enumerate(program.steps()):
        if i == 1:
            program.wait_for(i)
    assert timeline.waited == [3]  # the mark behind the second launch
    assert on.workspace.num_waits == before


def test_steps_that_were_abandoned_count_for_nothing_later() -> None:
    on = bench()
    program = on.prepare("fast", 2.0)
    on.slot.begin(program, INPUTS)
    next(program.steps())
    on.slot.settle()
    assert on.workspace.num_waits == 1
    on.slot.begin(program, INPUTS)
    program.run()
    assert program.ran().engines == ("conditioning", "scale", "scale")


def test_a_slot_that_is_full_of_programs_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "MAX_PROGRAMS", 2)
    on = bench(captures=True, can_capture=True)
    sizes = [(8, 8), (8, 16), (16, 16)]
    programs = [on.prepare("fast", 1.0, size=size) for size in sizes[:2]]
    assert on.prepare("fast", 1.0, size=sizes[0]) is programs[0]
    assert on.workspace.num_releases == 0
    on.prepare("fast", 3.0, size=sizes[2])
    assert on.workspace.num_releases == 1
    assert [on.slot.prepared(("fast", 1, size), as_one=True) is None for size in sizes] == [True, True, False]
    again = on.prepare("fast", 1.0, size=sizes[0])
    assert again is not programs[0]
    on.slot.begin(again, INPUTS)
    again.run()
    assert again.read(STATE).tolist() == [1.0, -4.0], "its constants were written again: times 1, then times 2"


@pytest.mark.parametrize(
    ("scale", "state", "culprit"),
    [
        (2.0, [0.5, -2.0], None),
        (2.0, [np.nan, 1.0], "the tensor state of `scale` at step 0"),
        (2.0, [2.0**127, 1.0], "the tensor next_state of `scale` at step 0"),  # 2^128 is no float32
        (1.0, [2.0**127, 1.0], "the tensor next_state of `scale` at step 1"),  # times 1, then times 2
    ],
)
@pytest.mark.parametrize("captures", [False, True])
def test_the_first_tensor_that_is_not_finite_is_found_by_step_and_name(
    captures: bool, scale: float, state: list[float], culprit: str | None
) -> None:
    on = bench(captures=captures, can_capture=captures)
    program = on.prepare("fast", scale)
    with np.errstate(over="ignore"):
        found = program.first_not_finite({**INPUTS, "state": np.array(state, dtype=np.float32)})
    assert found == culprit


def test_the_search_for_what_is_not_finite_writes_the_request_anew() -> None:
    on = bench()
    program = on.prepare("fast", 1.0)
    on.slot.begin(program, INPUTS)
    program.run()
    program.read_results()
    on.workspace.memory[:] = 0xFF  # NaN everywhere
    assert program.first_not_finite(INPUTS) is None


def test_a_closed_slot_has_closed_its_workspace() -> None:
    on = bench()
    on.prepare("fast", 2.0)
    on.slot.close()
    assert on.workspace.is_closed


def test_a_program_is_captured_only_for_a_request_that_runs_as_one() -> None:
    on = bench(captures=True, can_capture=True)
    key = ("fast", 1, PICTURES)
    streamed = on.slot.prepare(key, lambda: program_of(2.0), as_one=False)
    assert on.slot.prepared(key, as_one=False) is streamed
    assert on.slot.prepared(key, as_one=True) is None
    assert on.workspace.num_captures == 0
    assert on.slot.prepare(key, lambda: pytest.fail("lowered again"), as_one=True) is streamed
    assert on.workspace.num_captures == 1
    assert on.slot.prepared(key, as_one=True) is streamed
