from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from hemiola_runtime.errors import BundleError, NumericError, RequestError
from hemiola_runtime.text import Embedded, PromptCache, Truncation

NUM_TOKENS: Final = 6
WIDTH: Final = 3
PROMPT_BYTES: Final = 4 * NUM_TOKENS * WIDTH  # of one embedding


def tokenizer(num_tokens: int = NUM_TOKENS) -> Tokenizer:
    """Make a tokenizer of words that ends a prompt with `</s>`, 1, and fills it up with `<pad>`, 0."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "sits", "on", "mat"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(num_tokens)
    made.enable_padding(length=num_tokens, pad_id=0, pad_token="<pad>")
    return made


class FakeEncoder:
    """Writes (ids, mask, position) for every token, over and over into the same array, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.error: Exception | None = None
        self.written: NDArray[np.float32] = np.empty((1, NUM_TOKENS, WIDTH), dtype=np.float32)
        self._busy = threading.Lock()

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.float32]) -> NDArray[np.float32]:
        assert self._busy.acquire(blocking=False), "two prompts at a time"
        try:
            assert ids.dtype == np.int64
            assert mask.dtype == np.float32
            assert ids.shape == mask.shape == (1, NUM_TOKENS)
            self.given.append(ids[0].tolist())
            if self.error is not None:
                raise self.error
            self.written[0] = expected(ids[0], mask[0])
            time.sleep(0.001)
            ids[:], mask[:] = -1, -1  # which is nobody's business
            return self.written
        finally:
            self._busy.release()


def expected(ids: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float32]:
    return np.stack([ids, mask, np.arange(NUM_TOKENS)], axis=-1).astype(np.float32)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


Make = Callable[..., PromptCache]


@pytest.fixture
def make(encoder: FakeEncoder) -> Make:
    def make(num_prompts: int = 8) -> PromptCache:
        return PromptCache(tokenizer().to_str().encode(), encoder, num_prompts * PROMPT_BYTES)

    return make


@pytest.fixture
def cache(make: Make) -> PromptCache:
    return make()


def ids_of(embedded: Embedded) -> list[list[int]]:
    return [[int(number) for number in row] for row in embedded.embeddings[..., 0]]


def test_prompts_become_embeddings_and_a_mask_in_their_order(cache: PromptCache) -> None:
    embedded = cache.embed(["a cat", "Mat"])
    assert embedded.embeddings.shape == (2, NUM_TOKENS, WIDTH)
    assert embedded.mask.shape == (2, NUM_TOKENS)
    assert embedded.embeddings.dtype == embedded.mask.dtype == np.float32
    assert embedded.mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert np.array_equal(embedded.embeddings[0], expected(np.array([3, 4, 1, 0, 0, 0]), embedded.mask[0]))
    assert np.array_equal(embedded.embeddings[1], expected(np.array([7, 1, 0, 0, 0, 0]), embedded.mask[1]))
    assert (embedded.num_encoded, embedded.num_kept, embedded.truncations) == (2, 0, ())
    assert cache.num_tokens == NUM_TOKENS


def test_words_that_the_tokenizer_does_not_know_are_told_as_they_were_written(cache: PromptCache) -> None:
    embedded = cache.embed(["a Pink cat, pink", "a cat", "on a fox"])
    assert embedded.unknown == (("Pink", ",", "pink"), (), ("fox",))
    assert cache.embed(["a fox"]).unknown == (("fox",),)
    assert cache.embed(["fox a"]).unknown == cache.embed(["fox a"]).unknown == (("fox",),)  # kept, too


def test_signs_without_a_piece_are_told(encoder: FakeEncoder) -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁cat", -1.0), ("a", -3.0)]
    pieces = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.enable_truncation(NUM_TOKENS)
    pieces.enable_padding(length=NUM_TOKENS, pad_id=1, pad_token="</s>")
    cache = PromptCache(pieces.to_str().encode(), encoder)
    assert cache.embed(["cat a", "cat 猫 a"]).unknown == ((), ("猫",))


