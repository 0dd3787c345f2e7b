"""Workspaces in host memory, for backends that run on the CPU; and what their engines ask of any workspace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.backends import Bound
from hemiola_runtime.program import ALIGNMENT


@runtime_checkable
class Addressed(Protocol):
    """A workspace whose memory has an address."""

    address: int


class HostWorkspace:
    """A workspace in host memory. Pages that are never touched cost nothing."""

    def __init__(self, num_bytes: int) -> None:
        self._memory: NDArray[np.uint8] = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
        start = self._memory.ctypes.data
        self._skip = -start % ALIGNMENT
        self.address = start + self._skip

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to the memory."""
        self._memory[self._skip + offset : self._skip + offset + len(data)] = data

    def write_anywhere(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to the memory."""
        self.write(offset, data)

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Return a copy of some bytes."""
        return self._memory[self._skip + offset : self._skip + offset + num_bytes].copy()

    def timeline(self, num_marks: int) -> HostTimeline:
        """Make a timeline."""
        return HostTimeline(num_marks)

    def capture(self, launches: Sequence[Bound]) -> None:
        """Return None: there is nothing to gain from replaying sessions as one."""

    def wait(self) -> None:
        """Return at once: a launch is done when it returns."""

    def release(self) -> None:
        """Nothing to free: launches own what they hold."""

    def close(self) -> None:
        """Free the memory; nothing bound to it may run any more."""
        self._memory = np.zeros(0, dtype=np.uint8)


class HostTimeline:
    """Moments by the clock of this process."""

    def __init__(self, num_marks: int) -> None:
        self._seconds = [0.0] * num_marks

    def mark(self, index: int) -> None:
        """Note this moment; all that was launched is done by now."""
        self._seconds[index] = time.perf_counter()

    def wait(self, index: int) -> None:
        """Return at once."""

    def elapsed_ms(self, first: int, last: int) -> float:
        """Return the milliseconds between two moments."""
        return 1000 * (self._seconds[last] - self._seconds[first])
