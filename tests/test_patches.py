from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hemiola_export.patches import from_patches as torch_from_patches
from hemiola_export.patches import to_patches as torch_to_patches
from hemiola_runtime.patches import from_patches, to_patches
from strategies import examples


@st.composite
def latents(draw: st.DrawFn) -> tuple[NDArray[np.float32], int]:
    """Draw latents (…, C, H, W) whose numbers are all different, with a patch size that divides both sides."""
    side = draw(st.integers(1, 4))
    outer = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (*outer, draw(st.integers(1, 4)), side * draw(st.integers(1, 4)), side * draw(st.integers(1, 4)))
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape), side


@examples(50)
@given(drawn=latents())
def test_patches_put_together_are_the_latents_again(drawn: tuple[NDArray[np.float32], int]) -> None:
    whole, side = drawn
    patches = to_patches(whole, side)
    again = from_patches(patches, side, (whole.shape[-2], whole.shape[-1]))
    assert np.array_equal(again, whole)
    assert again.flags.c_contiguous  # callers hand it on as it is


@examples(50)
@given(drawn=latents())
def test_pytorch_cuts_and_puts_together_what_numpy_does(drawn: tuple[NDArray[np.float32], int]) -> None:
    whole, side = drawn
    size = (whole.shape[-2], whole.shape[-1])
    patches = to_patches(whole, side)
    assert np.array_equal(torch_to_patches(torch.from_numpy(whole), side).numpy(), patches)
    assert np.array_equal(torch_from_patches(torch.from_numpy(patches), side, size).numpy(), whole)


def _number(channel: int, row: int, column: int) -> int:
    """Name a latent of the example below by its place, in digits."""
    return 100 * channel + 10 * row + column


def _example() -> NDArray[Any]:
    """Return latents (2, 4, 6): 2 channels of 2 · 3 patches of 2 · 2."""
    return np.array([[[_number(c, i, j) for j in range(6)] for i in range(4)] for c in range(2)])


@pytest.mark.parametrize(
    ("patch", "numbers"),
    [  # row by row, then all channels of one latent next to each other
        (0, [0, 100, 1, 101, 10, 110, 11, 111]),
        (1, [2, 102, 3, 103, 12, 112, 13, 113]),
        (2, [4, 104, 5, 105, 14, 114, 15, 115]),
        (3, [20, 120, 21, 121, 30, 130, 31, 131]),
        (5, [24, 124, 25, 125, 34, 134, 35, 135]),
    ],
)
def test_patches_go_row_by_row_and_hold_all_channels_of_a_latent_together(patch: int, numbers: list[int]) -> None:
    patches = to_patches(_example(), 2)
    assert patches.shape == (6, 8)
    assert patches[patch].tolist() == numbers


def test_a_wide_picture_is_put_together_row_by_row() -> None:
    patches = np.arange(6)[:, None]  # 6 patches of one latent
    assert from_patches(patches, 1, (2, 3)).tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert from_patches(patches, 1, (3, 2)).tolist() == [[[0, 1], [2, 3], [4, 5]]]


def test_outer_sides_stay_where_they_are() -> None:
    both = np.stack([_example(), -_example()])
    assert np.array_equal(
        to_patches(both[None], 2)[0], np.stack([to_patches(_example(), 2), -to_patches(_example(), 2)])
    )
