"""Modules from named tensors to named tensors as programs of `torch.export` that share one external weight file.

A program takes two arguments, `tensors` and `weights`, both by name, and gives its outputs as a tuple. Every parameter
and buffer that it uses is an input, whatever its size: the file holds none, and whoever runs several programs can keep
one copy of the weights for all.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch._subclasses import FakeTensorMode
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hemiola_export.named_module import NamedModule, Tensors
from hemiola_export.tracing import TORCH_DTYPES, dynamic_shapes, example_inputs, in_order
from hemiola_export.weight_file import WeightFile
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.graphs import GraphSpec, WeightSpec

PROVENANCE: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export_program(
    module: NamedModule,
    *,
    name: str,
    rows_per_image: int,
    activation_bytes_per_row: int,
    folder: Path,
    weights: WeightFile,
) -> GraphSpec:
    """Write one module as `folder/name.pt2`; its weights go to the weight file.

    Args:
        module: symbols in its shapes become dynamic dimensions.
        name: of the program.
        rows_per_image: 2 where R = 2B.
        activation_bytes_per_row: handed on into the description.
        folder: must exist.
        weights: shared by all programs of one export.

    Returns:
        The description of the program. The file is the same, byte for byte, for the same module and versions.
    """
    used = _used_weights(module, rows_per_image)
    program = _traced(module, used, rows_per_image)
    assert not program.state_dict, f"{name} keeps {', '.join(program.state_dict)}"
    program.example_inputs = None
    for node in program.graph.nodes:
        for key in PROVENANCE:  # where and how it was traced, which differs from machine to machine
            node.meta.pop(key, None)
    data = io.BytesIO()
    torch.export.save(program, data)
    (folder / f"{name}.pt2").write_bytes(data.getvalue())
    stored = tuple(_stored(weight, value, weights) for weight, value in used.items())
    return GraphSpec(
        name,
        f"{name}.pt2",
        sha256_of(data.getvalue()),
        module.inputs,
        module.outputs,
        stored,
        activation_bytes_per_row,
    )


def _traced(module: NamedModule, used: Tensors, rows_per_image: int) -> torch.export.ExportedProgram:
    arguments = {"tensors": example_inputs(module, rows_per_image), "weights": used}
    shapes: Any = {"tensors": dynamic_shapes(module, rows_per_image), "weights": dict.fromkeys(used)}
    lifted = _Lifted(module).eval()
    try:
        return torch.export.export(lifted, (), arguments, dynamic_shapes=shapes)
    except UserError as error:  # the code behaves otherwise from some size on, as diffusers' decoder does at 64 images
        refined = refine_dynamic_shapes_from_suggested_fixes(error.msg, shapes)
        return torch.export.export(lifted, (), arguments, dynamic_shapes=refined)


class _Lifted(nn.Module):
    """A module whose weights are inputs; it has none itself."""

    def __init__(self, module: NamedModule) -> None:
        super().__init__()
        self._call = functools.partial(torch.func.functional_call, module)  # hides the module from PyTorch
        self._in_order = functools.partial(in_order, module)

    def forward(self, tensors: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
        return self._in_order(self._call(weights, (tensors,)))


class _Watch(TorchDispatchMode):
    """Notes which tensors operations take."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _used_weights(module: NamedModule, rows_per_image: int) -> Tensors:
    """Return the parameters and buffers that a module uses; `reuse`, say, holds all blocks and runs none."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Watch() as watch:  # shapes alone: nothing is computed
        module(example_inputs(module, rows_per_image))
    every = (*module.named_parameters(), *module.named_buffers())
    return {name: value.detach() for name, value in every if id(value) in watch.seen}


def _stored(name: str, value: Tensor, weights: WeightFile) -> WeightSpec:
    dtype: Any = str(value.dtype).removeprefix("torch.")
    assert dtype in TORCH_DTYPES, f"weight {name} is {dtype}"
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return WeightSpec(name, dtype, tuple(value.shape), weights.store(raw))
