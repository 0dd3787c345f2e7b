from __future__ import annotations

import io
import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import sentencepiece
import torch
from diffusers import PixArtAlphaPipeline
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from hemiola_export.errors import ExportError
from hemiola_export.tokenizer import LOWER_AND_STRIP, PromptTokenizer, read_tokenizer
from strategies import examples

NUM_TOKENS: Final = 16
SENTENCES: Final = (
    "a small cat sits on a mat",
    "the quick brown fox jumps over the lazy dog",
    "an astronaut riding a horse on mars, photo realistic",
    "ocean waves under a red sunset",
    "ο οδυσσευς και η θαλασσα",
)
# What a prompt may be made of that is easy to read in more than one way.
PIECES: Final = (
    *("a", "CAT", "cat", "Sits", "on", " ", "  ", "\n", "\t", "\x1c", "\xa0", "\u2003", ",", ".", "'", "-"),
    *("</s>", "</S>", "<pad>", "<PAD>", "<unk>", "<extra_id_0>", "<Extra_Id_0>", "[FOO]", "[foo]", "[BAR]", "[bar]"),
    *("ΟΔΥΣΣΕΥΣ", "Σ", "σ", "ς", "Α", "ʰ", "\u0301", "\xad", "É", "İ", "ẞ", "Ⅷ", "ﬁ", "２", "½", "猫", "🐈", "\u200d"),
)

Folder = Path


def save_unigram(folder: Path) -> Folder:
    """Write what the `tokenizer/` of PixArt's folders holds: T5's sentencepiece model and a configuration."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=written,
        model_type="unigram",
        vocab_size=100,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "spiece.model").write_bytes(written.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def save_words(folder: Path, **options: Any) -> Folder:
    """Write a tokenizer of whole words, with special tokens of capital letters."""
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "sits", "on", "foo", "οδυσσευς", "οδυσσευσ", "[FOO]"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    defaults = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["[FOO]"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(defaults | options))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"unigram": save_unigram(folder / "unigram"), "words": save_words(folder / "words")}


@pytest.fixture(scope="module")
def read(folders: dict[str, Folder]) -> dict[str, PromptTokenizer]:
    return {name: read_tokenizer(folder, NUM_TOKENS) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def originals(folders: dict[str, Folder]) -> dict[str, Any]:
    """The tokenizers as diffusers opens them: by the class that model_index.json names."""
    return {
        "unigram": T5Tokenizer.from_pretrained(folders["unigram"]),
        "words": PreTrainedTokenizerFast.from_pretrained(folders["words"]),
    }


def by_the_pipeline(tokenizer: Any, prompt: str, num_tokens: int) -> tuple[list[int], list[int]]:
    """Return the ids and the mask with which PixArtAlphaPipeline runs its text encoder."""
    given: list[torch.Tensor] = []

    def text_encoder(ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        given.extend((ids, attention_mask))
        return (torch.zeros(*ids.shape, 1),)

    text_encoder.dtype = torch.float32  # type: ignore[attr-defined]
    pipeline = SimpleNamespace(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        _text_preprocessing=partial(PixArtAlphaPipeline._text_preprocessing, None),
    )
    PixArtAlphaPipeline.encode_prompt(
        pipeline, prompt, do_classifier_free_guidance=False, device="cpu", max_sequence_length=num_tokens
    )
    ids, mask = given
    return ids[0].tolist(), mask[0].tolist()


def by_the_file(read: PromptTokenizer, prompt: str) -> tuple[list[int], list[int]]:
    encoding = Tokenizer.from_buffer(read.json).encode(prompt)
    return encoding.ids, encoding.attention_mask


def prompts() -> st.SearchStrategy[str]:
    """Draw prompts of awkward pieces and of all that Unicode has."""
    known = st.characters(exclude_categories=["Cs", "Cn"])  # to Python: newer letters have no lower case there
    return st.lists(st.sampled_from(PIECES) | known, max_size=12).map("".join)


@pytest.mark.parametrize("name", ["unigram", "words"])
@examples(400)
@given(prompt=prompts())
@example("")
@example("  A small CAT,\n sits on its mat \x1c")
@example("a cat sits on " * 30)
@example("a </s> cat <PAD> sits [FOO] [foo]")
@example("ΟΔΥΣΣΕΥΣ")
def test_ids_and_mask_are_those_of_the_pipeline(
    read: dict[str, PromptTokenizer], originals: dict[str, Any], name: str, prompt: str
) -> None:
    ids, mask = by_the_file(read[name], prompt)
    assert (ids, mask) == by_the_pipeline(originals[name], prompt, NUM_TOKENS)
    assert len(ids) == len(mask) == NUM_TOKENS


def lowered_and_stripped(text: str) -> str:
    """Apply what stands in front of a model's own normalizer."""
    data = json.loads(Tokenizer(models.WordLevel({}, unk_token="")).to_str())
    data["normalizer"] = {"type": "Sequence", "normalizers": LOWER_AND_STRIP}
    return str(Tokenizer.from_str(json.dumps(data)).normalizer.normalize_str(text))


