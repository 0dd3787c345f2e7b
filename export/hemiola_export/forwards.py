"""The forwards, written once over the seams of a family: what search runs in PyTorch is what export turns into ONNX.

Every forward is a module from named tensors to named tensors. The names are those of the graph's inputs and outputs;
an output `next_x` is what `x` becomes for the forwards after it. Each ends with the head, guidance and the solver
update, so that one launch takes the state of one model evaluation to that of the next. `Front` alone is no forward but
the first part of one: followed by `Deep` it does what `Full` does, and no block's weights are in both.

Symbols: B images, R rows (2B under guidance, else B), N tokens, P numbers of a patch, D width, L blocks, S deep blocks,
K selected tokens, 1 + k rows of solver state, T model evaluations.
"""

from __future__ import annotations

from typing import Final

from hemiola_export.named_module import Tensors
from hemiola_export.step_forward import INPUT_SCALE, RESIDUAL_CACHE, StepForward, cache_name, computed, next_of
from hemiola_export.token_forward import Tokens
from hemiola_runtime.graphs import TensorSpec
from hemiola_runtime.schedule import COMPUTED, Forward


class Full(StepForward):
    """Every block on every token."""

    def computes(self, block: int, branch: str) -> bool:
        return True

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        branches = self.family.branches if self.config.keeps_layers else ()
        layers = (*self._written("shallow", branches), *self._written("deep", branches))
        return (*layers, *self._residual(), *self._selection())

    def forward(self, tensors: Tensors) -> Tensors:
        begun = self._begin(tensors)
        x, shallow = self._compute(begun, "shallow", tensors)
        x, deep = self._compute(x, "deep", tensors)
        left = shallow | deep | self._residual_of(x, begun, tensors)
        return self._finish(x, tensors) | {f"next_{spec.name}": left[f"next_{spec.name}"] for spec in self.writes}


class Deep(StepForward):
    """The deep blocks on every token; the shallow ones from the cache."""

    def computes(self, block: int, branch: str) -> bool:
        return block >= self.deep_start

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        replaced = (*self._written("deep", self.family.branches), *self._residual())
        return (*self._read_caches("shallow"), *self._older(replaced))

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (*self._written("deep", self.family.branches), *self._residual(), *self._selection())

    def forward(self, tensors: Tensors) -> Tensors:
        begun = self._begin(tensors)
        x = self._add_cached(begun, "shallow", tensors)
        x, written = self._compute(x, "deep", tensors)
        return self._finish(x, tensors) | written | self._residual_of(x, begun, tensors)


class Front(StepForward):
    """The shallow blocks on every token, left in the cache; `Deep` goes on from there."""

    def computes(self, block: int, branch: str) -> bool:
        return True

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (self._state, INPUT_SCALE, *self._conditions(self._blocks("shallow")))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(next_of(spec) for spec in self._written("shallow", self.family.branches))

    def forward(self, tensors: Tensors) -> Tensors:
        _, written = self._compute(self._begin(tensors), "shallow", tensors)
        return written


class Reuse(StepForward):
    """Nothing but the gated sum of the caches: x_L = x_0 + Σ_l (g1_l · a_l + c_l + g2_l · m_l), then the head."""

    def computes(self, block: int, branch: str) -> bool:
        return False

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self._read_caches("shallow"), *self._read_caches("deep"))

    def forward(self, tensors: Tensors) -> Tensors:
        x = self._add_cached(self._begin(tensors), "shallow", tensors)
        return self._finish(self._add_cached(x, "deep", tensors), tensors)


class Residual(StepForward):
    """Nothing but a forecast of the residual, what all layers together add to the embedded tokens, then the head.

    One cached tensor in place of one for each layer. Gates are not those of the step, as in `reuse`, but forecast with
    the rest: so it takes forecasts of order 1 or more to be near `reuse`, whose work it undercuts by far.
    """

    def computes(self, block: int, branch: str) -> bool:
        return False

    @property
    def _summed(self) -> range:
        return range(0)

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self._residual(), *self._older(self._residual()))

    def forward(self, tensors: Tensors) -> Tensors:
        branch, _, block = RESIDUAL_CACHE.partition("_cache.")
        return self._finish(self._begin(tensors) + self._cached(branch, block, tensors), tensors)


class Masked(StepForward):
    """Those branches of those blocks that the mask names, on every token; the rest from the cache.

    What a router of Learning-to-Cache (arXiv:2406.01733) chooses, as one mask for all steps. It takes no scores and
    leaves staleness as it is: `tokens` ranks by what `full` and `deep` left.
    """

    def computes(self, block: int, branch: str) -> bool:
        assert self.config.mask is not None, "`masked` needs a mask"
        return self.config.mask[self.family.branches.index(branch)][block] == COMPUTED

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        specs = (*self._read_caches("shallow"), *self._read_caches("deep"), *self._older(self._residual()))
        fresh = {spec.name for spec in self.writes}
        return tuple(spec for spec in specs if spec.name not in fresh)

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        branches = self.family.branches
        specs = (*self._written("shallow", branches), *self._written("deep", branches))
        fresh = {cache_name(branch, i) for branch in branches for i in self._all if self.computes(i, branch)}
        return (*(spec for spec in specs if spec.name in fresh), *self._residual())

    def forward(self, tensors: Tensors) -> Tensors:
        x = begun = self._begin(tensors)
        written: Tensors = {}
        for index in self._all:
            block, read = self.family.block(index), self._read(index, tensors)
            for branch in block.branches:
                if self.computes(index, branch):
                    out, name = computed(block, branch, x, read), cache_name(branch, index)
                    written[f"next_{name}"] = self._replacing(name, out, tensors)
                else:
                    out = self._cached(branch, index, tensors)
                x = x + block.gated(branch, out, read)
        return self._finish(x, tensors) | written | self._residual_of(x, begun, tensors)


FORWARDS: Final[dict[Forward, type[StepForward]]] = {
    Forward.FULL: Full,
    Forward.DEEP: Deep,
    Forward.MASKED: Masked,
    Forward.TOKENS: Tokens,
    Forward.REUSE: Reuse,
    Forward.RESIDUAL: Residual,
}
