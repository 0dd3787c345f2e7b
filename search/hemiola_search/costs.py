"""What a schedule costs: the FLOPs model, for as long as no engine has been measured.

One multiply-add counts as two. It is the convention of the papers' tables: on DiT-XL/2 it gives 237.2 GFLOP for one row
of one forward, where the counters behind those tables give 237.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hemiola_runtime.schedule import Forward, Step


@dataclass(frozen=True, slots=True)
class FlopsModel:
    """FLOPs of a transformer's forwards.

    Attributes:
        width: D.
        num_tokens: N.
        num_blocks: L.
        deep_start: first deep block, None if there is none.
        rows_per_image: 2 under classifier-free guidance.
        num_text_tokens: S, for blocks with cross-attention and modulation that they share (PixArt); None for blocks
            that make their own modulation from each image's label (DiT). Keys and values of prompts and PixArt's
            modulation are computed once per request and not counted.
    """

    width: int
    num_tokens: int
    num_blocks: int
    deep_start: int | None
    rows_per_image: int
    num_text_tokens: int | None = None

    def step(self, step: Step) -> int:
        """FLOPs of one step for one image, DiT's adaLN included."""
        deep = 0 if self.deep_start is None else self.num_blocks - self.deep_start
        modulation = self.num_blocks * 12 * self.width**2 if self.num_text_tokens is None else 0
        whole = self._attention() + self._by_token(self.num_tokens)
        computed = {
            Forward.FULL: self.num_blocks * whole,
            Forward.DEEP: deep * whole,
            Forward.TOKENS: deep * self._by_token(step.tokens or 0),
            Forward.REUSE: 0,
        }
        return self.rows_per_image * (modulation + computed[step.forward])

    def schedule(self, steps: Iterable[Step]) -> int:
        """FLOPs of a whole schedule for one image."""
        return sum(self.step(step) for step in steps)

    def _attention(self) -> int:
        return 8 * self.num_tokens * self.width**2 + 4 * self.num_tokens**2 * self.width

    def _by_token(self, num_tokens: int) -> int:
        """MLP, and cross-attention without keys and values, of some tokens."""
        mlp = 16 * num_tokens * self.width**2
        if self.num_text_tokens is None:
            return mlp
        return mlp + 4 * num_tokens * self.width**2 + 4 * num_tokens * self.num_text_tokens * self.width
