"""What the builder `inductor` does with PyTorch: one exported program, compiled ahead of time for some profiles."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._inductor import aot_compile
from torch._inductor.package.package import package_aoti
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from hemiola_engines.builder import Progress
from hemiola_engines.errors import BuildError
from hemiola_engines.inductor import SIGNATURE, model_name, signature, unfolded
from hemiola_runtime.graphs import GraphSpec
from hemiola_runtime.manifest import Profile

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


def compiled_package(
    graph: GraphSpec,
    program: bytes,
    profiles: Sequence[Profile],
    optimization_level: int | None,
    progress: Progress,
    rows_per_image: int,
) -> bytes:
    """Compile a program with a model for every profile.

    Args:
        graph: its description.
        program: from `torch.export.save`.
        profiles: a side of one size becomes a constant, any other a range.
        optimization_level: see `Inductor.build_engine`.
        progress: told what is being done.
        rows_per_image: 2 under guidance, else 1.

    Returns:
        The package. Host code in it is for the processor of this machine, kernels are for its GPU.

    Raises:
        BuildError: PyTorch cannot read or compile it.
    """
    package = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="hemiola-") as folder, _quiet(), _told_of(graph):
        whole = torch.export.load(io.BytesIO(program))
        files = {}
        for i, profile in enumerate(profiles):
            progress(f"engine {graph.name}: profile {i + 1} of {len(profiles)}")
            options = {
                "aot_inductor.output_path": str(Path(folder) / model_name(i)),
                "aot_inductor.metadata": {SIGNATURE: signature(graph, profile)},
                **TUNING.get(optimization_level, {}),
            }
            files[model_name(i)] = _compiled(_specialized(whole, graph, profile, rows_per_image), options)
        package_aoti(package, files)
    torch.cuda.empty_cache()  # whoever runs the engines next, in this process, needs the memory of the examples
    return package.getvalue()


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
        symbol: torch.export.Dim(symbol, min=least, max=most)
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
