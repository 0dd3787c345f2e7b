"""Prompts in PyTorch, on the runtime's own way from text to tokens, for search and for reference images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hemiola_export.errors import ExportError
from hemiola_export.model import Model
from hemiola_runtime.request import by_image
from hemiola_runtime.text import PromptCache


@torch.inference_mode()
def embed_prompts(model: Model, prompts: Sequence[str], *, is_guided: bool) -> dict[str, Tensor]:
    """Embed prompts as conditioning reads them, beside the empty negative prompt under guidance.

    Returns:
        `text_embeddings` (B, rows per image, S, D) and `text_mask` (B, rows per image, S), float32.
    """
    assert model.text is not None, "the model draws no prompts"
    encoder = model.text.graph(model.family.width)

    def encode(token_ids: NDArray[np.int64], mask: NDArray[np.float32]) -> NDArray[np.float32]:
        given = {"token_ids": torch.from_numpy(token_ids), "text_mask": torch.from_numpy(mask)}
        embeddings: NDArray[np.float32] = encoder(given)["text_embeddings"].numpy()
        return embeddings

    texts = [*([""] * len(prompts) if is_guided else []), *prompts]
    embedded = PromptCache(model.text.tokenizer.json, encode).embed(texts)
    return {name: torch.from_numpy(values) for name, values in by_image(embedded, len(prompts)).items()}


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file, one on each line.

    Raises:
        ExportError: there is no such file, or it holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the prompts {path}: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ExportError(f"{path} holds no prompt; write one on each line")
    return prompts
