"""What PyTorch takes for the same work: the parts `forwards`, `eager` and `compile` of `scripts/bench_gpu.py`.

`forwards` runs Hemiola's own forwards, those that are exported. `eager` and `compile` run diffusers' DiTPipeline, whose
transformer knows no cache; how long it takes is read off CUDA events before the pipeline and before it decodes.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, Final

import diffusers
import torch

from hemiola_export.model import Model, make_scheduler
from hemiola_export.reference_images import trajectory
from hemiola_export.solver import measure_solver
from hemiola_export.trajectory import Requests
from hemiola_runtime.bench import Spread, in_turn, ratio
from hemiola_runtime.errors import RequestError
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import PRECISIONS
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.schedule import Schedule

COMPILE_MODES: Final = ("reduce-overhead", "max-autotune-no-cudagraphs")  # the quicker one to compile first
GUIDANCE: Final = 4.0
NULL_LABEL: Final = 1000  # of no class, which DiTPipeline takes whatever the model has

Body = dict[str, Any]
Save = Callable[[Body], None]

logger = logging.getLogger("bench_gpu")


class Stopwatch:
    """Moments on the stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Any] = []

    def mark(self) -> None:
        """Note the moment at which all that was enqueued so far is done."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def laps_ms(self) -> list[float]:
        """Wait for the last moment, and return the milliseconds between neighbours."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return [first.elapsed_time(second) for first, second in pairwise(self._moments)]
        return [1000 * (second - first) for first, second in pairwise(self._moments)]


def run(
    name: str,
    options: argparse.Namespace,
    model: Model,
    make_schedules: Callable[[Model], Mapping[str, Schedule]],
    save: Save,
) -> None:
    """Measure one part.

    Args:
        name: `forwards`, `eager` or `compile`.
        options: of the command line.
        model: loaded.
        make_schedules: makes those that `forwards` runs beside the uncached one.
        save: writes what was measured so far.

    Raises:
        RequestError: the model is not one that DiTPipeline runs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "forwards":
        _measure_forwards(options, model, make_schedules(model), device, save)
    else:
        modes = () if name == "eager" else options.mode or COMPILE_MODES
        _measure_pipelines(options, model, device, modes, save)


@dataclass(frozen=True, slots=True)
class Laps:
    """Milliseconds of one trajectory: the whole, and of each step after the first, which begins with conditioning."""

    denoise_ms: float
    steps: list[tuple[str, float]]


@torch.inference_mode()
def _measure_forwards(
    options: argparse.Namespace, model: Model, schedules: Mapping[str, Schedule], device: torch.device, save: Save
) -> None:
    if not model.family.num_classes:
        raise RequestError(f"{options.model} draws prompts; these baselines are of models of labels, as dit-xl-2")
    dtype = getattr(torch, PRECISIONS[options.precision])
    family = model.family if dtype == model.family.compute_dtype else model.family.lowered(dtype)
    family.to(device)
    rhythms = {UNCACHED: next(iter(schedules.values())).uncached()}
    rhythms |= {name: schedule for name, schedule in schedules.items() if not name.startswith("only_")}
    body: Body = {"rows": []}

    lowered = replace(model, family=family)
    table = measure_solver(make_scheduler(model, "ddim", {}), options.steps)
    trajectories = {name: trajectory(lowered, schedule, table) for name, schedule in rhythms.items()}

    def draw(name: str, batch_size: int) -> Laps:
        noise = torch.from_numpy(noise_from_seeds(range(batch_size), family.latent_shape)).to(device)
        labels = torch.arange(batch_size, device=device) % family.num_classes
        requests = Requests({"labels": labels}, noise, torch.full((batch_size,), GUIDANCE, device=device))
        watch, forwards = Stopwatch(device), []
        watch.mark()
        for moment in trajectories[name].walk(requests):
            watch.mark()
            forwards.append(moment.step.kind)
        laps = watch.laps_ms()
        return Laps(sum(laps), list(zip(forwards, laps, strict=True))[1:])

    for batch_size in options.batch_size:
        requests = {name: partial(draw, name, batch_size) for name in rhythms}
        given = in_turn(requests, options.repeats, seconds=options.seconds)
        for name, laps in given.items():
            steps = [step for lap in laps for step in lap.steps]
            kinds = dict.fromkeys(kind for kind, _ in steps)
            body["rows"].append(
                {
                    "who": "PyTorch, Hemiola's forwards",
                    "how": "eager",
                    "schedule": name,
                    "rhythm": rhythms[name].rhythm,
                    "batch_size": batch_size,
                    "num_requests": len(laps),
                    "denoise": asdict(Spread.of([lap.denoise_ms for lap in laps])),
                    "speedup": ratio([lap.denoise_ms for lap in given[UNCACHED]], [lap.denoise_ms for lap in laps]),
                    "forwards": {kind: median(ms for other, ms in steps if other == kind) for kind in kinds},
                }
            )
        save(body)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Milliseconds of one call of the pipeline: from noise to final latents, decoding them, and all by the clock."""

    denoise_ms: float
    vae_ms: float
    wall_ms: float


