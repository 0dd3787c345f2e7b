from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.program import Placed
from hemiola_runtime.storage import from_bytes, pack, to_bytes
from strategies import examples

ITEMSIZE: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}


def bfloat16_of(numbers: list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Store numbers as bfloat16 and read them back."""
    place = Placed(0, (len(numbers),), "bfloat16")
    return from_bytes(to_bytes(numbers, place), place)


def bits_of(bits: int) -> float:
    """Return the float32 of some bits."""
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


@examples(200)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_any_float32_is_stored_as_pytorch_rounds_it_to_bfloat16(bits: list[int]) -> None:
    numbers = np.array(bits, dtype=np.uint32).view(np.float32)
    expected = torch.from_numpy(numbers.copy()).to(torch.bfloat16).float().numpy()
    place = Placed(0, (len(bits),), "bfloat16")
    found = from_bytes(to_bytes(numbers, place), place)
    np.testing.assert_array_equal(found, expected)  # NaN where NaN is expected
    is_nan = np.isnan(numbers)
    assert np.array_equal(np.signbit(found[~is_nan]), np.signbit(expected[~is_nan]))


@pytest.mark.parametrize(
    ("number", "stored"),
    [
        (1.0, 1.0),
        (-0.0, -0.0),
        (1 + 2**-8, 1.0),  # halfway between 1 and 1 + 2^-7: to the even one
        (1 + 3 * 2**-8, 1 + 2**-6),  # halfway between 1 + 2^-7 and 1 + 2^-6: again to the even one
        (1 + 2**-8 + 2**-23, 1 + 2**-7),  # just above the half
        (1 + 3 * 2**-8 - 2**-23, 1 + 2**-7),  # just below it
        (bits_of(0x7F7FFFFF), math.inf),  # float32's largest lies nearer to 2^128 than to bfloat16's largest
        (bits_of(0x7F7F0000), bits_of(0x7F7F0000)),  # bfloat16's largest
        (bits_of(0x7F7F7FFF), bits_of(0x7F7F0000)),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (bits_of(0x00000001), 0.0),  # the smallest subnormal
        (bits_of(0x00010000), bits_of(0x00010000)),  # bfloat16's smallest
    ],
)
def test_bfloat16_rounds_to_nearest_and_ties_to_even(number: float, stored: float) -> None:
    (found,) = bfloat16_of([number]).tolist()
    assert found == stored
    assert math.copysign(1, found) == math.copysign(1, stored)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF])
def test_nan_stays_nan_with_its_sign_whatever_its_payload(bits: int) -> None:
    raw = to_bytes(np.array([bits], dtype=np.uint32).view(np.float32), Placed(0, (1,), "bfloat16"))
    (half,) = raw.view(np.uint16).tolist()
    assert torch.tensor([half], dtype=torch.uint16).view(torch.bfloat16).isnan().item()
    assert half >> 15 == bits >> 31


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_a_tensor_reads_back_in_its_shape(dtype: Any, shape: tuple[int, ...]) -> None:
    place = Placed(256, shape, dtype)
    values = np.arange(place.num_bytes // ITEMSIZE[dtype]).reshape(shape)  # small whole numbers: no dtype rounds them
    raw = to_bytes(values, place)
    assert raw.dtype == np.uint8
    assert raw.shape == (place.num_bytes,)
    found = from_bytes(raw, place)
    np.testing.assert_array_equal(found, values)
    assert found.shape == shape
    assert found.dtype == ("float32" if dtype == "bfloat16" else dtype)


def test_an_array_that_is_not_contiguous_is_stored_in_the_order_of_its_indices() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for dtype in ("float32", "bfloat16"):
        place = Placed(0, (3, 2), "float32" if dtype == "float32" else "bfloat16")
        assert from_bytes(to_bytes(turned, place), place).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_numbers_that_do_not_fill_their_place_are_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="8 bytes for a place of 12"):
        to_bytes([1.0, 2.0], Placed(0, (3,), "float32"))


def test_neighbours_are_packed_into_one_piece_in_the_order_of_their_places() -> None:
    first, second = Placed(256, (2,), "int64"), Placed(272, (2,), "float32")
    start, packed = pack([(second, [0.5, 2.0]), (first, [7, -1])])
    assert (start, len(packed)) == (256, 2 * 8 + 2 * 4)
    assert packed[:16].view(np.int64).tolist() == [7, -1]
    assert packed[16:].view(np.float32).tolist() == [0.5, 2.0]


def test_nothing_is_packed_into_no_bytes() -> None:
    start, packed = pack([])
    assert start == 0
    assert packed.tolist() == []


def test_gaps_between_neighbours_are_packed_as_zeros() -> None:
    start, packed = pack([(Placed(0, (1,), "float32"), [1.0]), (Placed(256, (1,), "bfloat16"), [-2.0])])
    assert (start, len(packed)) == (0, 258)
    assert packed[:4].view(np.float32).tolist() == [1.0]
    assert not packed[4:256].any()
    assert packed[256:].view(np.uint16).tolist() == [0xC000]  # sign, exponent 128, no fraction
