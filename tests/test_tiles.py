from __future__ import annotations

from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hemiola_runtime.tiles import decode_in_tiles, tile_starts
from strategies import examples

Floats: TypeAlias = NDArray[np.float32]

SCALE: Final = 3  # pixels for each latent
CHANNELS: Final = 2  # of latents and of pictures


def enlarged(latents: Floats) -> Floats:
    """Decode (B, C, h, w) as a decoder without any view of its surroundings would: every latent is a square."""
    return latents.repeat(SCALE, axis=2).repeat(SCALE, axis=3).transpose(0, 2, 3, 1)


def powers_of_two(shape: tuple[int, ...]) -> Floats:
    """Draw numbers whose weighted means with themselves are exact."""
    exponents = np.random.default_rng(0).integers(-3, 4, shape)
    return np.ldexp(np.float32(1), exponents).astype(np.float32)


def shape_of(height: int, width: int) -> tuple[int, int, int]:
    return height * SCALE, width * SCALE, CHANNELS


@pytest.mark.parametrize(
    ("side", "tile", "starts"),
    [
        (8, 8, [0]),
        (6, 8, [0]),
        (9, 8, [0, 1]),
        (14, 8, [0, 6]),  # two latents in common, a quarter
        (15, 8, [0, 4, 7]),  # round(3.5)
        (20, 8, [0, 6, 12]),
        (128, 64, [0, 32, 64]),
        (4, 1, [0, 1, 2, 3]),
    ],
)
def test_tiles_are_as_few_as_overlap_by_a_quarter(side: int, tile: int, starts: list[int]) -> None:
    assert tile_starts(side, tile) == starts


@examples(200)
@given(side=st.integers(1, 300), tile=st.integers(1, 64))
def test_tiles_cover_a_side_and_overlap(side: int, tile: int) -> None:
    starts = tile_starts(side, tile)
    assert starts[0] == 0
    assert starts[-1] + tile == side or (side <= tile and starts == [0])
    assert all(tile // 4 <= first + tile - second < tile for first, second in pairwise(starts))


@examples(40)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    tile=st.integers(1, 12),
    batch=st.integers(1, 2),
)
def test_a_decoder_that_sees_one_latent_gives_the_untiled_picture(
    height: int, width: int, tile: int, batch: int
) -> None:
    latents = powers_of_two((batch, CHANNELS, height, width))
    sides = (min(tile, height), min(tile, width))  # one side may be smaller than a tile
    picture = decode_in_tiles(latents, sides, shape_of(height, width), enlarged)
    assert picture.dtype == np.float32
    assert np.array_equal(picture, enlarged(latents))


def test_the_decoder_is_given_one_image_of_one_tile_at_a_time() -> None:
    latents = powers_of_two((2, CHANNELS, 9, 4))
    seen: list[Floats] = []

    def decode(part: Floats) -> Floats:
        seen.append(part)
        return enlarged(part)

    decode_in_tiles(latents, (8, 4), shape_of(9, 4), decode)
    expected = [latents[i : i + 1, :, top : top + 8] for top in (0, 1) for i in (0, 1)]
    assert [part.shape for part in seen] == [(1, CHANNELS, 8, 4)] * 4
    assert all(np.array_equal(part, other) for part, other in zip(seen, expected, strict=True))


def test_where_tiles_overlap_they_fade_into_each_other() -> None:
    numbers = iter([1.0, 2.0])  # of the left tile, and of the right one

    def decode(part: Floats) -> Floats:
        return np.full((1, 4, 4, 1), next(numbers), dtype=np.float32)

    latents = np.zeros((1, 1, 4, 6), dtype=np.float32)
    picture = decode_in_tiles(latents, (4, 4), (4, 6, 1), decode)
    # Distances to the edges of a tile are 1, 2, 2, 1: in the third and fourth column 2 : 1 and 1 : 2.
    row = [1, 1, (2 * 1 + 1 * 2) / 3, (1 * 1 + 2 * 2) / 3, 2, 2]
    np.testing.assert_allclose(picture[0, :, :, 0], [row] * 4, rtol=1e-6)


def test_every_pixel_counts_even_at_the_corners_of_a_tile() -> None:
    latents = powers_of_two((1, CHANNELS, 1, 3))
    picture = decode_in_tiles(latents, (1, 1), shape_of(1, 3), enlarged)
    assert np.array_equal(picture, enlarged(latents))
    assert np.isfinite(picture).all()
