from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hemiola_export.errors import ExportError
from hemiola_export.model import load_model
from models import TEXT_TOKENS, save_tiny_text_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_text_model(tmp_path / "model")


def test_a_model_of_prompts_brings_its_text_encoder(folder: Path) -> None:
    model = load_model(str(folder))
    assert model.text is not None
    assert model.text.tokenizer.num_tokens == TEXT_TOKENS
    assert model.labels == {}
    assert model.pixels_per_latent == 2


def without(name: str) -> Callable[[Path], None]:
    """Return what takes all weights away whose names contain `name`."""

    def take(file: Path) -> None:
        weights = load_file(file)
        kept = {key: weight for key, weight in weights.items() if name not in key}
        assert 0 < len(kept) < len(weights)
        save_file(kept, file, metadata={"format": "pt"})

    return take


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("text_encoder/model.safetensors", without("block.1.")),
        ("transformer/diffusion_pytorch_model.safetensors", without("transformer_blocks.3.")),
        ("vae/diffusion_pytorch_model.safetensors", without("decoder.conv_out")),
    ],
)
def test_weights_that_are_missing_are_not_drawn_at_random(
    file: str, damage: Callable[[Path], None], folder: Path
) -> None:
    damage(folder / file)
    with pytest.raises(ExportError, match=r"lacks \d+ weights, as .*Fetch the model again"):
        load_model(str(folder))


def test_a_transformer_of_prompts_without_its_text_encoder_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ExportError, match="draws prompts, but has no text_encoder/"):
        load_model(str(folder))
