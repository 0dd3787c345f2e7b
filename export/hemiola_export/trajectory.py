"""Run a schedule in PyTorch, with the very modules that are exported. Search scores with it; export refers to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hemiola_export.families import Family
from hemiola_export.forwards import FORWARDS, Conditioning, ForwardConfig
from hemiola_export.named_module import Tensors
from hemiola_runtime.schedule import Forward, Step, TokenSelector
from hemiola_runtime.solver_table import SolverTable


@dataclass(frozen=True, slots=True)
class Requests:
    """What images are drawn of.

    Attributes:
        labels: (B,) int64.
        noise: (B, C, H, W) float32, standard normal.
        guidance: (B,) float32; of no effect without classifier-free guidance.
    """

    labels: Tensor
    noise: Tensor
    guidance: Tensor

    def part(self, start: int, stop: int) -> Requests:
        """Return the requests from `start` to `stop`."""
        return Requests(self.labels[start:stop], self.noise[start:stop], self.guidance[start:stop])


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
    """

    family: Family
    table: SolverTable
    steps: Sequence[Step]
    is_guided: bool
    deep_start: int | None = None
    selector: TokenSelector | None = None

    @torch.inference_mode()
    def run(self, requests: Requests, *, batch_size: int = 32, on_step: Callable[[], None] | None = None) -> Tensor:
        """Draw the final latents of all requests, (B, C, H, W).

        Args:
            requests: any number.
            batch_size: how many run at once.
            on_step: called after every step of every batch, for progress and interruption.
        """
        count = len(requests.labels)
        parts = [requests.part(start, start + batch_size) for start in range(0, count, batch_size)]
        return torch.cat([self._run_batch(part, on_step) for part in parts])

    def _run_batch(self, requests: Requests, on_step: Callable[[], None] | None) -> Tensor:
        state = requests.noise
        for moment in self.walk(requests):
            state = moment.after["next_state"]
            if on_step is not None:
                on_step()
        return state[0]

    def walk(self, requests: Requests) -> Iterator[Moment]:
        """Run the schedule on all requests at once, on the device that they and the model are on, step by step."""
        device = requests.labels.device
        config = ForwardConfig(self.is_guided, self.table.state_rows, self.deep_start, self.selector)
        forwards = {forward: FORWARDS[forward](self.family, config) for forward in {s.forward for s in self.steps}}
        timesteps = torch.tensor(self.table.scheduler.timesteps, dtype=torch.float32, device=device)
        conditioned = Conditioning(self.family, config)({"labels": requests.labels, "timesteps": timesteps})
        tables = {  # (T, R, 1, D) each
            name: table.unflatten(0, (len(timesteps), -1)).unsqueeze(2) for name, table in conditioned.items()
        }
        coefficients = torch.tensor(self.table.coefficients, dtype=torch.float32, device=device)
        input_scale = torch.tensor(self.table.input_scale, dtype=torch.float32, device=device)
        state = torch.zeros((self.table.state_rows, *requests.noise.shape), device=device)
        state[0] = requests.noise * self.table.init_noise_sigma
        tensors: Tensors = {"state": state, "guidance": requests.guidance}
        for i, step in enumerate(self.steps):
            tensors |= {"coefficients": coefficients[i], "input_scale": input_scale[i]}
            tensors |= {name: table[i] for name, table in tables.items()}
            if step.forward is Forward.TOKENS:
                assert step.tokens is not None
                tensors["token_slots"] = torch.arange(step.tokens, device=device)
            before = {**tensors}
            written = forwards[step.forward](before)
            tensors |= {name.removeprefix("next_"): tensor for name, tensor in written.items()}
            yield Moment(i, step, before, written)


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
