"""Arrays as a workspace stores them: bytes, one tensor behind the other.

numpy has no bfloat16. Its bytes are the upper halves of float32's, and it is float32 that callers see of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.program import Placed

Bytes = NDArray[np.uint8]


def to_bytes(values: Any, place: Placed) -> Bytes:
    """Write numbers of the place's shape, in its order, as its dtype stores them."""
    if place.dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
        # Round to nearest, ties to even. NaN keeps its sign and stays NaN, whatever its payload.
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        stored: NDArray[Any] = np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
    else:
        stored = np.ascontiguousarray(values, dtype=place.dtype).reshape(-1)
    raw = stored.view(np.uint8)
    assert raw.size == place.num_bytes, f"{raw.size} bytes for a place of {place.num_bytes}"
    return raw


def from_bytes(raw: Bytes, place: Placed) -> NDArray[Any]:
    """Read a tensor; bfloat16 as float32."""
    if place.dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(place.shape)
    return raw.view(place.dtype).reshape(place.shape)


def pack(tensors: Iterable[tuple[Placed, Any]]) -> tuple[int, Bytes]:
    """Lay tensors that are neighbours in a workspace into one piece; returns its offset and bytes."""
    placed = sorted(tensors, key=lambda item: item[0].offset)
    if not placed:
        return 0, np.zeros(0, dtype=np.uint8)
    start, end = placed[0][0].offset, placed[-1][0].end
    packed = np.zeros(end - start, dtype=np.uint8)
    for place, values in placed:
        packed[place.offset - start : place.end - start] = to_bytes(values, place)
    return start, packed
