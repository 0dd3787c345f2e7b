"""The sampler: opens a bundle once, then draws images from any number of threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.backends import BackendOptions, Bound, Engine, Workspace, open_backend
from hemiola_runtime.bundle import Bundle, open_bundle
from hemiola_runtime.errors import CancelledError, NumericError, RequestError, ScheduleError
from hemiola_runtime.manifest import WEIGHTS_FILE, Manifest
from hemiola_runtime.memory import MemoryPlan, available_host_bytes, plan_memory
from hemiola_runtime.program import Program, lower
from hemiola_runtime.report import RunReport, Tally
from hemiola_runtime.request import Request, request_from_arguments
from hemiola_runtime.schedule import Schedule, read_schedule
from hemiola_runtime.solver_table import SolverTable

DEFAULT_GUIDANCE: Final = 4.0  # as in diffusers' DiTPipeline


@dataclass(frozen=True, slots=True)
class Result:
    """What a request gives.

    Attributes:
        images: (B, height, width, channels) uint8; 3 channels RGB, 1 grey.
        latents: (B, C, H, W) float32, the final latents.
        report: what ran.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    report: RunReport


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a request has been done.

    Attributes:
        step: its index; the first is 0.
        num_steps: of the schedule.
        forward: the engine that ran.
        elapsed_ms: since the request was written into the workspace.
        result: the images, with the last step; None before.
    """

    step: int
    num_steps: int
    forward: str
    elapsed_ms: float
    result: Result | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A program bound to one workspace, with its constants as arrays."""

    program: Program
    launches: tuple[Bound, ...]
    constants: tuple[NDArray[Any], ...]