class TimedPipeline:
    """diffusers' DiTPipeline, timed before it decodes."""

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, device: torch.device, num_steps: int) -> None:
        self._pipeline = diffusers.DiTPipeline(transformer, vae, scheduler)
        self._pipeline.set_progress_bar_config(disable=True)
        self._vae = vae
        self._device = device
        self._num_steps = num_steps

    def draw(self, batch_size: int) -> Drawn:
        """Draw images of the first classes."""
        watch = Stopwatch(self._device)
        hook = self._vae.post_quant_conv.register_forward_pre_hook(lambda *_: watch.mark())  # where decoding begins
        generator = torch.Generator(self._device).manual_seed(0)
        start = time.perf_counter()
        try:
            watch.mark()
            self._pipeline(
                class_labels=list(range(batch_size)),
                guidance_scale=GUIDANCE,
                generator=generator,
                num_inference_steps=self._num_steps,
                output_type="pt",
            )
            watch.mark()
        finally:
            hook.remove()
        denoise_ms, vae_ms = watch.laps_ms()
        return Drawn(denoise_ms, vae_ms, 1000 * (time.perf_counter() - start))


def _measure_pipelines(
    options: argparse.Namespace, model: Model, device: torch.device, modes: Sequence[str], save: Save
) -> None:
    if model.vae is None or model.family.num_classes != NULL_LABEL:
        raise RequestError(
            f"{options.model} is not for diffusers' DiTPipeline, which decodes with a VAE and takes the label "
            f"{NULL_LABEL} for no class; measure dit-xl-2 or a model like it"
        )
    dtype = getattr(torch, PRECISIONS[options.precision])
    transformer, vae = model.transformer.to(device, dtype), model.vae.to(device, dtype)
    scheduler = make_scheduler(model, "ddim", {})
    body: Body = {"rows": [], "compile_seconds": {}, "left_out": []}
    start = time.monotonic()
    for batch_size in options.batch_size:
        timed = {"eager": TimedPipeline(transformer, vae, scheduler, device, options.steps)}
        for mode in modes:
            name = f"{mode}, batch {batch_size}"
            if time.monotonic() - start > options.compile_seconds:
                body["left_out"].append(name)
                continue
            logger.info("torch.compile %s", name)
            compiled = torch.compile(transformer, mode=mode, dynamic=False)
            begun = time.monotonic()
            timed[mode] = TimedPipeline(compiled, vae, scheduler, device, options.steps)
            timed[mode].draw(batch_size)
            body["compile_seconds"][name] = time.monotonic() - begun
        requests = {how: partial(pipeline.draw, batch_size) for how, pipeline in timed.items()}
        given = in_turn(requests, options.repeats, seconds=options.seconds)
        body["rows"] += [_pipeline_row(options, how, batch_size, given) for how in given if how != "eager" or not modes]
        save(body)


def _pipeline_row(options: argparse.Namespace, how: str, batch_size: int, given: Mapping[str, Sequence[Drawn]]) -> Body:
    drawn, eager = given[how], given["eager"]
    return {
        "who": "diffusers",
        "how": how,
        "schedule": UNCACHED,
        "batch_size": batch_size,
        "num_requests": len(drawn),
        "denoise": asdict(Spread.of([one.denoise_ms for one in drawn])),
        "wall": asdict(Spread.of([one.wall_ms for one in drawn])),
        "vae_ms": median(one.vae_ms for one in drawn),
        "over_eager": ratio([one.denoise_ms for one in eager], [one.denoise_ms for one in drawn]),
        "forwards": {"full": median(one.denoise_ms for one in drawn) / options.steps},
    }
