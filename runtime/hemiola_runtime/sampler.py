"""The sampler: opens a bundle once, then draws images from any number of threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.backends import BackendOptions, Engine, entry_of, open_backend
from hemiola_runtime.bundle import Bundle, open_bundle
from hemiola_runtime.components import Components
from hemiola_runtime.errors import CancelledError, HemiolaError, NumericError, RequestError, ScheduleError
from hemiola_runtime.graph_set import TOKENIZER_FILE
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.memory import MemoryPlan, plan_memory
from hemiola_runtime.patches import from_patches
from hemiola_runtime.pipeline import Size
from hemiola_runtime.program import Program, check_alignment, lower
from hemiola_runtime.report import TextReport, report_of
from hemiola_runtime.request import Asked, Request, request_from_arguments
from hemiola_runtime.results import Progress, Result, as_bytes, latents_to_pixels
from hemiola_runtime.schedule import Schedule, read_schedule
from hemiola_runtime.slot import BoundProgram, Slot
from hemiola_runtime.solver_table import SolverTable
from hemiola_runtime.text import check_tokenizer


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
        sizes = self._manifest.pipeline.demanding_sizes
        programs = [
            self._lower(name, self._manifest.max_batch_size, size) for name in self._schedules for size in sizes
        ]
        for name in self._schedules:  # what is aligned for one image is so for more
            one = self._lower(name, 1, self._manifest.pipeline.size)
            check_alignment(one, entry_of(self._manifest.backend.name).alignment)
        workspace_bytes = max(program.num_bytes for program in programs)
        staged_bytes = max(program.staged_bytes for program in programs)
        self.memory_plan: MemoryPlan = plan_memory(
            self._manifest, workspace_bytes, options.max_concurrency, Components.num_bytes(self._manifest)
        )
        self._is_closed = False
        self._preparing = threading.Lock()  # one trajectory is bound and captured at a time
        self._holding_all = threading.Lock()  # two threads that each hold some slots would wait for each other
        self._engines: dict[str, Engine] = {}
        self._slots: list[Slot] = []
        self._components: Components | None = None
        if (text := self._manifest.pipeline.text) is not None:  # before what may take minutes
            check_tokenizer(bundle.files[TOKENIZER_FILE], text.num_tokens)
        self._backend = open_backend(
            self._manifest.backend,
            BackendOptions(bundle.weights, bundle.weights_folder, options.num_threads, self._manifest.made_by.command),
        )
        try:
            self.memory_plan.check(self._backend.available_bytes)
            for name, spec in self._manifest.engines.items():
                self._engines[name] = self._backend.load(spec, bundle.files[spec.graph.file])
            if self._backend.activation_bytes is not None:
                self.memory_plan = self.memory_plan.with_activation(self._backend.activation_bytes)
                self.memory_plan.check_workspaces(self._backend.available_bytes)
            self._components = Components(self._manifest, bundle.files, self._engines, self._backend)
            for _ in range(options.max_concurrency):
                workspace = self._backend.workspace(workspace_bytes, staged_bytes)
                self._slots.append(Slot(workspace, self._engines, captures=options.cuda_graphs))
        except BaseException:
            with suppress(HemiolaError):  # what went wrong first tells more
                self._free_all()
            raise
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        schedule: str | Path | None = None,
        max_concurrency: int = 1,
        num_threads: int | None = None,
        cuda_graphs: bool = True,
    ) -> Sampler:
        """Check a bundle, load its engines and allocate all memory that requests will use.

        Args:
            bundle: its folder.
            schedule: which of its schedules runs by default, or the path of another one made for this bundle's model;
                None for the bundle's first.
            max_concurrency: requests that run at once; more wait.
            num_threads: CPU threads of one engine; None for one per core.
            cuda_graphs: on a GPU, capture each trajectory once and launch it as one CUDA graph.

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
        return cls(opened, schedules, default, SamplerOptions(max_concurrency, num_threads, cuda_graphs))

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
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] = 0,
        guidance_scale: float | Sequence[float] | None = None,
        latents: NDArray[np.float32] | None = None,
        height: int | None = None,
        width: int | None = None,
        schedule: str | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Draw one image per label or prompt.

        Args:
            labels: B class labels, as numbers or as their names in the manifest; of a bundle that draws labels.
            prompts: B strings; of a bundle that draws prompts. What is longer than its text encoder takes is cut, and
                the report says so.
            negative_prompts: what guidance leads away from: one string per image, or one for all; None for "".
            seeds: one per image, or one number s for s, s + 1, …; the same seed is the same noise at any place of any
                batch.
            guidance_scale: one number or one per image; None for what the bundle's first schedule was searched with.
            latents: (B, C, H, W) float32 standard normal noise in place of seeds.
            height: of the pictures in pixels, within what the bundle was exported for; None for its default.
            width: likewise.
            schedule: name of the schedule; None for the default.
            cancel: set from another thread to stop between two steps.

        Raises:
            RequestError: an argument is not what this bundle can do; nothing has run.
            CancelledError: `cancel` was set.
            NumericError: the final latents are not finite.
        """
        asked = Asked(labels, prompts, negative_prompts, seeds, guidance_scale, latents, height, width)
        request, name = request_from_arguments(self._manifest, asked), self._schedule_name(schedule)
        if cancel is None:
            return self._draw(request, name)
        result = None
        for progress in self._steps(request, name):
            result = progress.result
            if cancel.is_set() and result is None:
                raise CancelledError(f"cancelled after step {progress.step + 1} of {progress.num_steps}")
        assert result is not None
        return result

    def stream(
        self,
        *,
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] = 0,
        guidance_scale: float | Sequence[float] | None = None,
        latents: NDArray[np.float32] | None = None,
        height: int | None = None,
        width: int | None = None,
        schedule: str | None = None,
    ) -> Iterator[Progress]:
        """Draw as `generate` does, yielding when a step is done; the last `Progress` holds the result.

        Steps are launched one by one here, also where `generate` would launch a captured trajectory as one.
        To cancel, stop iterating: closing the iterator frees the request's workspace.
        """
        asked = Asked(labels, prompts, negative_prompts, seeds, guidance_scale, latents, height, width)
        return self._steps(request_from_arguments(self._manifest, asked), self._schedule_name(schedule))

    def prepare(self, batch_sizes: Sequence[int], *, schedules: Sequence[str] | None = None) -> None:
        """Do ahead what the first request of a batch size would do: bind every launch, and capture the trajectory.

        Args:
            batch_sizes: those that will be asked for, at the bundle's default size of pictures.
            schedules: their names; None for the default alone.
        """
        pictures = self._manifest.pipeline.size
        names = [self._default] if schedules is None else [self._schedule_name(name) for name in schedules]
        for size in batch_sizes:
            if not 1 <= size <= self._manifest.max_batch_size:
                raise RequestError(f"this bundle takes 1 to {self._manifest.max_batch_size} images, not {size}")
        with self._all_slots():
            self._refuse_if_closed()
            assert self._components is not None
            self._components.prepare()
            for slot in self._slots:
                try:
                    for name in names:
                        for size in batch_sizes:
                            self._prepare(slot, name, size, pictures, as_one=True)
                finally:
                    slot.settle()

    def close(self) -> None:
        """Free engines and memory; waits for running requests, and refuses those that still wait."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._all_slots():  # whoever waits for one afterwards learns that the sampler is closed
            self._free_all()

    def _free_all(self) -> None:
        """Free slots, engines and backend, in this order; all of them, whatever fails on the way."""
        with ExitStack() as owned:
            owned.callback(self._backend.close)
            for engine in self._engines.values():
                owned.callback(engine.close)
            if self._components is not None:
                owned.callback(self._components.close)
            for slot in self._slots:
                owned.callback(slot.close)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _schedule_name(self, name: str | None) -> str:
        self._refuse_if_closed()
        if name is not None and name not in self._schedules:
            raise ScheduleError(f"the bundle has no schedule {name!r}; it has {', '.join(self._schedules)}")
        return self._default if name is None else name

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise RequestError("the sampler is closed")

    def _lower(self, name: str, batch_size: int, size: Size) -> Program:
        return lower(self._manifest, self._schedules[name], self._tables[name], batch_size, size)

    def _prepare(self, slot: Slot, name: str, batch_size: int, size: Size, *, as_one: bool) -> BoundProgram:
        key = (name, batch_size, size)
        if (program := slot.prepared(key, as_one=as_one)) is not None:  # no request waits while another slot captures
            return program
        with self._preparing:
            return slot.prepare(key, lambda: self._lower(*key), as_one=as_one)

    @contextmanager
    def _all_slots(self) -> Iterator[None]:
        """Hold all slots, once no request runs."""
        with self._holding_all:
            held = [self._free.get() for _ in self._slots]
            try:
                yield
            finally:
                for slot in held:
                    self._free.put(slot)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        """Hold a slot; whatever happens, it comes back with nothing running on it."""
        slot = self._free.get()
        try:
            self._refuse_if_closed()  # it may have been, while this request waited
            try:
                yield slot
            except BaseException:
                slot.forget()
                raise
            finally:
                slot.settle()
        finally:
            self._free.put(slot)

    def _draw(self, request: Request, name: str) -> Result:
        with self._slot() as slot:
            program = self._prepare(slot, name, request.batch_size, request.size, as_one=True)
            start = time.perf_counter()
            inputs, text = self._inputs(request, name)
            slot.begin(program, inputs)
            program.run()
            return self._result(request, name, program, inputs, text, start)

    def _steps(self, request: Request, name: str) -> Iterator[Progress]:
        num_steps = len(self._schedules[name].steps)
        with self._slot() as slot:
            program = self._prepare(slot, name, request.batch_size, request.size, as_one=False)
            start = time.perf_counter()
            inputs, text = self._inputs(request, name)
            slot.begin(program, inputs)
            last_of_step = {launch.step: i for i, launch in enumerate(program.program.launches)}
            for i, launch in enumerate(program.steps()):
                if launch.step is None or i != last_of_step[launch.step] or launch.step + 1 == num_steps:
                    continue  # the last step is told only together with its result
                program.wait_for(i)
                kind = self._schedules[name].steps[launch.step].kind
                yield Progress(launch.step, num_steps, kind, 1000 * (time.perf_counter() - start), None)
            result = self._result(request, name, program, inputs, text, start)
        kind = self._schedules[name].steps[-1].kind
        yield Progress(num_steps - 1, num_steps, kind, result.report.wall_ms, result)

    def _inputs(self, request: Request, name: str) -> tuple[dict[str, NDArray[Any]], TextReport | None]:
        assert self._components is not None
        conditions, text = self._components.conditions(request)
        return request.tensors(self._manifest.pipeline, self._tables[name].init_noise_sigma, conditions), text

    def _result(
        self,
        request: Request,
        name: str,
        program: BoundProgram,
        inputs: Mapping[str, NDArray[Any]],
        text: TextReport | None,
        start: float,
    ) -> Result:
        """Read what a trajectory has left, once it is done."""
        assert self._components is not None
        found = program.read_results()
        for what in (what for what, values in found.items() if not np.isfinite(values).all()):
            culprit = program.first_not_finite(inputs) or "nothing, when it was run again: the machine may be faulty;"
            raise NumericError(
                f"the {what} of seeds {list(request.seeds)} hold NaN or infinity under the schedule {name}. "
                f"The first to hold any was {culprit}. `hemiola verify` compares every schedule with PyTorch; a "
                "bundle in bf16 or fp32 has more room than one in fp16"
            )
        latents = from_patches(found["latents"], self._manifest.pipeline.patch_size, request.size)
        images = found.get("images")
        if images is None:
            is_tiled = self._manifest.pipeline.is_tiled(request.size)
            images = self._components.decode(latents) if is_tiled else latents_to_pixels(latents)
        wall_ms = 1000 * (time.perf_counter() - start)
        report = report_of(
            name, self._schedules[name], self._manifest.forwards, request.batch_size, program.ran(), wall_ms, text
        )
        return Result(as_bytes(images), latents, report)


@dataclass(frozen=True, slots=True)
class SamplerOptions:
    """How to serve: see `Sampler.open`."""

    max_concurrency: int
    num_threads: int | None
    cuda_graphs: bool


def _outside_schedule(bundle: Bundle, name: str) -> Schedule:
    if not Path(name).exists():
        raise ScheduleError(
            f"the bundle has no schedule {name!r}, and there is no such file; it has "
            f"{', '.join(bundle.manifest.schedules)}"
        )
    schedule = read_schedule(Path(name))
    bundle.check_schedule(schedule)
    return schedule
