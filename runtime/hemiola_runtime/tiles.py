"""Decoding of large latents in tiles, which overlap and fade into each other.

A decoder's intermediate tensors grow with the picture: at 2048 × 2048 pixels, tens of gigabytes. In tiles they stay
those of one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.pipeline import Size

Floats = NDArray[np.float32]


def tile_starts(side: int, tile: int) -> list[int]:
    """Return where the tiles of one side begin: as few as overlap by a quarter or more, evenly spread."""
    if tile >= side:
        return [0]
    count = 1 + -(-(side - tile) // (tile - tile // 4))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def decode_in_tiles(
    latents: Floats, tile: Size, image_shape: tuple[int, int, int], decode: Callable[[Floats], Floats]
) -> Floats:
    """Decode latents tile by tile.

    Where tiles overlap, the picture is their mean, weighted by the distance to each tile's edge.

    Args:
        latents: (B, C, H, W).
        tile: (h, w), not larger than the latents.
        image_shape: (height, width, channels) of a whole picture.
        decode: turns a tile (1, C, h, w) into a picture (1, height, width, channels).

    Returns:
        (B, height, width, channels).
    """
    sides = latents.shape[2:]
    scale = image_shape[0] // sides[0]
    weights = np.outer(*(_fading(side * scale) for side in tile))[..., None]  # (height, width, 1)
    weighted = np.zeros((len(latents), *image_shape), dtype=np.float32)
    total = np.zeros((*image_shape[:2], 1), dtype=np.float32)
    for top, left in product(*map(tile_starts, sides, tile)):
        rows, columns = slice(top, top + tile[0]), slice(left, left + tile[1])
        there = slice(top * scale, rows.stop * scale), slice(left * scale, columns.stop * scale)
        total[there] += weights
        for i in range(len(latents)):
            weighted[i][there] += weights * decode(latents[i : i + 1, :, rows, columns])[0]
    pictures: Floats = weighted / total
    return pictures


def _fading(side: int) -> Floats:
    """Return weights (side,) that rise from the edges inwards, and are positive everywhere."""
    distance = np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1))
    return np.asarray(distance / distance.max(), dtype=np.float32)
