"""What one graph is: its inputs, outputs and weights, in the symbols that stand for sizes. Standard library alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

TEXT_ENCODER: Final = "text_encoder"  # engine that runs once for a prompt, whatever is drawn of it
CONDITIONING: Final = "conditioning"  # engine that runs once, ahead of the steps
VAE_DECODER: Final = "vae_decoder"  # engine that runs once, after them; or once for each tile of a large picture
FRONT: Final = "front"  # graph of the shallow blocks of `full`; `deep` goes on from there
WEIGHTS_FILE: Final = "weights.bin"

STEP_TABLE: Final = "TR"  # first side of a table that conditioning writes: T steps of R rows each

SYMBOLS: Final = ("B", "R", "K", "T", STEP_TABLE, "N", "rows", "columns", "height", "width")

DType = Literal["float32", "float16", "bfloat16", "int64"]
ITEMSIZE: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}

GraphFormat = Literal["onnx", "torch"]
Precision = Literal["fp32", "fp16", "bf16"]  # of matrix products, weights and caches
PRECISIONS: Final[Mapping[Precision, DType]] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def is_token_count(symbol: str) -> bool:
    """Tell whether a symbol stands for selected tokens: K, or that of one branch of one block, as in `K.mlp.3`."""
    return symbol == "K" or symbol.startswith("K.")


def slots_name(symbol: str) -> str:
    """Name the input of `tokens` that is as long as a token count: `token_slots.mlp.3` for `K.mlp.3`."""
    return f"token_slots{symbol.removeprefix('K')}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one input or output.

    Attributes:
        name: as in the graph.
        dtype: element type.
        shape: integers, or the symbols B images, R rows (2B under guidance), K selected tokens (K.mlp.3 of one branch
            of one block, where each has a count of its own), T model evaluations, TR = T·R; and, where pictures differ
            in size, N tokens in `rows` and `columns`, `height` and `width` in pixels.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        for side in self.shape:
            is_side = side in SYMBOLS or is_token_count(side) if isinstance(side, str) else side >= 0
            if not is_side:
                raise ValueError(f"{side!r} is no side of a shape; symbols are {', '.join(SYMBOLS)}")

    def resolve(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every symbol replaced by its number."""
        return tuple(side if isinstance(side, int) else symbols[side] for side in self.shape)

    def num_bytes(self, symbols: Mapping[str, int]) -> int:
        """Return its size in bytes."""
        return math.prod(self.resolve(symbols)) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Where one weight of a graph lies within the weight file that all graphs share."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph.

    Attributes:
        name: a forward, `front`, `conditioning`, `text_encoder` or `vae_decoder`.
        file: within its folder.
        sha256: of the file.
        inputs: in the graph's order. An output `next_x` replaces the tensor `x`.
        outputs: in the graph's order.
        weights: those that lie in the shared weight file.
        activation_bytes_per_row: estimate of the intermediate tensors alive at once, for one row.
    """

    name: str
    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...]
    activation_bytes_per_row: int
