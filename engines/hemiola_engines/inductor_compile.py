"""What the builder `inductor` does with PyTorch: one exported program, compiled ahead of time for some profiles."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._inductor import aot_compile
from torch._inductor.package.package import package_aoti
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from hemiola_engines.builder import EngineJob, Progress
from hemiola_engines.errors import BuildError
from hemiola_engines.inductor import SIGNATURE, limit_threads, model_name, signature, unfolded
from hemiola_runtime.artifacts import write_bytes
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import Profile

CORES_PER_WORKER: Final = 2  # a compiling process, and the compiler that it calls
TUNING: Final[Mapping[int | None, Mapping[str, Any]]] = {  # by optimization level; for others Inductor's own choice
    0: {"aot_inductor.compile_wrapper_opt_level": "O0"},  # of what launches the kernels, not of the kernels
    4: {"max_autotune_gemm": True},
    5: {"max_autotune": True, "coordinate_descent_tuning": True},
}


def compute_capability() -> str | None:
    """Return that of the GPU which PyTorch uses; None if it finds none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def compile_engines(
    jobs: Sequence[EngineJob], optimization_level: int | None, progress: Progress, rows_per_image: int
) -> None:
    """Compile a model for every profile of every program, and write their packages.

    Host code in them is for the processor of this machine, kernels are for its GPU.

    Args:
        jobs: programs from `torch.export.save`, and where their packages go.
        optimization_level: see `Inductor.build_engines`.
        progress: told what is being done.
        rows_per_image: 2 under guidance, else 1.

    Raises:
        BuildError: PyTorch cannot read or compile one.
    """
    with tempfile.TemporaryDirectory(prefix="hemiola-") as folder:
        models = [
            _Model(job.graph, job.source, i, profile, Path(folder) / job.graph.name, optimization_level, rows_per_image)
            for job in jobs
            for i, profile in enumerate(job.profiles)
        ]
        files: dict[str, dict[str, list[Any]]] = {job.graph.name: {} for job in jobs}
        progress(f"compiling {', '.join(files)}")
        for done, (model, compiled) in enumerate(_all_compiled(models), start=1):
            files[model.graph.name][model_name(model.index)] = compiled
            progress(f"engine {model.graph.name}: compiled ({done} of {len(models)} models)")
        for job in jobs:
            package = io.BytesIO()
            package_aoti(package, files[job.graph.name])
            write_bytes(package.getvalue(), job.target)
    torch.cuda.empty_cache()  # whoever runs the engines next, in this process, needs the memory of the examples


@dataclass(frozen=True, slots=True)
class _Model:
    """One program to compile for one profile; a side of one size becomes a constant, any other a range."""

    graph: GraphSpec
    source: Path
    index: int
    profile: Profile
    folder: Path
    optimization_level: int | None
    rows_per_image: int

    def compiled(self) -> list[Any]:
        """Compile it; returns the files of a package."""
        options = {
            "aot_inductor.output_path": str(self.folder / model_name(self.index)),
            "aot_inductor.metadata": {SIGNATURE: signature(self.graph, self.profile)},
            **TUNING.get(self.optimization_level, {}),
        }
        with _quiet(), _told_of(self.graph):
            whole = torch.export.load(self.source)
            return _compiled(_specialized(whole, self.graph, self.profile, self.rows_per_image), options)


def _all_compiled(models: Sequence[_Model]) -> Iterator[tuple[_Model, list[Any]]]:
    """Compile models, each with its files as soon as it is done; on a few cores one after the other, in this process.

    Most of a compilation is one thread of Python or of the C++ compiler.
    """
    cores = os.cpu_count() or 1
    workers = min(len(models), cores // CORES_PER_WORKER)
    if workers <= 1:
        yield from ((model, model.compiled()) for model in models)
        return
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), limit_threads, (max(1, cores // workers),)
    ) as pool:
        running = {pool.submit(model.compiled): model for model in models}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            raise BuildError(
                "a compiling process was killed, most likely for want of memory. Close other programs, or build on a "
                "machine with more memory"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compiled(traced: ExportedProgram, options: Mapping[str, Any]) -> list[Any]:
    """Compile a program for the GPU if there is one; returns the files of a package."""
    if torch.cuda.is_available():
        traced = move_to_device_pass(traced, "cuda:0")
    assert traced.example_inputs is not None
    always = {"aot_inductor.package": True, "cpp.dynamic_threads": True}  # as many threads as there are when it runs
    files = aot_compile(traced.module(check_guards=False), *traced.example_inputs, options={**always, **options})
    assert isinstance(files, list)
    return files


class _Placed(nn.Module):
    """A program that writes its outputs to places it is given. Takes inputs, weights, places; gives nothing."""

    def __init__(self, program: nn.Module, graph: GraphSpec) -> None:
        super().__init__()
        self.program = program
        self.inputs = [spec.name for spec in graph.inputs]
        self.weights = [weight.name for weight in graph.weights]

    def forward(self, *tensors: Tensor) -> tuple[()]:
        first_weight, first_place = len(self.inputs), len(self.inputs) + len(self.weights)
        outputs = self.program(
            tensors=dict(zip(self.inputs, tensors[:first_weight], strict=True)),
            weights=dict(zip(self.weights, tensors[first_weight:first_place], strict=True)),
        )
        for place, output in zip(tensors[first_place:], outputs, strict=True):
            place.copy_(output.reshape(place.shape))
        return ()


def _specialized(whole: ExportedProgram, graph: GraphSpec, profile: Profile, rows_per_image: int) -> ExportedProgram:
    """Trace a program again with the sizes of a profile."""
    sizes = {symbol: likely for symbol, (_, likely, _) in profile.sides.items()}
    open_sides = {
        symbol: torch.export.Dim(symbol.replace(".", "_"), min=least, max=most)
        for symbol, (least, _, most) in profile.sides.items()
        if least < most
    }
    sizes["R"] = rows_per_image * sizes.get("B", 1)
    if "B" in open_sides:
        open_sides["R"] = rows_per_image * open_sides["B"] if rows_per_image > 1 else open_sides["B"]
    examples, shapes = [], []
    tensors: list[tuple[str, tuple[int | str, ...]]] = [
        *((spec.dtype, unfolded(spec)) for spec in graph.inputs),
        *((weight.dtype, weight.shape) for weight in graph.weights),
        *((spec.dtype, unfolded(spec)) for spec in graph.outputs),
    ]
    for dtype, sides in tensors:
        shape = [sizes[side] if isinstance(side, str) else side for side in sides]
        examples.append(torch.zeros(shape, dtype=getattr(torch, dtype)))
        shapes.append({axis: open_sides[side] for axis, side in enumerate(sides) if side in open_sides})
    placed = _Placed(whole.module(check_guards=False), graph)
    return torch.export.export(placed, tuple(examples), dynamic_shapes={"tensors": tuple(shapes)})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's remarks on its own deprecations from the user."""
    compiler = logging.getLogger("torch")
    level = compiler.level
    compiler.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        compiler.setLevel(level)


@contextlib.contextmanager
def _told_of(graph: GraphSpec) -> Iterator[None]:
    """Say which graph PyTorch could not compile."""
    try:
        yield
    except Exception as error:  # exceptions of export, Inductor, Triton and the C++ compiler share no base class
        raise BuildError(
            f"PyTorch {torch.__version__} cannot compile `{graph.name}`: {error}. It needs a C++ compiler (g++), and "
            "graphs that were exported with the same version: export again with `hemiola export --format torch`"
        ) from error
