"""A probe: single steps of a bundle on tensors that a caller gives; for checks, not for requests."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from hemiola_runtime.backends import BackendOptions, Engine, open_backend
from hemiola_runtime.bundle import Bundle
from hemiola_runtime.program import lower
from hemiola_runtime.storage import from_bytes, to_bytes


class Probe:
    """The engines of a bundle, bound as one of its schedules has them; a context manager."""

    def __init__(self, bundle: Bundle, schedule_name: str, batch_size: int) -> None:
        schedule = bundle.schedule(schedule_name)
        self._program = lower(bundle.manifest, schedule, bundle.solver_table(schedule), batch_size)
        self._backend = open_backend(
            bundle.manifest.backend,
            BackendOptions(bundle.weights, bundle.weights_folder, None, bundle.manifest.made_by.command),
        )
        self._engines: dict[str, Engine] = {}
        with ExitStack() as owned:
            owned.callback(self._backend.close)
            for name, spec in bundle.manifest.engines.items():
                self._engines[name] = self._backend.load(spec, bundle.files[spec.graph.file])
                owned.callback(self._engines[name].close)
            self._workspace = self._backend.workspace(self._program.num_bytes, self._program.staged_bytes)
            owned.callback(self._workspace.close)
            self._owned = owned.pop_all()

    def step(self, index: int, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one step.

        Args:
            index: of the step.
            tensors: all that its engines read, by name; float32 where the engines have half precision.

        Returns:
            All that they write, by name; bfloat16 as float32.
        """
        launches = [launch for launch in self._program.launches if launch.step == index]
        written: dict[str, NDArray[Any]] = {}
        for launch in launches:
            for name, place in launch.tensors.items():
                if not name.startswith("next_") and f"next_{name}" not in written:
                    self._workspace.write_anywhere(place.offset, to_bytes(tensors[name], place))
            self._engines[launch.engine].bind(launch, self._workspace).enqueue()
            for name, place in launch.tensors.items():
                if name.startswith("next_"):
                    written[name] = from_bytes(self._workspace.read(place.offset, place.num_bytes), place)
        return written

    def close(self) -> None:
        """Free everything."""
        self._owned.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
