"""What schedules cost: milliseconds where forwards were measured, and FLOPs where no engine exists yet.

One multiply-add counts as two. It is the convention of the papers' tables: on DiT-XL/2 it gives 237.2 GFLOP for one row
of one forward, where the counters behind those tables give 237.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from hemiola_runtime.cost_table import CostTable
from hemiola_runtime.graphs import CONDITIONING, VAE_DECODER
from hemiola_runtime.schedule import COMPUTED, FULL, REUSE, Forward, Step
from hemiola_search.errors import SearchError


class Costs(ABC):
    """What steps cost, for one image.

    Attributes:
        unit: `ms` or `GFLOP`.
    """

    unit: str

    @abstractmethod
    def step(self, step: Step, deep_start: int | None, mask: tuple[str, ...] | None) -> float:
        """Return the cost of one step."""

    def around(self, num_steps: int) -> float:
        """Return the cost of what is neither step nor prompt: conditioning and decoder."""
        return 0.0

    def schedule(
        self, steps: Sequence[Step], deep_start: int | None = None, mask: tuple[str, ...] | None = None
    ) -> float:
        """Return the cost of a whole schedule."""
        return self.around(len(steps)) + sum(self.step(step, deep_start, mask) for step in steps)


@dataclass(frozen=True, slots=True)
class FlopsModel(Costs):
    """FLOPs of a transformer's forwards.

    Attributes:
        width: D.
        num_tokens: N.
        num_blocks: L.
        rows_per_image: 2 under classifier-free guidance.
        num_text_tokens: S, for blocks with cross-attention and modulation that they share (PixArt); None for blocks
            that make their own modulation from each image's label (DiT). Keys and values of prompts and PixArt's
            modulation are computed once per request and not counted.
    """

    unit = "GFLOP"

    width: int
    num_tokens: int
    num_blocks: int
    rows_per_image: int
    num_text_tokens: int | None = None

    def step(self, step: Step, deep_start: int | None, mask: tuple[str, ...] | None) -> float:
        """Return GFLOP of one step for one image, DiT's adaLN included. Forecasts and sums of caches count nothing."""
        return self.rows_per_image * (self._modulation() + self._computed(step, deep_start, mask)) / 1e9

    def _computed(self, step: Step, deep_start: int | None, mask: tuple[str, ...] | None) -> int:
        num_deep = 0 if deep_start is None else self.num_blocks - deep_start
        of_branch = [self._attention(), *self._by_token(self.num_tokens)]
        if step.forward is Forward.FULL:
            return self.num_blocks * sum(of_branch)
        if step.forward is Forward.DEEP:
            return num_deep * sum(of_branch)
        if step.forward is Forward.MASKED:
            assert mask is not None, "`masked` needs a mask"
            return sum(cost * blocks.count(COMPUTED) for cost, blocks in zip(of_branch, mask, strict=True))
        if step.forward is Forward.TOKENS:
            if isinstance(step.tokens, int):
                return num_deep * sum(self._by_token(step.tokens))
            counts = step.tokens or ()
            return sum(self._by_token(count)[i] for i, blocks in enumerate(counts) for count in blocks)
        return 0

    def _modulation(self) -> int:
        return self.num_blocks * 12 * self.width**2 if self.num_text_tokens is None else 0

    def _attention(self) -> int:
        return 8 * self.num_tokens * self.width**2 + 4 * self.num_tokens**2 * self.width

    def _by_token(self, num_tokens: int) -> list[int]:
        """Cross-attention without keys and values, if there is one, and MLP, of some tokens."""
        mlp = 16 * num_tokens * self.width**2
        if self.num_text_tokens is None:
            return [mlp]
        return [4 * num_tokens * self.width**2 + 4 * num_tokens * self.num_text_tokens * self.width, mlp]


class MeasuredCosts(Costs):
    """Milliseconds as they were measured; of what was not measured, the measured `full` scaled by FLOPs.

    A schedule is priced by the table of a bundle with its own deep blocks, since what `full` costs depends on what it
    has to leave for `deep` and `tokens`.

    Attributes:
        estimated: kinds of steps that were priced and had not been measured.
        source: what was measured, in words.
    """

    unit = "ms"

    def __init__(self, tables: Sequence[CostTable], flops: FlopsModel, batch_size: int) -> None:
        """Set up.

        Args:
            tables: of bundles of one model on one machine; the first prices what no other is made for.
            flops: of the model.
            batch_size: of the measurements that count.

        Raises:
            SearchError: nothing was measured for the batch size, or not all by the same backend on one machine.
        """
        sources = list(dict.fromkeys(map(_source, tables)))
        if len(sources) > 1:
            raise SearchError(
                f"costs were measured by {' and by '.join(sources)}, and cannot be compared. Name what was measured in "
                "one place with --costs: a bundle, or one of the files in its folder `costs`"
            )
        for table in tables:
            if batch_size not in table.batch_sizes:
                raise SearchError(
                    f"costs were measured at batch {', '.join(map(str, table.batch_sizes))}, not at {batch_size}. "
                    f"Measure again with `hemiola measure BUNDLE --batch-size {batch_size}`"
                )
        self._tables = list(tables)
        self._flops = flops
        self._batch_size = batch_size
        self.estimated: set[str] = set()
        self.source = f"{sources[0]}, batch {batch_size}"

    def step(self, step: Step, deep_start: int | None, mask: tuple[str, ...] | None) -> float:
        mine = max(  # the first among the most alike
            self._tables, key=lambda table: (mask is not None and table.mask == mask, table.deep_start == deep_start)
        )
        is_of_blocks = step.forward in (Forward.DEEP, Forward.TOKENS, Forward.MASKED)
        is_known = {Forward.MASKED: mine.mask == mask}.get(step.forward, mine.deep_start == deep_start)
        found = mine.step_ms(step, self._batch_size) if is_known or not is_of_blocks else None
        if found is None and not is_of_blocks:
            others = (table.step_ms(step, self._batch_size) for table in self._tables)
            found = next((value for value in others if value is not None), None)
        if found is None:
            self.estimated.add(step.kind)
            return self._estimate(step, deep_start, mask)
        return found / self._batch_size

    def _estimate(self, step: Step, deep_start: int | None, mask: tuple[str, ...] | None) -> float:
        """Add to what reading the cache costs a share of `full`, by FLOPs."""
        full = self._known("full")
        cached = Forward.RESIDUAL if step.forward is Forward.RESIDUAL else Forward.REUSE
        orders = [step.forecast[:length] for length in range(len(step.forecast), 1, -1)]  # its own, or the next lower
        kinds = [*(Step(cached, None, forecast).kind for forecast in orders), REUSE.kind]
        floor = next((known for kind in kinds if (known := self._known(kind)) is not None), 0.0)
        assert full is not None, "every table holds `full`"
        least, most = (self._flops.step(s, deep_start, mask) for s in (REUSE, FULL))
        share = (self._flops.step(step, deep_start, mask) - least) / (most - least)
        return floor + share * (full - floor)

    def _known(self, kind: str) -> float | None:
        found = (table.milliseconds(kind, 0, self._batch_size) for table in self._tables)
        first = next((value for value in found if value is not None), None)
        return None if first is None else first / self._batch_size

    def around(self, num_steps: int) -> float:
        conditioning = (self._known(CONDITIONING) or 0.0) * num_steps / self._tables[0].num_steps
        return conditioning + (self._known(VAE_DECODER) or 0.0)


def _source(table: CostTable) -> str:
    return f"{table.backend.name} {table.backend.version}, {table.precision}, {table.where}"