def test_a_tokenizer_without_a_token_for_the_unknown_knows_everything_it_reads(encoder: FakeEncoder) -> None:
    described = json.loads(tokenizer().to_str())
    described["model"]["unk_token"] = "none of its words"
    assert PromptCache(json.dumps(described).encode(), encoder).embed(["a cat"]).unknown == ((),)


def test_a_prompt_is_encoded_once_and_found_again(cache: PromptCache, encoder: FakeEncoder) -> None:
    first = cache.embed(["a cat", "a mat", "a cat"])
    assert (first.num_encoded, first.num_kept) == (2, 1)
    again = cache.embed(["a mat", "a cat"])
    assert (again.num_encoded, again.num_kept) == (0, 2)
    assert np.array_equal(again.embeddings, first.embeddings[[1, 0]])
    assert np.array_equal(again.mask, first.mask[[1, 0]])
    assert len(encoder.given) == cache.num_prompts == 2


def test_prompts_that_the_tokenizer_reads_alike_are_one(cache: PromptCache, encoder: FakeEncoder) -> None:
    assert cache.embed(["a cat", "A  CAT ", "a Cat"]).num_encoded == 1
    assert len(encoder.given) == 1


def test_padding_that_was_typed_is_another_prompt() -> None:
    made = tokenizer()
    made.add_special_tokens(["<pad>"])
    made.post_processor = processors.Sequence([])  # without an end token the ids are the same, but not the mask
    cache = PromptCache(made.to_str().encode(), FakeEncoder())
    embedded = cache.embed(["a", "a <pad> <pad>"])
    assert ids_of(embedded) == [[3, 0, 0, 0, 0, 0]] * 2
    assert embedded.num_encoded == 2
    assert embedded.mask.sum(axis=1).tolist() == [1, 3]


def test_an_empty_prompt_is_a_prompt(cache: PromptCache) -> None:
    embedded = cache.embed([""])
    assert ids_of(embedded) == [[1, 0, 0, 0, 0, 0]]
    assert embedded.mask.tolist() == [[1, 0, 0, 0, 0, 0]]


def test_what_was_not_asked_for_the_longest_goes_first(make: Make, encoder: FakeEncoder) -> None:
    cache = make(2)
    cache.embed(["cat", "mat"])
    cache.embed(["cat"])  # now mat is the older one
    cache.embed(["on"])
    assert cache.num_prompts == 2
    assert cache.embed(["cat", "on"]).num_encoded == 0
    assert cache.embed(["mat"]).num_encoded == 1
    assert len(encoder.given) == 4


@pytest.mark.parametrize("num_prompts", [0, 1])
def test_a_request_of_more_prompts_than_are_kept_is_right_and_encodes_each_once(make: Make, num_prompts: int) -> None:
    cache = make(num_prompts)
    prompts = ["cat", "mat", "cat", "on", "mat"]
    embedded = cache.embed(prompts)
    assert [ids[0] for ids in ids_of(embedded)] == [4, 7, 4, 6, 7]
    assert embedded.num_encoded == 3
    assert cache.num_prompts == num_prompts


def test_nothing_that_is_handed_out_or_taken_in_is_what_is_kept(cache: PromptCache, encoder: FakeEncoder) -> None:
    first = cache.embed(["cat"])
    before = first.embeddings.copy(), first.mask.copy()
    first.embeddings[:] = 7
    first.mask[:] = 7
    encoder.written[:] = 9
    again = cache.embed(["cat"])
    assert again.num_encoded == 0
    assert np.array_equal(again.embeddings, before[0])
    assert np.array_equal(again.mask, before[1])


def test_an_encoder_that_fails_leaves_nothing_behind(cache: PromptCache, encoder: FakeEncoder) -> None:
    cache.embed(["cat"])
    encoder.error = RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        cache.embed(["cat", "mat"])
    assert cache.num_prompts == 1
    encoder.error = None
    assert cache.embed(["cat", "mat"]).num_encoded == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused_and_not_kept(value: float) -> None:
    written = np.zeros((1, NUM_TOKENS, WIDTH), dtype=np.float32)
    cache = PromptCache(tokenizer().to_str().encode(), lambda ids, mask: written)
    written[0, 5, 2] = value
    with pytest.raises(NumericError, match=r"NaN or infinity for the prompt 'a cat'\. A bundle in bf16 or fp32"):
        cache.embed(["a cat"])
    written[0, 5, 2] = 0
    assert cache.embed(["a cat"]).num_encoded == 1


