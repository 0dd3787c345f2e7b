"""Modules from named tensors to named tensors as ONNX graphs that share one external weight file."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from hemiola_export.named_module import NamedModule, Tensors
from hemiola_export.tracing import TORCH_DTYPES, dynamic_shapes, example_inputs, in_order
from hemiola_export.weight_file import WeightFile
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.graphs import WEIGHTS_FILE, GraphSpec, TensorSpec, WeightSpec

OPSET: Final = 20  # decomposed attention, which every backend fuses by itself; 23 fails to build in fp32 on TensorRT
EXTERNAL_BYTES: Final = 1024  # smaller weights stay within the graph

logger = logging.getLogger(__name__)


class _InOrder(nn.Module):
    """Gives the outputs of a module as a tuple."""

    def __init__(self, module: NamedModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, tensors: Tensors) -> tuple[Tensor, ...]:
        return in_order(self.module, self.module(tensors))


def export_graph(
    module: NamedModule,
    *,
    name: str,
    rows_per_image: int,
    activation_bytes_per_row: int,
    folder: Path,
    weights: WeightFile,
) -> GraphSpec:
    """Write one module as `folder/name.onnx`; its larger weights go to the weight file.

    Args:
        module: symbols in its shapes become dynamic dimensions.
        name: of the graph.
        rows_per_image: 2 where R = 2B.
        activation_bytes_per_row: handed on into the description.
        folder: must exist.
        weights: shared by all graphs of one export.

    Returns:
        The description of the graph. The file is the same, byte for byte, for the same module and versions.
    """
    model = _traced(module, rows_per_image)
    _name_dimensions(model, module.inputs, module.outputs)
    stored = _move_weights(model, weights)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    (folder / f"{name}.onnx").write_bytes(data)
    return GraphSpec(
        name, f"{name}.onnx", sha256_of(data), module.inputs, module.outputs, stored, activation_bytes_per_row
    )


def _traced(module: NamedModule, rows_per_image: int) -> ir.Model:
    with _quiet_exporter():
        program = torch.onnx.export(
            _InOrder(module).eval(),
            (),
            kwargs={"tensors": example_inputs(module, rows_per_image)},
            dynamic_shapes={"tensors": dynamic_shapes(module, rows_per_image)},
            input_names=[spec.name for spec in module.inputs],
            output_names=[spec.name for spec in module.outputs],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks on its own deprecations, and on libraries it does without, from the user."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _name_dimensions(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Call dynamic dimensions by their symbols, and drop what depends on where and how the graph was traced."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, spec in zip(values, specs, strict=True):
            assert value.name == spec.name, f"the graph has {value.name} where {spec.name} belongs"
            value.metadata_props.clear()
            value.shape = ir.Shape(spec.shape)


def _move_weights(model: ir.Model, weights: WeightFile) -> tuple[WeightSpec, ...]:
    stored = []
    initializers: dict[str, Any] = dict(model.graph.initializers)
    for name, value in initializers.items():
        value.metadata_props.clear()
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        if array.nbytes < EXTERNAL_BYTES:
            continue
        assert array.dtype.name in TORCH_DTYPES, f"weight {name} is {array.dtype}"
        offset = weights.store(array.tobytes())
        dtype: Any = array.dtype.name
        stored.append(WeightSpec(name, dtype, array.shape, offset))
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
        )
    return tuple(stored)
