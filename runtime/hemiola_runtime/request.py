"""A request: what a caller asks for, checked before anything runs, as the tensors that the first launches read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hemiola_runtime.errors import RequestError
from hemiola_runtime.manifest import Manifest
from hemiola_runtime.noise import noise_from_seeds
from hemiola_runtime.patches import to_patches
from hemiola_runtime.pipeline import Pipeline
from hemiola_runtime.text import Embedded, check_prompts

MAX_SEED: Final = 2**64 - 1  # what keys numpy's Philox with one word


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asks for, as it was given: the arguments of `Sampler.generate`."""

    labels: Sequence[int | str] | None
    prompts: Sequence[str] | None
    negative_prompts: str | Sequence[str] | None
    seeds: int | Sequence[int]
    guidance_scale: float | Sequence[float] | None
    latents: NDArray[np.float32] | None
    height: int | None
    width: int | None


@dataclass(frozen=True, slots=True)
class Request:
    """B images to draw.

    Attributes:
        labels: (B,) int64; None where images are drawn of prompts.
        prompts: B of them; none where images are drawn of labels.
        negative_prompts: B of them under guidance; else none.
        seeds: B of them; empty where the caller gave the noise.
        guidance: (B,) float32.
        noise: (B, C, H, W) float32, standard normal.
    """

    labels: NDArray[np.int64] | None
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: NDArray[np.float32]
    noise: NDArray[np.float32]

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.noise)

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts in the order in which they are encoded: negative ones first."""
        return self.negative_prompts + self.prompts

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the latents."""
        return self.noise.shape[2], self.noise.shape[3]

    def tensors(
        self, pipeline: Pipeline, init_noise_sigma: float, conditions: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Return what the request writes into the workspace, by name; `conditions` say what images are drawn of."""
        patches = to_patches(self.noise * np.float32(init_noise_sigma), pipeline.patch_size)
        state = np.zeros((pipeline.state_rows, *patches.shape), dtype=np.float32)
        state[0] = patches
        return {"state": state, "guidance": self.guidance, **conditions}


def by_image(embedded: Embedded, batch_size: int) -> dict[str, NDArray[np.float32]]:
    """Return what conditioning reads of prompts that were encoded in the order of `Request.texts`.

    Returns:
        `text_embeddings` (B, rows per image, S, D) and `text_mask` (B, rows per image, S).
    """
    written = {"text_embeddings": embedded.embeddings, "text_mask": embedded.mask}
    rows = {name: values.reshape(-1, batch_size, *values.shape[1:]) for name, values in written.items()}
    return {name: np.ascontiguousarray(values.swapaxes(0, 1)) for name, values in rows.items()}


def request_from_arguments(manifest: Manifest, asked: Asked) -> Request:
    """Check what a caller asks for against what a bundle can do.

    Raises:
        RequestError: it cannot; the message says why.
    """
    pipeline = manifest.pipeline
    labels, prompts = _subjects(pipeline, asked)
    batch_size = len(prompts) if labels is None else len(labels)
    if batch_size == 0:
        raise RequestError("no label was given; a request draws one image for each")
    if not 1 <= batch_size <= manifest.max_batch_size:
        raise RequestError(
            f"{batch_size} images in one request; this bundle takes 1 to {manifest.max_batch_size}. Ask in parts, or "
            f"build it with --max-batch-size {max(batch_size, 1)}"
        )
    shape = (pipeline.model.latent_shape[0], *_size(pipeline, asked.height, asked.width))
    if asked.latents is None:
        drawn = _seeds(asked.seeds, batch_size)
        noise = noise_from_seeds(drawn, shape)
    else:
        drawn, noise = (), _latents(asked.latents, (batch_size, *shape))
    return Request(
        labels=None if labels is None else np.array(labels, dtype=np.int64),
        prompts=prompts,
        negative_prompts=_negative_prompts(pipeline, asked.negative_prompts, batch_size),
        seeds=drawn,
        guidance=_guidance(pipeline, asked.guidance_scale, batch_size),
        noise=noise,
    )


def _subjects(pipeline: Pipeline, asked: Asked) -> tuple[list[int] | None, tuple[str, ...]]:
    """Read what images are drawn of: labels or prompts, whichever the bundle takes."""
    if pipeline.text is None:
        if asked.prompts is not None or asked.negative_prompts is not None:
            raise RequestError("this bundle draws images of labels, not of prompts")
        return _label_numbers(() if asked.labels is None else asked.labels, pipeline.labels), ()
    if asked.labels is not None:
        raise RequestError("this bundle draws images of prompts, not of labels")
    return None, tuple(check_prompts(() if asked.prompts is None else asked.prompts))


def _negative_prompts(pipeline: Pipeline, given: str | Sequence[str] | None, batch_size: int) -> tuple[str, ...]:
    if pipeline.text is None or (pipeline.guidance == "none" and given is None):
        return ()
    if pipeline.guidance == "none":
        raise RequestError("the bundle was exported without guidance, which is what negative prompts are for")
    texts = [given or ""] * batch_size if given is None or isinstance(given, str) else given
    check_prompts(texts, "negative_prompts")
    if len(texts) != batch_size:
        raise RequestError(f"{len(texts)} negative prompts for {batch_size} images; give one per image, or one string")
    return tuple(texts)


def _size(pipeline: Pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Turn the size of a picture in pixels into that of its latents."""
    found = []
    unit = pipeline.patch_size * pipeline.pixels_per_latent
    if pipeline.selector is not None and pipeline.selector.has_squares:
        unit *= pipeline.selector.spatial_size
    sides = zip(("height", "width"), (height, width), pipeline.size, pipeline.min_size, pipeline.max_size, strict=True)
    for name, pixels, default, *bounds in sides:
        if pixels is None:
            found.append(default)
            continue
        least, most = (bound * pipeline.pixels_per_latent for bound in bounds)
        if not _is_whole(pixels) or not least <= pixels <= most or (least < most and pixels % unit):
            allowed = f"{least}" if least == most else f"a multiple of {unit} from {least} to {most}"
            more = "" if least < most else "; export with --min-size and --max-size for others"
            raise RequestError(f"{name} is {allowed} pixels in this bundle, not {pixels!r}{more}")
        found.append(int(pixels) // pipeline.pixels_per_latent)
    return found[0], found[1]


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
        has_names = any(label != names for label, names in known.items())
        lists = (
            "`hemiola inspect` of the bundle lists them" if has_names else f"they are numbers, 0 to {len(known) - 1}"
        )
        raise RequestError(f"unknown label {name!r}; {lists}")
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


def _guidance(pipeline: Pipeline, given: float | Sequence[float] | None, batch_size: int) -> NDArray[np.float32]:
    if pipeline.guidance == "none" and given not in (None, 1, 1.0):
        raise RequestError("the bundle was exported without guidance; leave guidance_scale out")
    scale = pipeline.guidance_scale if given is None else given
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
        raise RequestError(
            f"latents have shape {latents.shape} where this request needs {shape}: images, channels, height and width"
        )
    if not np.isfinite(latents).all():
        raise RequestError("latents hold NaN or infinity")
    return latents
