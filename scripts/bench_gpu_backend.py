"""The part `backend` of `scripts/bench_gpu.py`: build a bundle, measure it with and without CUDA graphs, compare it."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from hemiola_engines.build import BUILDERS, build_bundle
from hemiola_engines.options import BuildOptions
from hemiola_runtime.backends import obstacle
from hemiola_runtime.bench import Spread, in_turn, ratio, sample, summary
from hemiola_runtime.bundle import open_bundle
from hemiola_runtime.errors import BundleError
from hemiola_runtime.graph_set import UNCACHED
from hemiola_runtime.graphs import CONDITIONING, VAE_DECODER
from hemiola_runtime.manifest import BackendSpec
from hemiola_runtime.report import RunReport
from hemiola_runtime.sampler import Sampler
from hemiola_runtime.schedule import Forward

ONLY: Final = "only_"  # schedules of full steps and then one kind alone: they tell its time within a CUDA graph

Body = dict[str, Any]
Key = tuple[str, str]  # how it ran, and which schedule

logger = logging.getLogger("bench_gpu")


def run(
    options: argparse.Namespace,
    load_model: Callable[[], Any],
    export: Callable[[Path, str], Body],
    save: Callable[[Body], None],
) -> None:
    """Measure one backend.

    Args:
        options: of the command line.
        load_model: for --verify.
        export: writes the graphs into a folder in a format, where --graphs names none.
        save: writes what was measured so far.

    Raises:
        BundleError: the backend does not run here, or its engines compute something else than PyTorch.
    """
    body: Body = {"rows": []}
    builder = BUILDERS[options.name]
    gpu, capabilities = builder.target(BuildOptions(options.name, max_batch_size=1))
    if (reason := obstacle(BackendSpec(options.name, builder.version(), gpu, capabilities))) is not None:
        raise BundleError(reason)
    with tempfile.TemporaryDirectory() as folder:
        graphs, bundle = options.graphs or Path(folder) / "graphs", Path(folder) / "bundle"
        if options.graphs is None:
            body |= export(graphs, builder.format)
        start = time.perf_counter()
        wanted = BuildOptions(options.name, max(options.batch_size), options.precision)
        build_bundle(graphs, bundle, wanted, progress=logger.info)
        body["build_seconds"] = time.perf_counter() - start
        save(body)
        with ExitStack() as stack:
            samplers = _open(bundle, stack)
            body["memory"] = {how: str(sampler.memory_plan) for how, sampler in samplers.items()}
            for batch_size in options.batch_size:
                logger.info("measuring batch %d: %s", batch_size, ", ".join(samplers))
                body["rows"] += _rows(options, samplers, batch_size)
                save(body)
        if options.verify:
            body |= _compared(load_model(), bundle, options)
            save(body)
    if body.get("beyond_bounds"):
        raise BundleError(f"engines of {options.name} differ from PyTorch: {body['beyond_bounds']}")


def _open(bundle: Path, stack: ExitStack) -> dict[str, Sampler]:
    """Open a bundle; twice where its backend captures trajectories: with CUDA graphs, and launch by launch."""
    sampler = stack.enter_context(Sampler.open(bundle))
    if sample(sampler, UNCACHED, 1).graph_bytes is None:
        return {"launches": sampler}
    return {"graph": sampler, "launches": stack.enter_context(Sampler.open(bundle, cuda_graphs=False))}


def _rows(options: argparse.Namespace, samplers: Mapping[str, Sampler], batch_size: int) -> list[Body]:
    requests = {
        (how, schedule): partial(sample, sampler, schedule, batch_size)
        for how, sampler in samplers.items()
        for schedule in sampler.schedules
        if how == "graph" or not schedule.startswith(ONLY)
    }
    reports = in_turn(requests, options.repeats, seconds=options.seconds)
    launched: dict[str, float] = {}
    for (how, _), given in reports.items():
        if how == "launches":
            launched |= {name: spread.median_ms for name, spread in summary(given, given).engines.items()}
    vae_ms = launched.pop(VAE_DECODER, 0.0)
    denoise = {key: [report.trajectory_ms - vae_ms for report in given] for key, given in reports.items()}
    num_steps = len(next(given[0].rhythm for (_, schedule), given in reports.items() if schedule == UNCACHED))
    forwards = {"launches": launched}
    if "graph" in samplers:
        num_full = {name: schedule.counts[Forward.FULL] for name, schedule in samplers["graph"].schedules.items()}
        forwards["graph"] = captured_forwards(denoise, launched, num_steps, num_full)
    return [
        _row(options.name, key, given, denoise) | {"forwards": forwards[key[0]], "vae_ms": vae_ms or None}
        for key, given in reports.items()
        if not key[1].startswith(ONLY)
    ]


def _row(who: str, key: Key, reports: Sequence[RunReport], denoise: Mapping[Key, list[float]]) -> Body:
    how, schedule = key
    measured = summary(reports, reports)
    return {
        "who": who,
        "how": how,
        "schedule": schedule,
        "rhythm": measured.rhythm,
        "batch_size": reports[0].batch_size,
        "num_requests": len(reports),
        "denoise": asdict(Spread.of(denoise[key])),
        "wall": asdict(measured.wall),
        "speedup": ratio(denoise[how, UNCACHED], denoise[key]),
        "busy": measured.busy,
        "host_ms": median(report.wall_ms - report.trajectory_ms for report in reports),
        "graph_bytes": measured.graph_bytes,
    }


def captured_forwards(
    denoise: Mapping[Key, Sequence[float]], launched: Mapping[str, float], num_steps: int, num_full: Mapping[str, int]
) -> dict[str, float]:
    """Tell the forwards within captured graphs apart, which a graph does not.

    T steps of `full` take c + T·f, and n with T - n of another kind c + n·f + (T - n)·x. The conditioning c is that of
    launch by launch: one launch of many.

    Args:
        denoise: milliseconds of a batch, by how it ran and schedule.
        launched: milliseconds of each engine launch by launch.
        num_steps: T.
        num_full: n, by schedule.
    """
    whole = median(denoise["graph", UNCACHED])
    full = (whole - launched[CONDITIONING]) / num_steps
    found = {Forward.FULL.value: full}
    for (how, schedule), given in denoise.items():
        if how == "graph" and schedule.startswith(ONLY):
            found[schedule.removeprefix(ONLY)] = full + (median(given) - whole) / (num_steps - num_full[schedule])
    return found


def _compared(model: Any, bundle: Path, options: argparse.Namespace) -> Body:
    from hemiola_export.reference import beyond_bounds, compare_forwards

    found = compare_forwards(model, open_bundle(bundle), on_step=logger.debug)
    return {"forward_parity": found, "beyond_bounds": beyond_bounds(found, options.precision)}
