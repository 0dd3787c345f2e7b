"""Run a schedule in PyTorch, with the very modules that are exported. Search scores with it; export refers to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from hemiola_export.conditioning import Conditioning, ForwardConfig
from hemiola_export.families import Family
from hemiola_export.forwards import FORWARDS
from hemiola_export.named_module import Tensors
from hemiola_export.patches import from_patches, to_patches
from hemiola_runtime.graphs import STEP_TABLE, slots_name
from hemiola_runtime.pipeline import token_counts
from hemiola_runtime.program import tokens_by_square
from hemiola_runtime.schedule import Forward, Step, TokenSelector, keeps_layers, keeps_residual
from hemiola_runtime.solver_table import SolverTable

TOKENS_AT_ONCE: Final = 32 * 256  # 32 images of 256 × 256 pixels: the caches of DiT-XL/2 then take 4 GB in float32


@dataclass(frozen=True, slots=True)
class Requests:
    """What images are drawn of.

    Attributes:
        conditions: what conditioning reads of each image, by name, B first: `labels`, or embedded prompts.
        noise: (B, C, H, W) float32, standard normal.
        guidance: (B,) float32; of no effect without classifier-free guidance.
    """

    conditions: Mapping[str, Tensor]
    noise: Tensor
    guidance: Tensor

    def __len__(self) -> int:
        """B."""
        return len(self.noise)

    def part(self, start: int, stop: int) -> Requests:
        """Return the requests from `start` to `stop`."""
        conditions = {name: values[start:stop] for name, values in self.conditions.items()}
        return Requests(conditions, self.noise[start:stop], self.guidance[start:stop])

    def to(self, device: str) -> Requests:
        """Return the same on a device."""
        conditions = {name: values.to(device) for name, values in self.conditions.items()}
        return Requests(conditions, self.noise.to(device), self.guidance.to(device))


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How to run one schedule: the model, the sampler and what each step does.

    Attributes:
        family: the model.
        table: the sampler.
        steps: one per model evaluation.
        is_guided: classifier-free guidance.
        deep_start: first deep block, None if no step is `deep` or `tokens`.
        selector: None if no step is `tokens`.
        mask: None if no step is `masked`.
        has_block_counts: whether every deep block has a token count of its own.
        pixels_per_latent: side of the square of pixels that a latent becomes.
        kinds: of steps beside its own, for which full steps leave caches too.
    """

    family: Family
    table: SolverTable
    steps: Sequence[Step]
    is_guided: bool
    deep_start: int | None = None
    selector: TokenSelector | None = None
    mask: tuple[str, ...] | None = None
    has_block_counts: bool = False
    pixels_per_latent: int = 1
    kinds: tuple[str, ...] = ()

    @torch.inference_mode()
    def run(self, requests: Requests, *, batch_size: int | None = None) -> Tensor:
        """Draw the final latents of all requests, (B, C, H, W).

        Args:
            requests: any number.
            batch_size: how many run at once; None for as many as `parts` gives.
        """
        return torch.cat([self._run_batch(part) for part in self.parts(requests, batch_size)])

    def parts(self, requests: Requests, batch_size: int | None = None) -> list[Requests]:
        """Split requests into such as run at once.

        Args:
            requests: any number.
            batch_size: how many that are; None for as many as have TOKENS_AT_ONCE tokens, those in the caches of each
                full step that forecasts look back on counted again.
        """
        if batch_size is None:
            num_tokens = requests.noise[0, 0].numel() // self.family.patch_size**2
            batch_size = max(1, TOKENS_AT_ONCE // (num_tokens * (1 + self._order)))
        return [requests.part(start, start + batch_size) for start in range(0, len(requests), batch_size)]

    @property
    def _order(self) -> int:
        """The highest order of all forecasts."""
        return max(step.order for step in self.steps)

    def _slots(self, step: Step) -> dict[str, int]:
        """Return the lengths of what says to `tokens` how many to choose."""
        deep = range(self.deep_start or 0, len(self.family.blocks))
        counts = token_counts(step, self.family.branches, deep, has_block_counts=self.has_block_counts)
        return {slots_name(symbol): count for symbol, count in counts.items()}

    def _run_batch(self, requests: Requests) -> Tensor:
        patches = None
        for moment in self.walk(requests):
            patches = moment.after["next_state"][0]
        assert patches is not None
        height, width = requests.noise.shape[2:]
        return from_patches(patches, self.family.patch_size, (height, width))

    def walk(self, requests: Requests) -> Iterator[Moment]:
        """Run the schedule on all requests at once, on the device that they and the model are on, step by step."""
        device, family = requests.noise.device, self.family
        height, width = requests.noise.shape[2:]
        grid = (height // family.patch_size, width // family.patch_size)
        num_tokens = grid[0] * grid[1]
        kinds = {*self.kinds, *(step.kind for step in self.steps)}
        config = ForwardConfig(
            self.is_guided,
            self.table.state_rows,
            self.deep_start,
            self.selector,
            num_tokens,
            self.mask,
            self.has_block_counts,
            keeps_layers(kinds),
            keeps_residual(kinds),
        )
        forwards = {step.kind: FORWARDS[step.forward](family, config, step.order) for step in self.steps}
        caches = [spec.name for spec in FORWARDS[Forward.FULL](family, config).writes if "_cache." in spec.name]
        conditioning = Conditioning(family, config)
        given = {
            **requests.conditions,
            "timesteps": torch.tensor(self.table.scheduler.timesteps, dtype=torch.float32, device=device),
            "token_places": token_places(grid, device),
            "picture_size": self.pixels_per_latent * torch.tensor([height, width], dtype=torch.float32, device=device),
        }
        conditioned = conditioning({spec.name: given[spec.name] for spec in conditioning.inputs})
        per_step = {spec.name for spec in conditioning.outputs if spec.shape[0] in ("T", STEP_TABLE)}
        tables = {  # (T, R or 1, 1, D) each
            name: conditioned.pop(name)[:, : family.width].unflatten(0, (len(self.steps), -1)).unsqueeze(2)
            for name in per_step
        }
        coefficients = torch.tensor(self.table.coefficients, dtype=torch.float32, device=device)
        input_scale = torch.tensor(self.table.input_scale, dtype=torch.float32, device=device)
        patches = to_patches(requests.noise * self.table.init_noise_sigma, family.patch_size)
        state = torch.zeros((self.table.state_rows, *patches.shape), device=device)
        state[0] = patches
        tensors: Tensors = {"state": state, "guidance": requests.guidance, **conditioned}
        if self.selector is not None and self.selector.has_squares:
            order = tokens_by_square(grid, self.selector.spatial_size)
            tensors["token_squares"] = torch.tensor(order, device=device)
        for i, step in enumerate(self.steps):
            tensors |= {"coefficients": coefficients[i], "input_scale": input_scale[i]}
            tensors |= {name: table[i] for name, table in tables.items()}
            if step.forward is Forward.TOKENS:
                tensors |= {name: torch.arange(n, device=device) for name, n in self._slots(step).items()}
            if step.order:
                tensors["forecast"] = torch.tensor(step.forecast, device=device)
            if step.forward is Forward.FULL:
                tensors |= _aged(tensors, caches, self._order)
            before = {**tensors}
            written = forwards[step.kind](before)
            tensors |= {name.removeprefix("next_"): tensor for name, tensor in written.items()}
            yield Moment(i, step, before, written)


def _aged(tensors: Tensors, caches: Sequence[str], order: int) -> Tensors:
    """Return the caches one full step older, by the names under which forecasts of some order read them."""
    lines = ([name, *(f"{name}.{age}" for age in range(1, order + 1))] for name in caches)
    return {new: tensors[old] for line in lines for old, new in pairwise(line) if old in tensors}


def token_places(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Return where tokens lie in a grid (rows, columns): (N, 2) float32, row and column as shares of its sides."""
    rows, columns = (torch.arange(side, dtype=torch.float64) / side for side in grid)
    return torch.cartesian_prod(rows, columns).to(device, torch.float32)


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a trajectory.

    Attributes:
        index: of the step.
        step: what it does.
        before: every tensor that the step may read, by the names of its graph's inputs.
        after: what it wrote, by the names of its graph's outputs.
    """

    index: int
    step: Step
    before: Tensors
    after: Tensors
