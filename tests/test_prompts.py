from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bundles import Made
from hemiola_export.errors import ExportError
from hemiola_export.model import Model, load_model
from hemiola_export.prompts import embed_prompts, read_prompts
from models import TEXT_TOKENS, WORDS


@pytest.fixture(scope="module")
def model(text: Made) -> Model:
    return load_model(str(text.model))


@torch.inference_mode()
def encoded(model: Model, words: list[str]) -> torch.Tensor:
    """Encode words with transformers and diffusers: (S, D), of which the tokens of padding mean nothing."""
    assert model.text is not None
    ids = torch.tensor([[*map(WORDS.index, words), WORDS.index("</s>")]])
    embedded: torch.Tensor = model.transformer.caption_projection(model.text.encoder(ids).last_hidden_state)
    return embedded[0]


@pytest.mark.parametrize("is_guided", [True, False])
def test_prompts_are_embedded_as_transformers_and_diffusers_do(model: Model, is_guided: bool) -> None:
    embedded = embed_prompts(model, ["A Red circle ", ""], is_guided=is_guided)
    embeddings, mask = embedded["text_embeddings"], embedded["text_mask"]
    rows = 2 if is_guided else 1
    assert embeddings.shape == (2, rows, TEXT_TOKENS, model.family.width)
    assert mask.sum(-1).tolist() == ([[1, 4], [1, 1]] if is_guided else [[4], [1]])
    torch.testing.assert_close(embeddings[0, -1, :4], encoded(model, ["a", "red", "circle"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings[1, -1, :1], encoded(model, []), rtol=1e-4, atol=1e-5)
    if is_guided:
        assert torch.equal(embeddings[0, 0], embeddings[1, 1]), "the negative prompt is the empty one, and comes first"


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  ein grüner Kreis \n", encoding="utf-8")
    assert read_prompts(path) == ["a red circle", "ein grüner Kreis"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot read the prompts"), (b"\n \n", "holds no prompt"), (b"\xff\xfe", "cannot read the prompts")],
)
def test_a_file_without_prompts_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=said):
        read_prompts(path)