@examples(500)
@given(text=st.text("ΣσςΑʰ'´.\u0301\xadΙ1 \x1c\n\u2029\u200b:·Ⅷ", max_size=10))
@example("Α'''Σ'''")
@example("ʰΣ")
@example("ΑʰΣ")
@example("\u0345Σ")
def test_what_stands_in_front_is_pythons_lower_and_strip(text: str) -> None:
    assert lowered_and_stripped(text) == text.lower().strip()


@pytest.mark.parametrize("text", ["a" + " " * 200_000 + "b", "Α" + "'" * 200_000 + "Β", "Α'" * 100_000])
def test_long_runs_do_not_take_the_square_of_their_length(text: str) -> None:
    started = time.monotonic()
    assert lowered_and_stripped(text) == text.lower()
    assert time.monotonic() - started < 5  # 0.1 s on a slow core; the square takes minutes


def test_words_are_lowered_stripped_ended_and_filled_up(read: dict[str, PromptTokenizer]) -> None:
    ids, mask = by_the_file(read["words"], " A CAT  sits\x1c")
    assert ids == [3, 4, 5, 1] + [0] * 12  # a, cat, sits, </s>, and padding
    assert mask == [1] * 4 + [0] * 12


def test_a_long_prompt_keeps_its_end_token(read: dict[str, PromptTokenizer]) -> None:
    ids, mask = by_the_file(read["words"], "cat " * 50)
    assert ids == [4] * 15 + [1]
    assert mask == [1] * 16


@pytest.mark.parametrize(
    ("asked", "most", "expected"),
    [(None, 512, 120), (None, 77, 77), (300, 512, 300), (300, 77, 300), (None, int(1e30), 120), (2, 512, 2)],
)
def test_the_number_of_tokens_is_that_of_pixart_or_as_asked(
    asked: int | None, most: int, expected: int, tmp_path: Path
) -> None:
    made = read_tokenizer(save_words(tmp_path / "words", model_max_length=most), asked)
    assert made.num_tokens == expected
    assert len(by_the_file(made, "a cat")[0]) == expected


@pytest.mark.parametrize(("name", "number"), [("unigram", None), ("words", 11)])
def test_ids_lie_below_their_number(
    read: dict[str, PromptTokenizer], originals: dict[str, Any], name: str, number: int | None
) -> None:
    assert read[name].num_ids == (number or len(originals[name]))
    assert max(by_the_file(read[name], "<extra_id_0> <unk> [FOO]")[0]) < read[name].num_ids


def test_a_sentencepiece_model_and_its_conversion_give_one_file(
    folders: dict[str, Folder], read: dict[str, PromptTokenizer], originals: dict[str, Any], tmp_path: Path
) -> None:
    originals["unigram"].save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert not (tmp_path / "spiece.model").exists()
    assert read_tokenizer(tmp_path, NUM_TOKENS).json == read["unigram"].json
    assert read_tokenizer(folders["unigram"], NUM_TOKENS).json == read["unigram"].json


def test_padding_and_truncation_stand_where_the_tokenizer_has_them(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "words", padding_side="left", truncation_side="left")
    made, original = read_tokenizer(folder, 4), PreTrainedTokenizerFast.from_pretrained(folder)
    assert by_the_file(made, "cat") == ([0, 0, 4, 1], [0, 0, 1, 1])
    for prompt in ("cat", "a cat sits on a cat"):
        assert by_the_file(made, prompt) == by_the_pipeline(original, prompt, 4)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"neither tokenizer\.json nor spiece\.model is there.*save_pretrained"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_damaged_file_is_refused(folders: dict[str, Folder], name: str, tmp_path: Path) -> None:
    source = folders["unigram" if name == "spiece.model" else "words"]
    for path in source.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if path.name == name else data)
    with pytest.raises(ExportError, match=r"transformers cannot open the tokenizer in .*: \S.*Fetch the folder again"):
        read_tokenizer(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_not_run(folders: dict[str, Folder], tmp_path: Path) -> None:
    for path in folders["words"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ExportError, match="transformers cannot open the tokenizer"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "words", pad_token=None)
    with pytest.raises(ExportError, match=r"no token for padding; name one in its tokenizer_config\.json"):
        read_tokenizer(folder)


@pytest.mark.parametrize("num_tokens", [1, 0, -4])
def test_so_few_tokens_that_no_text_fits_are_refused(folders: dict[str, Folder], num_tokens: int) -> None:
    with pytest.raises(ExportError, match=rf"prompts of {num_tokens} tokens, of which 1 are special.*Ask for 2"):
        read_tokenizer(folders["words"], num_tokens)


def test_a_tokenizer_that_no_file_can_stand_for_is_refused(tmp_path: Path) -> None:
    folder = save_words(tmp_path / "words", split_special_tokens=True)  # which is an option of calls, not of files
    with pytest.raises(ExportError, match=r"cannot be written as a file that reads 'A <pad> b' as transformers does"):
        read_tokenizer(folder)