class _Slot:
    """The workspace of one request at a time, and the programs that were bound to it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.prepared: dict[tuple[str, int], _Prepared] = {}


class Sampler:
    """Draws images with the engines of a bundle. Made by `Sampler.open`; a context manager; safe to share by threads.

    Engines and weights are shared by all requests. Every request has a workspace of its own from a bounded pool, and
    waits for one when all are taken; nothing of a request outlives it.
    """

    def __init__(
        self, bundle: Bundle, schedules: Mapping[str, Schedule], default: str, options: SamplerOptions
    ) -> None:
        """Use `Sampler.open`."""
        self._manifest = bundle.manifest
        self._default = default
        self._schedules = dict(schedules)
        self._tables: dict[str, SolverTable] = {
            name: bundle.solver_table(schedule) for name, schedule in self._schedules.items()
        }
        self._graphs = {name: engine.graph for name, engine in self._manifest.engines.items()}
        largest = max(self._lower(name, self._manifest.max_batch_size).num_bytes for name in self._schedules)
        self.memory_plan: MemoryPlan = plan_memory(
            self._manifest, bundle.weights.nbytes, largest, options.max_concurrency
        )
        self.memory_plan.check(available_host_bytes())
        weights_folder = (bundle.folder / _weights_path(self._manifest)).parent
        built = self._manifest.backend
        backend = open_backend(
            built.name, built.version, BackendOptions(bundle.weights, weights_folder, options.num_threads)
        )
        self._engines: dict[str, Engine] = {
            name: backend.load(graph, bundle.files[graph.file]) for name, graph in self._graphs.items()
        }
        self._slots = [_Slot(backend.workspace(largest)) for _ in range(options.max_concurrency)]
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._is_closed = False

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        schedule: str | Path | None = None,
        max_concurrency: int = 1,
        num_threads: int | None = None,
    ) -> Sampler:
        """Check a bundle, load its engines and allocate all memory that requests will use.

        Args:
            bundle: its folder.
            schedule: which of its schedules runs by default, or the path of another one made for this bundle's model;
                None for the bundle's first.
            max_concurrency: requests that run at once; more wait.
            num_threads: CPU threads of one engine; None for one per core.

        Raises:
            BundleError: the bundle is damaged, or not for this machine.
            ScheduleError: the schedule does not fit the bundle.
            CapacityError: it does not fit into memory.
        """
        if max_concurrency < 1:
            raise RequestError(f"max_concurrency is 1 or more, not {max_concurrency}")
        opened = open_bundle(Path(bundle))
        schedules = {name: opened.schedule(name) for name in opened.manifest.schedules}
        default = next(iter(schedules))
        if schedule is not None:
            default = str(schedule)
            if default not in schedules:
                schedules[default] = _outside_schedule(opened, default)
        return cls(opened, schedules, default, SamplerOptions(max_concurrency, num_threads))

    @property
    def manifest(self) -> Manifest:
        """What the bundle says it is."""
        return self._manifest

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules that can run, by name."""
        return self._schedules

    @property
    def default_schedule(self) -> str:
        """Name of the schedule that runs unless a request names another."""
        return self._default

    def generate(
        self,
        *,
        labels: Sequence[int | str],
        seeds: int | Sequence[int] = 0,
        guidance_scale: float | Sequence[float] | None = None,
        latents: NDArray[np.float32] | None = None,
        schedule: str | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Draw one image per label.

        Args:
            labels: B class labels, as numbers or as their names in the manifest.
            seeds: one per image, or one number s for s, s + 1, …; the same seed is the same noise at any place of any
                batch.
            guidance_scale: one number or one per image; None for 4.0 where the bundle has guidance.
            latents: (B, C, H, W) float32 standard normal noise in place of seeds.
            schedule: name of the schedule; None for the default.
            cancel: set from another thread to stop between two steps.

        Raises:
            RequestError: an argument is not what this bundle can do; nothing has run.
            CancelledError: `cancel` was set.
            NumericError: the final latents are not finite.
        """
        request = self._request(labels, seeds, guidance_scale, latents)
        result = None
        for progress in self._run(request, schedule):
            result = progress.result
            if cancel is not None and cancel.is_set() and result is None:
                raise CancelledError(f"cancelled after step {progress.step + 1} of {progress.num_steps}")
        assert result is not None
        return result

    def stream(
        self,
        *,
        labels: Sequence[int | str],
        seeds: int | Sequence[int] = 0,
        guidance_scale: float | Sequence[float] | None = None,
        latents: NDArray[np.float32] | None = None,
        schedule: str | None = None,
    ) -> Iterator[Progress]:
        """Draw as `generate` does, yielding after every step; the last `Progress` holds the result.

        To cancel, stop iterating: closing the iterator frees the request's workspace.
        """
        return self._run(self._request(labels, seeds, guidance_scale, latents), schedule)

    def close(self) -> None:
        """Free engines and memory; waits for running requests, and refuses those that still wait."""
        if self._is_closed:
            return
        self._is_closed = True
        taken = [self._free.get() for _ in self._slots]
        for slot in taken:
            slot.prepared.clear()
            slot.workspace.close()
            self._free.put(slot)
        for engine in self._engines.values():
            engine.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, labels: Any, seeds: Any, guidance_scale: Any, latents: Any) -> Request:
        scale = DEFAULT_GUIDANCE if guidance_scale is None else guidance_scale
        if self._manifest.pipeline.guidance == "none":
            if guidance_scale not in (None, 1, 1.0):
                raise RequestError("the bundle was exported without guidance; leave guidance_scale out")
            scale = 1.0
        return request_from_arguments(self._manifest, labels, seeds, scale, latents)

    def _lower(self, name: str, batch_size: int) -> Program:
        schedule, table = self._schedules[name], self._tables[name]
        return lower(self._manifest.pipeline, self._graphs, schedule, table, batch_size)

    def _prepare(self, slot: _Slot, name: str, batch_size: int) -> _Prepared:
        """Bind a program to a slot; done once for each, and kept."""
        key = (name, batch_size)
        if key not in slot.prepared:
            program = self._lower(name, batch_size)
            bound = tuple(
                self._engines[launch.engine].bind(launch.tensors, slot.workspace) for launch in program.launches
            )
            constants = tuple(
                np.array(constant.values, dtype=constant.place.dtype).reshape(constant.place.shape)
                for constant in program.constants
            )
            slot.prepared[key] = _Prepared(program, bound, constants)
        return slot.prepared[key]

    def _run(self, request: Request, schedule_name: str | None) -> Iterator[Progress]:
        name = self._default if schedule_name is None else schedule_name
        if name not in self._schedules:
            raise ScheduleError(f"the bundle has no schedule {name!r}; it has {', '.join(self._schedules)}")
        self._refuse_if_closed()
        return self._steps(request, name)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise RequestError("the sampler is closed")

    def _steps(self, request: Request, name: str) -> Iterator[Progress]:
        slot = self._free.get()
        try:
            self._refuse_if_closed()  # it may have been, while this request waited
            prepared = self._prepare(slot, name, request.batch_size)
            yield from self._launch_all(request, name, slot.workspace, prepared)
        finally:
            self._free.put(slot)

    def _launch_all(self, request: Request, name: str, workspace: Workspace, prepared: _Prepared) -> Iterator[Progress]:
        program, schedule = prepared.program, self._schedules[name]
        sigma = self._tables[name].init_noise_sigma
        tally = Tally.empty()
        start = time.perf_counter()
        for constant, values in zip(program.constants, prepared.constants, strict=True):
            workspace.write(constant.place, values)  # another program may have used the memory since
        for tensor, values in request.tensors(sigma, self._manifest.pipeline.state_rows).items():
            if tensor in program.inputs:  # guidance is none of a bundle without it
                workspace.write(program.inputs[tensor], values)
        num_steps = len(schedule.steps)
        before = time.perf_counter()
        held: Progress | None = None  # the last step is told only together with its result
        for launch, bound in zip(program.launches, prepared.launches, strict=True):
            bound.enqueue()
            now = time.perf_counter()
            tally.add(bound.engine, 1000 * (now - before))
            if launch.step is not None:
                held = Progress(launch.step, num_steps, bound.engine, 1000 * (now - start), None)
                if launch.step + 1 < num_steps:
                    yield held
            before = time.perf_counter()
        assert held is not None
        latents = workspace.read(program.latents)
        images = latents_to_pixels(latents) if program.images is None else workspace.read(program.images)
        wall_ms = 1000 * (time.perf_counter() - start)
        if not np.isfinite(latents).all():
            raise NumericError(
                f"the final latents of seeds {list(request.seeds)} hold NaN or infinity under the schedule {name}. "
                "`hemiola verify` compares every schedule of the bundle with PyTorch"
            )
        report = tally.report(name, schedule, request.batch_size, wall_ms)
        yield Progress(held.step, num_steps, held.forward, wall_ms, Result(_as_bytes(images), latents, report))


@dataclass(frozen=True, slots=True)
class SamplerOptions:
    """How to serve: see `Sampler.open`."""

    max_concurrency: int
    num_threads: int | None


def latents_to_pixels(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn the latents of a model of pixels, (B, C, H, W) in [-1, 1], into pictures (B, H, W, C) in [0, 1]."""
    return np.moveaxis(np.clip(latents / 2 + 0.5, 0, 1), 1, -1)


def _as_bytes(images: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.rint(images * 255).astype(np.uint8))


def _weights_path(manifest: Manifest) -> str:
    return next(path for path in manifest.files if path.endswith(WEIGHTS_FILE))


def _outside_schedule(bundle: Bundle, name: str) -> Schedule:
    if not Path(name).exists():
        raise ScheduleError(
            f"the bundle has no schedule {name!r}, and there is no such file; it has "
            f"{', '.join(bundle.manifest.schedules)}"
        )
    schedule = read_schedule(Path(name))
    bundle.check_schedule(schedule)
    return schedule
