"""A request: what a caller asks for, checked before anything runs, as the tensors that the first launches read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.errors import RequestError
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.noise import noise_from_seeds

MAX_SEED: Final = 2**64 - 1  # what keys numpy's Philox with one word


@dataclass(frozen=True, slots=True)
class Request:
    """B images to draw.

    Attributes:
        labels: (B,) int64.
        seeds: B of them; empty where the caller gave the noise.
        guidance: (B,) float32.
        noise: (B, C, H, W) float32, standard normal.
    """

    labels: NDArray[np.int64]
    seeds: tuple[int, ...]
    guidance: NDArray[np.float32]
    noise: NDArray[np.float32]

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.labels)

    def tensors(self, init_noise_sigma: float, state_rows: int) -> dict[str, NDArray[Any]]:
        """Return what the request writes into the workspace, by name."""
        state = np.zeros((state_rows, *self.noise.shape), dtype=np.float32)
        state[0] = self.noise * np.float32(init_noise_sigma)
        return {"state": state, "labels": self.labels, "guidance": self.guidance}


def request_from_arguments(
    manifest: Manifest,
    labels: Sequence[int | str],
    seeds: int | Sequence[int],
    guidance_scale: float | Sequence[float],
    latents: NDArray[np.float32] | None,
) -> Request:
    """Check what a caller asks for against what a bundle can do.

    Raises:
        RequestError: it cannot; the message says why.
    """
    numbers = _label_numbers(labels, manifest.pipeline.labels)
    batch_size = len(numbers)
    if batch_size == 0:
        raise RequestError("no label was given; a request draws one image for each")
    if not 1 <= batch_size <= manifest.max_batch_size:
        raise RequestError(
            f"{batch_size} images in one request; this bundle takes 1 to {manifest.max_batch_size}. Ask in parts, or "
            f"build it with --max-batch-size {max(batch_size, 1)}"
        )
    shape = manifest.pipeline.model.latent_shape
    if latents is None:
        drawn = _seeds(seeds, batch_size)
        noise = noise_from_seeds(drawn, shape)
    else:
        drawn, noise = (), _latents(latents, (batch_size, *shape))
    return Request(np.array(numbers, dtype=np.int64), drawn, _guidance(guidance_scale, batch_size), noise)


def _label_numbers(labels: Sequence[int | str], known: dict[str, str]) -> list[int]:
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence | np.ndarray):
        raise RequestError(f"labels is a list with one label per image, not {labels!r}")
    numbers = []
    for label in labels:
        if isinstance(label, str):
            numbers.append(_label_number(label, known))
        elif _is_whole(label) and 0 <= label < len(known):
            numbers.append(int(label))
        else:
            raise RequestError(f"label {label!r} is out of range: this model knows 0 to {len(known) - 1}")
    return numbers


def _label_number(name: str, known: dict[str, str]) -> int:
    """Find a class by all of its name or by one of the synonyms that commas separate, as in `tench, Tinca tinca`."""
    meant = [label for label, names in known.items() if name == names]
    meant = meant or [label for label, names in known.items() if name in map(str.strip, names.split(","))]
    if not meant:
        raise RequestError(f"unknown label {name!r}; `hemiola inspect` of the bundle lists them")
    if len(meant) > 1:
        raise RequestError(f"label {name!r} is the name of {len(meant)} classes: {', '.join(meant)}. Give the number")
    return int(meant[0])


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _seeds(seeds: int | Sequence[int], batch_size: int) -> tuple[int, ...]:
    if isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str | bytes):
        drawn: tuple[Any, ...] = tuple(seeds)
    elif _is_whole(seeds):
        drawn = tuple(int(seeds) + i for i in range(batch_size))
    else:
        raise RequestError(f"seeds is a whole number, or one per image, not {seeds!r}")
    if len(drawn) != batch_size:
        raise RequestError(f"{len(drawn)} seeds for {batch_size} images; give one per image, or one number")
    for seed in drawn:
        if not _is_whole(seed) or not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed {seed!r} is not a whole number from 0 to 2^64 - 1")
    return tuple(int(seed) for seed in drawn)


def _guidance(scale: float | Sequence[float], batch_size: int) -> NDArray[np.float32]:
    try:
        values = np.asarray(scale)
        if values.dtype.kind not in "iuf":
            raise TypeError(f"{values.dtype} is no kind of real number")
        is_finite = bool((np.abs(values) <= np.finfo(np.float32).max).all())
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"guidance_scale is a number, or one per image, not {scale!r}") from error
    if values.shape not in ((), (batch_size,)) or not is_finite:
        raise RequestError(f"guidance_scale {scale!r} is neither one finite number nor {batch_size}, one per image")
    return np.broadcast_to(values.astype(np.float32), (batch_size,)).copy()


def _latents(latents: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32:
        kind = latents.dtype if isinstance(latents, np.ndarray) else type(latents).__name__
        raise RequestError(f"latents are a numpy array of float32, not {kind}. Convert with .astype(numpy.float32)")
    if latents.shape != shape:
        raise RequestError(f"latents have shape {latents.shape} where this request needs {shape}")
    if not np.isfinite(latents).all():
        raise RequestError("latents hold NaN or infinity")
    return latents
