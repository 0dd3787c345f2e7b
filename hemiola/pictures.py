"""Pictures as files: PNG bytes, rows and grids."""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

MIN_SIDE: Final = 64  # smaller pictures are enlarged by whole pixels, so that people see something
GAP: Final = 2


def enlargement(height: int, width: int) -> int:
    """Return how many times pictures of a size are enlarged to be large enough to look at."""
    return max(1, -(-MIN_SIDE // min(height, width)))


def enlarged(images: Pixels) -> Pixels:
    """Repeat the pixels of small images (n, H, W, C) until both sides are large enough to look at."""
    factor = enlargement(*images.shape[1:3])
    return images if factor <= 1 else images.repeat(factor, axis=1).repeat(factor, axis=2)


def row_of(images: Pixels) -> Pixels:
    """Put images (n, H, W, C) side by side: (H, n·W, C)."""
    return np.concatenate(list(enlarged(images)), axis=1)


def grid_of(rows: list[Pixels]) -> Pixels:
    """Put rows of images, each (n, H, W, C), below one another with a white gap between rows: (height, width, C)."""
    drawn = [row_of(row) for row in rows]
    gap = np.full((GAP, *drawn[0].shape[1:]), 255, dtype=np.uint8)
    return np.concatenate([part for row in drawn for part in (row, gap)][:-1], axis=0)


def as_png(picture: Pixels) -> bytes:
    """Encode a picture (H, W, 1 or 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG")
    return buffer.getvalue()
