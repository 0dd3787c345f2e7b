from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hemiola.pictures import GAP, MIN_SIDE, Pixels, as_png, enlarged, grid_of, row_of


def _images(count: int, height: int, width: int, channels: int) -> Pixels:
    drawn = np.random.default_rng(0).integers(0, 256, (count, height, width, channels))
    return drawn.astype(np.uint8)


@pytest.mark.parametrize(
    ("side", "factor"),
    [(8, 8), (28, 3), (63, 2), (64, 1), (256, 1), (1, 64)],  # ⌈64 / side⌉
)
def test_small_images_are_enlarged_by_whole_pixels(side: int, factor: int) -> None:
    images = _images(1, side, side + 1, 1)
    large = enlarged(images)
    assert large.shape == (1, factor * side, factor * (side + 1), 1)
    assert min(large.shape[1:3]) >= MIN_SIDE
    np.testing.assert_array_equal(large[:, ::factor, ::factor], images)
    np.testing.assert_array_equal(large[:, factor - 1 :: factor, factor - 1 :: factor], images)


def test_the_shorter_side_decides_how_far_images_are_enlarged() -> None:
    assert enlarged(_images(1, 16, 100, 3)).shape == (1, 64, 400, 3)  # 64 / 16 = 4


def test_a_row_holds_its_images_from_left_to_right() -> None:
    images = _images(3, 64, 70, 3)
    row = row_of(images)
    assert row.shape == (64, 210, 3)
    np.testing.assert_array_equal(np.split(row, 3, axis=1), images)


def test_rows_stand_below_one_another_with_white_between() -> None:
    first, second = _images(2, 64, 64, 1), 255 - _images(2, 64, 64, 1)
    grid = grid_of([first, second])
    assert grid.shape == (64 + GAP + 64, 128, 1)
    np.testing.assert_array_equal(grid[:64], row_of(first))
    assert np.all(grid[64 : 64 + GAP] == 255)
    np.testing.assert_array_equal(grid[64 + GAP :], row_of(second))


def test_a_grid_of_one_row_has_no_gap() -> None:
    images = _images(2, 64, 64, 3)
    np.testing.assert_array_equal(grid_of([images]), row_of(images))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_reads_back_pixel_for_pixel(channels: int, mode: str) -> None:
    picture = _images(1, 5, 7, channels)[0]
    with Image.open(io.BytesIO(as_png(picture))) as opened:
        assert (opened.format, opened.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(opened).reshape(picture.shape), picture)
