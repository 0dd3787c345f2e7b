"""Measure a diffusers scheduler as a solver table.

A deterministic sampler is linear in the sample, the model outputs and its history. So no sampler is written again
here: the scheduler object itself is driven with basis vectors in float64, and the matrices are read off what it does.
No sampler is known by name; whatever tensors of the sample's shape the object keeps are its history.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hemiola_export.errors import UnsupportedSolverError
from hemiola_runtime.schedule import SchedulerIdentity
from hemiola_runtime.solver_table import SolverTable

Matrix = NDArray[np.float64]

_NOT_LINEAR: Final = (
    "{name} is not linear: step {i} differs by {error:.1e} from every fixed combination of its sample, model output "
    "and history. Clipping and thresholding cannot be compiled: set clip_sample or thresholding to False"
)

EXACT: Final = 1e-10  # what a scheduler that computes in the sample's dtype reaches; measured are 1e-16 … 1e-13
CAST_TO_FLOAT32: Final = 1e-6  # what one reaches that casts to float32 inside, as DPM-Solver++ does
PROBE_WIDTH: Final = 64  # numbers in the random trajectories that the table is checked on
PROBE_SCALE: Final = 4.0  # their standard deviation: large enough to reach what clips or thresholds
INDEPENDENT: Final = 1e-9  # a row of the state that adds less than this to the others carries nothing new


def scheduler_identity(scheduler: Any, num_inference_steps: int) -> SchedulerIdentity:
    """Set a scheduler's timesteps and describe it.

    Raises:
        UnsupportedSolverError: the scheduler refuses this number of steps.
    """
    if num_inference_steps < 1:
        raise UnsupportedSolverError(f"{num_inference_steps} denoising steps; a sampler makes 1 or more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler.set_timesteps(num_inference_steps)
        except Exception as error:  # schedulers raise whatever their arithmetic meets
            raise UnsupportedSolverError(
                f"{type(scheduler).__name__} cannot make {num_inference_steps} steps: {error}"
            ) from error
    config = {key: _as_json(value) for key, value in sorted(scheduler.config.items()) if not key.startswith("_")}
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    return SchedulerIdentity(type(scheduler).__name__, config, num_inference_steps, timesteps)


def _as_json(value: Any) -> Any:
    """Write a value of a scheduler's configuration in JSON, which knows neither infinity nor numpy's numbers."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_as_json(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else str(float(value))
    return int(value) if isinstance(value, np.integer) else value


def config_from_identity(identity: SchedulerIdentity) -> dict[str, Any]:
    """Return a scheduler's configuration as the scheduler takes it: infinities are numbers again."""
    infinities = {"inf": np.inf, "-inf": -np.inf}
    return {
        key: float(infinities[value]) if isinstance(value, str) and value in infinities else value
        for key, value in identity.config.items()
    }


def measure_solver(scheduler: Any, num_inference_steps: int) -> SolverTable:
    """Measure the solver table of a diffusers scheduler object.

    Args:
        scheduler: any object of diffusers' scheduler interface; its timesteps are set anew.
        num_inference_steps: T.

    Returns:
        The table, checked against the scheduler on random trajectories.

    Raises:
        UnsupportedSolverError: the scheduler is stochastic or not linear, or refuses this number of steps.
    """
    identity = scheduler_identity(scheduler, num_inference_steps)
    name = identity.label
    num_basis = 1 + len(identity.timesteps)
    basis = torch.eye(num_basis, dtype=torch.float64)
    recording = _drive(scheduler, num_inference_steps, basis[0], list(basis[1:]))
    again = _drive(scheduler, num_inference_steps, basis[0], list(basis[1:]), noise_seed=1)
    if not all(torch.equal(a, b) for a, b in zip(recording.samples, again.samples, strict=True)):
        raise UnsupportedSolverError(
            f"{name} is stochastic: two runs on the same inputs differ. Compiled engines need a deterministic sampler, "
            "as DDIM (eta 0), DPM-Solver++, Euler, DEIS or UniPC"
        )
    slots, matrices = _solve(recording, name)
    residual = _check(scheduler, num_inference_steps, slots, matrices, name)
    return SolverTable(
        schema=1,
        scheduler=identity,
        init_noise_sigma=float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0,
        input_scale=tuple(recording.input_scale),
        coefficients=tuple(
            tuple(tuple(float(w) for w in row) for row in matrix) for matrix in _with_live_rows_only(matrices)
        ),
        residual=residual,
    )


