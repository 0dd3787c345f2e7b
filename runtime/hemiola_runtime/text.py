"""Prompts as what the steps read of them: a text encoder's embeddings, kept for the next request that has the prompt.

It knows no engine: whoever opens a bundle hands in the function that runs the encoder.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.errors import BundleError, NumericError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# From token ids (1, S) and mask (1, S), 1 for a token and 0 for padding, to embeddings (1, S, D).
Encode = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]

CAPACITY_BYTES: Final = 128 << 20  # 242 prompts of PixArt-α, 97 of PixArt-Σ
SHOWN: Final = 60  # characters of a prompt in a message
MAX_CHARACTERS: Final = 1 << 16  # of a prompt: encoders read some hundred tokens of it, tokenizers all of it


@dataclass(frozen=True, slots=True)
class Truncation:
    """A prompt whose end was not read, because the encoder takes S tokens.

    Attributes:
        index: of the prompt, in the order in which they were given.
        num_tokens: that the prompt has, those that end it included.
    """

    index: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """What a text encoder makes of n prompts.

    Attributes:
        embeddings: (n, S, D) float32; those of padding mean nothing.
        mask: (n, S) float32, 1 for a token and 0 for padding.
        num_encoded: how often the encoder ran; all other prompts were kept from earlier, or given twice.
        truncations: of the prompts that were too long.
        unknown: of each prompt, what the tokenizer has no token for.
    """

    embeddings: NDArray[np.float32]
    mask: NDArray[np.float32]
    num_encoded: int
    truncations: tuple[Truncation, ...]
    unknown: tuple[tuple[str, ...], ...]

    @property
    def num_kept(self) -> int:
        """Prompts for which the encoder did not run."""
        return len(self.mask) - self.num_encoded


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """One prompt: ids (S,) int64, mask (S,) float32, the tokens before it was cut, and what has none."""

    ids: NDArray[np.int64]
    mask: NDArray[np.float32]
    num_tokens: int
    unknown: tuple[str, ...]

    @property
    def key(self) -> bytes:
        """What the encoder reads, and so all that its result depends on."""
        return self.ids.tobytes() + self.mask.tobytes()


class PromptCache:
    """A tokenizer, and the embeddings of the prompts that were asked for last.

    Many threads may share it. Prompts are encoded one at a time, so that a prompt's embedding is the same, bit for bit,
    whatever else a request asks for. Prompts that the tokenizer reads alike, as `A cat` and `a cat `, are one.

    Attributes:
        num_tokens: S.
    """

    def __init__(self, tokenizer_json: bytes, encode: Encode, capacity_bytes: int = CAPACITY_BYTES) -> None:
        """Open the tokenizer.

        Args:
            tokenizer_json: of a `tokenizers.Tokenizer` that truncates and pads every prompt to S tokens.
            encode: runs the text encoder; called by one thread at a time. What it returns is copied.
            capacity_bytes: of embeddings that are kept; the one that was not asked for the longest goes first.

        Raises:
            BundleError: the tokenizers library is missing, or this is no such tokenizer.
        """
        self._tokenizer, self.num_tokens = _opened(tokenizer_json)
        self._unknown_id = _unknown_id(json.loads(tokenizer_json)["model"])
        self._encode = encode
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()  # the last was asked for last
        self._lock = threading.Lock()

    @property
    def num_prompts(self) -> int:
        """How many prompts are kept."""
        return len(self._kept)

    def embed(self, prompts: Sequence[str]) -> Embedded:
        """Return the embeddings of some prompts, as arrays of the caller's own.

        Raises:
            RequestError: there is no prompt, or one of them is no text.
            NumericError: the encoder wrote NaN or infinity.
        """
        tokens = [self._tokens(prompt) for prompt in check_prompts(prompts)]
        found: dict[bytes, NDArray[np.float32]] = {}  # of its own: a prompt may be dropped before the last is encoded
        num_encoded = 0
        for each, prompt in zip(tokens, prompts, strict=True):
            if each.key not in found:
                found[each.key], is_new = self._embedding(each, prompt)
                num_encoded += is_new
        return Embedded(
            embeddings=np.stack([found[each.key] for each in tokens]),
            mask=np.stack([each.mask for each in tokens]),
            num_encoded=num_encoded,
            truncations=tuple(
                Truncation(i, each.num_tokens) for i, each in enumerate(tokens) if each.num_tokens > self.num_tokens
            ),
            unknown=tuple(each.unknown for each in tokens),
        )

    def _tokens(self, prompt: str) -> _Tokens:
        encoding = self._tokenizer.encode(prompt)
        num_special = self._tokenizer.num_special_tokens_to_add(False)
        # What was cut off is handed out in parts, each with the special tokens of a whole prompt.
        num_cut = sum(sum(part.attention_mask) - num_special for part in encoding.overflowing)
        ids, mask = np.array(encoding.ids, dtype=np.int64), np.array(encoding.attention_mask, dtype=np.float32)
        pieces = zip(encoding.ids, encoding.offsets, strict=True)
        unknown = dict.fromkeys(prompt[start:stop].strip() for id_, (start, stop) in pieces if id_ == self._unknown_id)
        return _Tokens(ids, mask, sum(encoding.attention_mask) + num_cut, tuple(unknown))

    def _embedding(self, tokens: _Tokens, prompt: str) -> tuple[NDArray[np.float32], bool]:
        """Return the embedding (S, D) of one prompt, not to be changed, and whether it was encoded just now."""
        with self._lock:
            kept = self._kept.get(tokens.key)
            is_new = kept is None
            if kept is None:
                kept = self._encoded(tokens, prompt)
                self._kept[tokens.key] = kept
            self._kept.move_to_end(tokens.key)
            while len(self._kept) * kept.nbytes > self._capacity_bytes:  # all have one size
                self._kept.popitem(last=False)
            return kept, is_new

    def _encoded(self, tokens: _Tokens, prompt: str) -> NDArray[np.float32]:
        written = self._encode(tokens.ids[None].copy(), tokens.mask[None].copy())
        assert written.shape[:2] == (1, self.num_tokens), f"the text encoder wrote {written.shape}"
        embedding = np.array(written[0], dtype=np.float32)
        if not np.isfinite(embedding).all():
            raise NumericError(
                f"the text encoder wrote NaN or infinity for the prompt {_shown(prompt)}. A bundle in bf16 or fp32 has "
                "more room than one in fp16"
            )
        return embedding


def check_tokenizer(tokenizer_json: bytes, num_tokens: int) -> None:
    """Make sure that a tokenizer can be opened, and fills prompts up to `num_tokens` tokens.

    Raises:
        BundleError: the tokenizers library is missing, or this is no such tokenizer.
    """
    _, found = _opened(tokenizer_json)
    if found != num_tokens:
        raise BundleError(
            f"the bundle's tokenizer makes {found} tokens of a prompt, but its text encoder reads {num_tokens}. Export "
            "the model and build the bundle again"
        )


def _opened(data: bytes) -> tuple[Tokenizer, int]:
    """Return the tokenizer and S."""
    try:
        import tokenizers  # here, since class-conditional bundles do without
    except ImportError as error:
        raise BundleError(
            f"the bundle draws from prompts, but tokenizers cannot be imported ({error}). Install it with: "
            "pip install 'hemiola[text]'"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        raise BundleError(
            f"tokenizers {tokenizers.__version__} cannot read the bundle's tokenizer: {error}. Build the bundle again, "
            "or install the release of tokenizers that it was exported with"
        ) from error
    longest: Any = (tokenizer.truncation or {}).get("max_length")
    padded: Any = (tokenizer.padding or {}).get("length")
    if longest is None or longest != padded:
        raise BundleError(
            f"the bundle's tokenizer cuts prompts to {longest} tokens and fills them up to {padded}, where both should "
            "be one number. Export the model and build the bundle again"
        )
    return tokenizer, int(longest)


def _unknown_id(model: dict[str, Any]) -> int | None:
    """Return the token that stands for what has none, of a tokenizer's model; None if there is no such token."""
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    vocabulary, unknown = model.get("vocab"), model.get("unk_token")
    return vocabulary.get(unknown) if isinstance(vocabulary, dict) and unknown is not None else None


def check_prompts(prompts: Sequence[str], what: str = "prompts") -> Sequence[str]:
    """Make sure that prompts are a list of text that can be read, and return them; `what` they are, for messages.

    Raises:
        RequestError: they are not.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise RequestError(f"{what} is a list with one prompt per image, not {_shown(prompts)}")
    if len(prompts) == 0:
        raise RequestError("no prompt was given; a request draws one image for each")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise RequestError(f"a prompt is text, not {_shown(prompt)}")
        if len(prompt) > MAX_CHARACTERS:
            raise RequestError(f"a prompt has {MAX_CHARACTERS} characters at most; {_shown(prompt)} has {len(prompt)}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt {_shown(prompt)} is no text that can be read: at {error.start} it has "
                f"{prompt[error.start]!r}, half of a character. Decode it with errors='replace'"
            ) from error
    return prompts


def _shown(value: object) -> str:
    written = repr(value)
    return written if len(written) <= SHOWN else f"{written[:SHOWN]}…"