@pytest.mark.parametrize("num_words", [1, 4, 5, 6, 7, 10, 11, 12, 40])
def test_a_prompt_that_is_too_long_is_cut_and_told(cache: PromptCache, num_words: int) -> None:
    embedded = cache.embed(["cat", "cat " * num_words])
    assert embedded.mask[1].sum() == min(num_words + 1, NUM_TOKENS)  # </s> is the last that is left
    assert embedded.truncations == ((Truncation(1, num_words + 1),) if num_words > 5 else ())


def test_a_prompt_is_told_to_be_cut_however_often_it_comes(cache: PromptCache) -> None:
    long = "a cat sits on a mat a cat"
    for _ in range(2):
        assert cache.embed([long, "cat", long]).truncations == (Truncation(0, 9), Truncation(2, 9))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", "prompts is a list with one prompt per image, not 'a cat'"),
        (b"a cat", "prompts is a list with one prompt per image, not b'a cat'"),
        (7, "prompts is a list with one prompt per image, not 7"),
        ({"a cat"}, "prompts is a list with one prompt per image, not {'a cat'}"),
        ([], "no prompt was given"),
        (["a cat", None], "a prompt is text, not None"),
        (["a cat", b"mat"], "a prompt is text, not b'mat'"),
        ([["a", "cat"]], r"a prompt is text, not \['a', 'cat'\]"),
        (["a \ud83d cat"], r"the prompt 'a \\ud83d cat' is no text that can be read: at 2 it has '\\ud83d'"),
        ([["x" * 1000]], r"a prompt is text, not \['x{58}…$"),
    ],
)
def test_what_is_no_prompt_is_refused(cache: PromptCache, encoder: FakeEncoder, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        cache.embed(prompts)
    str(caught.value).encode()  # a message can be printed
    assert encoder.given == []


def test_many_threads_get_what_one_would(make: Make, encoder: FakeEncoder) -> None:
    words = ["a", "cat", "sits", "on", "mat"]
    numbers = {word: i + 3 for i, word in enumerate(words)}
    cache = make()

    def ask(seed: int) -> int:
        chosen = [str(word) for word in np.random.default_rng(seed).choice(words, size=3)]
        embedded = cache.embed(chosen)
        assert [ids[0] for ids in ids_of(embedded)] == [numbers[word] for word in chosen]
        return embedded.num_encoded

    with ThreadPoolExecutor(8) as pool:
        num_encoded = sum(pool.map(ask, range(64)))
    assert num_encoded == len(encoder.given) == cache.num_prompts == len(words)


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BundleError, match=r"tokenizers cannot be imported.*pip install 'hemiola\[text\]'"):
        make()


def test_the_library_is_imported_when_a_tokenizer_is_opened() -> None:
    code = "import sys, hemiola_runtime.text; print('tokenizers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def changed(**parts: Any) -> bytes:
    return json.dumps(json.loads(tokenizer().to_str()) | parts).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot read the bundle's tokenizer: .*EOF"),
        (b"\xff\xfe", "cannot read the bundle's tokenizer"),
        (b"{}", "cannot read the bundle's tokenizer: .*Model missing.*Build the bundle again"),
        (changed(model={"type": "WordLevel"}), "cannot read the bundle's tokenizer: .*missing field"),
        (changed(version="9.0"), "or install the release of tokenizers that it was exported with"),
        (changed(truncation=None), "cuts prompts to None tokens and fills them up to 6"),
        (changed(padding=None), "cuts prompts to 6 tokens and fills them up to None"),
        (tokenizer(7).to_str().replace('"Fixed":7', '"Fixed":8').encode(), "to 7 tokens and fills them up to 8"),
    ],
)
def test_a_damaged_tokenizer_is_refused(encoder: FakeEncoder, data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        PromptCache(data, encoder)