@dataclass(frozen=True, slots=True)
class _Recording:
    """What a scheduler did with E model outputs.

    Attributes:
        samples: E + 1 tensors, the first is the noise.
        history: E dictionaries, the tensors the object kept after each step, by where it kept them.
        outputs: E tensors, the model outputs.
        input_scale: E numbers.
    """

    samples: list[Tensor]
    history: list[dict[str, Tensor]]
    outputs: list[Tensor]
    input_scale: list[float]


def _drive(
    scheduler: Any, num_inference_steps: int, noise: Tensor, outputs: list[Tensor], noise_seed: int = 0
) -> _Recording:
    """Run a scheduler from `noise` (n,) over the given model outputs, each (n,)."""
    shape = (1, len(noise), 1, 1)  # four axes, as latents have: some schedulers count them
    sample = noise.reshape(shape)
    samples, history, input_scale = [noise], [], []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(noise_seed)
        scheduler.set_timesteps(num_inference_steps)
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            input_scale.append(_input_scale(scheduler, sample, t))
            try:
                sample = scheduler.step(output.reshape(shape), t, sample).prev_sample
            except Exception as error:  # as above
                raise UnsupportedSolverError(
                    f"{type(scheduler).__name__} fails at timestep {float(t)}: {error}"
                ) from error
            samples.append(sample.flatten().double().clone())
            history.append({k: v.flatten().double().clone() for k, v in _kept_tensors(scheduler, shape).items()})
    return _Recording(samples, history, outputs, input_scale)


def _input_scale(scheduler: Any, sample: Tensor, t: Tensor) -> float:
    if not hasattr(scheduler, "scale_model_input"):  # flow matching has none
        return 1.0
    ones = torch.ones_like(sample)
    scaled = scheduler.scale_model_input(ones, t)
    return float(scaled.flatten()[0])


