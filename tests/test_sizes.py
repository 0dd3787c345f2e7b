from __future__ import annotations

from dataclasses import replace

import pytest

from hemiola_export.errors import ExportError
from hemiola_export.model import Model, load_model
from hemiola_export.sizes import Sizes
from hemiola_runtime.schedule import TokenSelector
from models import save_tiny_model, save_tiny_text_model

SELECTOR = TokenSelector("value_norm", 0.25, spatial_bonus=0.4, spatial_size=2, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A PixArt for latents of 8 × 8, each of 2 × 2 pixels; patches are 2 × 2 latents."""
    return load_model(str(save_tiny_text_model(tmp_path_factory.mktemp("sizes") / "model")))


@pytest.fixture(scope="module")
def of_labels(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A DiT for 8 × 8 pixels."""
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("labels") / "model", has_vae=False)))


@pytest.mark.parametrize(
    ("sizes", "least", "most"),
    [
        (Sizes(), (8, 8), (8, 8)),
        (Sizes((8, 12), (24, 20)), (4, 6), (12, 10)),
        (Sizes(smallest=(4, 16)), (2, 8), (8, 8)),
        (Sizes(largest=(16, 2000)), (8, 8), (8, 1000)),
        (Sizes((16, 16), (16, 16)), (8, 8), (8, 8)),
    ],
)
def test_pixels_become_latents_and_what_is_left_out_is_the_configured_size(
    model: Model, sizes: Sizes, least: tuple[int, int], most: tuple[int, int]
) -> None:
    assert sizes.in_latents(model, None) == (least, most)


def test_in_a_model_of_pixels_a_latent_is_one(of_labels: Model) -> None:
    assert Sizes((8, 8), (8, 8)).in_latents(of_labels, None) == ((8, 8), (8, 8))


@pytest.mark.parametrize("sizes", [Sizes(largest=(16, 8)), Sizes(smallest=(8, 4))])
def test_a_model_of_labels_draws_one_size_alone(of_labels: Model, sizes: Sizes) -> None:
    with pytest.raises(ExportError, match="a model of the family dit draws pictures of one size"):
        sizes.in_latents(of_labels, None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(largest=(16, 17)), r"a latent becomes 2 pixels, which does not divide \(16, 17\)"),
        (Sizes(smallest=(15, 16)), r"a latent becomes 2 pixels, which does not divide \(15, 16\)"),
        (Sizes(largest=(18, 16)), "the smallest and the largest height are multiples of 4 pixels"),
        (Sizes(smallest=(8, 10)), "the smallest and the largest width are multiples of 4 pixels"),
        (Sizes(smallest=(20, 16)), "the model's own height lies between .*: not 20 ≤ 16 ≤ 16"),
        (Sizes(largest=(16, 12)), "the model's own width lies between .*: not 16 ≤ 16 ≤ 12"),
        (Sizes(smallest=(0, 16)), "the model's own height lies between .*: not 0 ≤ 16 ≤ 16"),
        (Sizes(smallest=(-4, 16)), "the model's own height lies between .*: not -4 ≤ 16 ≤ 16"),
    ],
)
def test_sizes_that_the_model_cannot_draw_are_refused(model: Model, sizes: Sizes, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        sizes.in_latents(model, None)


def test_squares_of_tokens_divide_all_sizes_where_they_are_used(model: Model) -> None:
    # squares of 2 × 2 tokens of 2 × 2 latents of 2 × 2 pixels
    for sizes in (Sizes(largest=(16, 20)), Sizes(smallest=(12, 16))):
        with pytest.raises(ExportError, match="multiples of 8 pixels"):
            sizes.in_latents(model, SELECTOR)
        sizes.in_latents(model, replace(SELECTOR, spatial_bonus=0.0))
    assert Sizes((8, 16), (16, 24)).in_latents(model, SELECTOR) == ((4, 8), (8, 12))


@pytest.mark.parametrize(
    ("tile", "largest", "side"),
    [
        (None, (8, 8), None),
        (None, (128, 128), None),
        (None, (128, 130), 128),  # 1024 pixels of a usual VAE
        (16, (12, 8), 8),
        (16, (8, 8), None),
        (16, (4, 10), 8),
        (400, (12, 12), None),
    ],
)
def test_what_is_larger_than_a_tile_is_decoded_in_tiles(
    model: Model, tile: int | None, largest: tuple[int, int], side: int | None
) -> None:
    assert Sizes(tile=tile).tile_in_latents(model, largest) == side


@pytest.mark.parametrize("tile", [0, -4, 6, 17])
def test_a_tile_that_cuts_patches_is_refused(model: Model, tile: int) -> None:
    with pytest.raises(ExportError, match=f"a tile is a multiple of 4 pixels, not {tile}"):
        Sizes(tile=tile).tile_in_latents(model, (64, 64))
