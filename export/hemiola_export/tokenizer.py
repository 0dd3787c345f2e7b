"""A model's tokenizer as one file that the runtime opens without transformers: prompt in, S token ids and a mask out.

What diffusers' pipeline does to a prompt before it tokenizes it, `prompt.lower().strip()`, becomes part of the file, so
that the runtime knows nothing of it. What the file gives is compared with transformers before it is handed on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hemiola_export.errors import ExportError

PIXART_TOKENS: Final = 120  # max_sequence_length of PixArtAlphaPipeline.encode_prompt; Σ has 300
FILES: Final = ("tokenizer.json", "spiece.model")  # either is a tokenizer; transformers prefers the first

# Whitespace as str.strip() knows it, which is more than Unicode's: file, group, record and unit separator as well.
WHITESPACE: Final = (
    r"[\x{9}-\x{d}\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
)
# The sigma at the end of a word, Unicode's one rule of lower case that looks at neighbours; tokenizers looks at none.
FINAL_SIGMA: Final = (
    r"[\p{Cased}&&[^\p{Case_Ignorable}]]\p{Case_Ignorable}*\KΣ"
    r"(?!\p{Case_Ignorable}*[\p{Cased}&&[^\p{Case_Ignorable}]])"
)
LOWER_AND_STRIP: Final[list[dict[str, Any]]] = [
    {"type": "Replace", "pattern": {"Regex": FINAL_SIGMA}, "content": "ς"},
    {"type": "Lowercase"},
    # Only the first character of a run may begin a match: else long runs take the square of their length.
    {"type": "Replace", "pattern": {"Regex": rf"\A{WHITESPACE}+|(?<!{WHITESPACE}){WHITESPACE}+\z"}, "content": ""},
]
PROBES: Final = (
    "",
    " A small CAT,\n sits  on its Mat. \x1c",
    "ΟΔΥΣΣΕΥΣ ΕΙΜΙ",
    "É ﬁ ２ ½ 猫 🐈 İ x\u200by",
    "a Cat " * 1000,
)


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """A tokenizer that takes prompts as they are written.

    Attributes:
        json: text of a `tokenizers.Tokenizer`: it lowers and strips, truncates and pads, always to S tokens.
        num_tokens: S.
        num_ids: its token ids are 0 … num_ids - 1.
    """

    json: bytes
    num_tokens: int
    num_ids: int


def read_tokenizer(folder: Path, num_tokens: int | None = None) -> PromptTokenizer:
    """Read the `tokenizer/` of a diffusers folder: its tokenizer.json, or its spiece.model converted.

    Token ids and mask are those that `PixArtAlphaPipeline.encode_prompt` has, without clean_caption, for the same
    prompt. One thing differs: characters that only the model's own normalizer turns into a special token, as it does
    the full-width `＜/s＞`, are taken for that token here.

    Args:
        folder: with the files that transformers' `save_pretrained` writes, of this or an older release.
        num_tokens: S; None for PixArt-α's 120, or as many as the tokenizer says its model takes, if they are fewer.

    Raises:
        ExportError: there is no tokenizer, transformers does not open it, or no file can do what it does.
    """
    tokenizer = _opened(folder)
    if num_tokens is None:
        num_tokens = min(PIXART_TOKENS, int(tokenizer.model_max_length))
    num_special = tokenizer.num_special_tokens_to_add(pair=False)
    if num_tokens <= num_special:
        raise ExportError(
            f"prompts of {num_tokens} tokens, of which {num_special} are special, hold no text. Ask for "
            f"{num_special + 1} tokens or more; PixArt-α has {PIXART_TOKENS}"
        )
    if tokenizer.pad_token_id is None:
        raise ExportError(f"the tokenizer in {folder} has no token for padding; name one in its tokenizer_config.json")
    made = _with_lower_and_strip(tokenizer.backend_tokenizer)
    made.enable_truncation(num_tokens, direction=tokenizer.truncation_side)
    made.enable_padding(
        direction=tokenizer.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_token=tokenizer.pad_token,
        length=num_tokens,
    )
    _check(made, tokenizer, num_tokens, folder)
    return PromptTokenizer(made.to_str().encode(), num_tokens, max(tokenizer.get_vocab().values()) + 1)


def _opened(folder: Path) -> Any:
    """Open a tokenizer with transformers: the class that its configuration names, as the pipeline does."""
    if not any((folder / name).is_file() for name in FILES):
        raise ExportError(
            f"{folder} holds no tokenizer: neither {' nor '.join(FILES)} is there. Save the model's with transformers' "
            "save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever it meets in a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"transformers cannot open the tokenizer in {folder}: {reason}. Fetch the folder again; a spiece.model "
            "needs sentencepiece and protobuf, which come with: pip install 'hemiola[search]'"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ExportError(
            f"the tokenizer in {folder} is a {type(tokenizer).__name__}, which is written in Python; Hemiola takes "
            "those that the tokenizers library runs, as T5's is"
        )
    return tokenizer


def _with_lower_and_strip(backend: Tokenizer) -> Tokenizer:
    """Return a copy that lowers and strips first, so that special tokens are sought in what is left."""
    data = json.loads(backend.to_str())
    own = [] if data["normalizer"] is None else [data["normalizer"]]
    data["normalizer"] = {"type": "Sequence", "normalizers": [*LOWER_AND_STRIP, *own]}
    normalizer = Tokenizer.from_str(json.dumps(data)).normalizer

    def is_found(token: dict[str, Any]) -> bool:
        """Tell capital letters, which a lowered prompt never holds: once lowered too, they would be found."""
        text: str = token["content"]
        sought = backend.normalizer.normalize_str(text) if token["normalized"] and own else text
        return bool(normalizer.normalize_str(text) == sought)

    data["added_tokens"] = [token | {"normalized": True} for token in data["added_tokens"] if is_found(token)]
    return Tokenizer.from_str(json.dumps(data))


def _check(made: Tokenizer, tokenizer: Any, num_tokens: int, folder: Path) -> None:
    """See that a tokenizer reads some prompts as transformers does once diffusers has lowered and stripped them."""
    special = list(tokenizer.added_tokens_encoder)
    probes = (*PROBES, *(f"A {text} b" for token in special for text in (token, token.upper())))
    processed = [text.lower().strip() for text in probes]
    expected = tokenizer(processed, padding="max_length", max_length=num_tokens, truncation=True)
    for i, text in enumerate(probes):
        encoding = made.encode(text)
        if (encoding.ids, encoding.attention_mask) != (expected["input_ids"][i], expected["attention_mask"][i]):
            raise ExportError(
                f"the tokenizer in {folder}, a {type(tokenizer).__name__}, cannot be written as a file that reads "
                f"{text[:40]!r} as transformers does. T5's can; please report the model"
            )
