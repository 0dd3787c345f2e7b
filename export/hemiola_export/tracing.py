"""What it takes to trace a module, whatever the trace becomes: example inputs, and which of their sides are open."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from hemiola_export.named_module import NamedModule, Tensors
from hemiola_runtime.graphs import is_token_count

# No side of 1: torch.export would take it for fixed.
EXAMPLE: Final = {"B": 2, "K": 3, "T": 5, "N": 16, "rows": 6, "columns": 7}
TORCH_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


def _own_counts(module: NamedModule) -> list[str]:
    """Name the symbols of token counts that blocks have for themselves."""
    symbols = (side for spec in module.inputs for side in spec.shape if isinstance(side, str))
    return [symbol for symbol in symbols if is_token_count(symbol) and symbol not in EXAMPLE]


def example_inputs(module: NamedModule, rows_per_image: int) -> Tensors:
    """Make inputs of zeros, by name."""
    sizes = EXAMPLE | {"R": rows_per_image * EXAMPLE["B"]} | module.example_sizes
    sizes |= dict.fromkeys(_own_counts(module), 2)
    return {spec.name: torch.zeros(spec.resolve(sizes), dtype=TORCH_DTYPES[spec.dtype]) for spec in module.inputs}


def dynamic_shapes(module: NamedModule, rows_per_image: int) -> dict[str, dict[int, Any]]:
    """Return the open sides of every input, as `torch.export` takes them."""
    images = torch.export.Dim("B", min=1, max=4096)
    # No more tokens can be chosen than there are: without the bound torch.export finds it, and begins anew.
    counts = [spec.shape[-1] for spec in module.inputs if spec.name == "staleness" and isinstance(spec.shape[-1], int)]
    dimensions = {
        "B": images,
        "R": rows_per_image * images if rows_per_image > 1 else images,
        "K": torch.export.Dim("K", min=1, max=int(counts[0]) if counts else 1 << 16),
        "T": torch.export.Dim("T", min=1, max=1 << 16),
        "N": torch.export.Dim("N", min=1, max=1 << 16),
        "rows": torch.export.Dim("rows", min=1, max=1 << 10),
        "columns": torch.export.Dim("columns", min=1, max=1 << 10),
    }
    own_counts = _own_counts(module)  # by names that Python could have, too
    dimensions |= {symbol: torch.export.Dim(symbol.replace(".", "_"), min=1, max=1 << 16) for symbol in own_counts}
    return {
        spec.name: {axis: dimensions[side] for axis, side in enumerate(spec.shape) if isinstance(side, str)}
        for spec in module.inputs
    }


def in_order(module: NamedModule, written: Tensors) -> tuple[Tensor, ...]:
    """Return the outputs of a module in the order in which it declares them."""
    return tuple(written[spec.name] for spec in module.outputs)