def _kept_tensors(scheduler: Any, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return every tensor of the sample's shape that the object holds, by attribute and index."""
    kept = {}
    for name, value in vars(scheduler).items():
        for i, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            if torch.is_tensor(item) and item.shape == shape:
                kept[f"{name}.{i}"] = item
    return kept


def _state(recording: _Recording, slots: list[str], i: int) -> Matrix:
    """Stack the state before evaluation i, (1 + len(slots), n): the sample and what the object kept, or zeros."""
    blank = torch.zeros_like(recording.samples[0])
    kept = recording.history[i - 1] if i > 0 else {}
    return torch.stack([recording.samples[i], *(kept.get(slot, blank) for slot in slots)]).numpy()


def _solve(recording: _Recording, name: str) -> tuple[list[str], list[Matrix]]:
    """Read the matrices off a recording made with basis vectors.

    Returns:
        Where the k tensors of history are kept, and E matrices (1 + k, 2 + k).
    """
    slots = sorted({key for kept in recording.history for key in kept})
    matrices = []
    for i, output in enumerate(recording.outputs):
        sources = np.concatenate([_state(recording, slots, i), output[None].numpy()])
        matrix, error = _combination(sources, _state(recording, slots, i + 1))
        if not np.isfinite(error) or error > CAST_TO_FLOAT32:
            raise UnsupportedSolverError(_NOT_LINEAR.format(name=name, i=i, error=error))
        matrices.append(matrix)
    return slots, matrices


def _combination(sources: Matrix, targets: Matrix) -> tuple[Matrix, float]:
    """Write `targets` (t, n) as W @ sources (s, n), with weights on independent sources only.

    Returns:
        W (t, s) and the largest error, relative to the largest target.
    """
    # Model output and sample come first: they are at hand anyway, while a row of history costs memory to keep.
    order = [len(sources) - 1, *range(len(sources) - 1)]
    chosen: list[int] = []
    orthogonal: list[Matrix] = []
    for i in order:
        rest = sources[i]
        for _ in range(2):  # the second pass removes what rounding left of the first
            for direction in orthogonal:
                rest = rest - (rest @ direction) * direction
        if np.linalg.norm(rest) > INDEPENDENT * max(1.0, float(np.linalg.norm(sources[i]))):
            orthogonal.append(rest / np.linalg.norm(rest))
            chosen.append(i)
    weights = np.zeros((len(targets), len(sources)))
    solved, *_ = np.linalg.lstsq(sources[chosen].T, targets.T, rcond=None)
    weights[:, chosen] = solved.T
    error = float(np.abs(weights @ sources - targets).max()) / max(1.0, float(np.abs(targets).max()))
    # What is smaller than the scheduler's own rounding is rounding, and would keep a row of history alive.
    weights[np.abs(weights) <= max(1e-14, error) * np.abs(weights).max(initial=0.0)] = 0.0
    return weights, error


def _with_live_rows_only(matrices: list[Matrix]) -> list[Matrix]:
    """Keep at each step only the rows that a later step reads, moved together so that the state is small."""
    rows = len(matrices[0])
    live = [[0]]  # after the last step only the sample counts
    for matrix in reversed(matrices):
        read = np.any(matrix[live[0]] != 0, axis=0)
        live.insert(0, [0, *(row for row in range(1, rows) if read[row])])
    height = max(map(len, live))
    small = []
    for i, matrix in enumerate(matrices):
        before, after = live[i], live[i + 1]
        moved = np.zeros((height, height + 1))
        moved[: len(after), : len(before)] = matrix[np.ix_(after, before)]
        moved[: len(after), -1] = matrix[after, -1]
        small.append(moved)
    return small


def _check(scheduler: Any, num_inference_steps: int, slots: list[str], matrices: list[Matrix], name: str) -> float:
    """Compare every step with the scheduler on random trajectories; returns the largest relative error."""
    generator = torch.Generator().manual_seed(0)
    shape = (1 + len(matrices), PROBE_WIDTH)
    drawn = PROBE_SCALE * torch.randn(shape, generator=generator, dtype=torch.float64)
    recording = _drive(scheduler, num_inference_steps, drawn[0], list(drawn[1:]))
    bound = CAST_TO_FLOAT32 if _computes_in_float32(scheduler, num_inference_steps, drawn, recording) else EXACT
    worst = 0.0
    for i, (matrix, output) in enumerate(zip(matrices, recording.outputs, strict=True)):
        predicted = matrix @ np.concatenate([_state(recording, slots, i), output[None].numpy()])
        expected = _state(recording, slots, i + 1)
        error = float(np.abs(predicted - expected).max()) / max(1.0, float(np.abs(expected).max()))
        if not np.isfinite(error) or error > bound:
            raise UnsupportedSolverError(_NOT_LINEAR.format(name=name, i=i, error=error))
        worst = max(worst, error)
    return worst


def _computes_in_float32(scheduler: Any, num_inference_steps: int, drawn: Tensor, recording: _Recording) -> bool:
    """Tell whether a scheduler rounds to float32 inside: only then does a tiny factor on all inputs get lost."""
    factor = 1 + 2.0**-26
    scaled = _drive(scheduler, num_inference_steps, factor * drawn[0], list(factor * drawn[1:]))
    pairs = zip(recording.samples, scaled.samples, strict=True)
    return any(float((again - factor * first).abs().max() / first.abs().max()) > 1e-11 for first, again in pairs)
