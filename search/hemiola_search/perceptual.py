"""Figures by networks that see somewhat as people do: LPIPS, CLIP score and FID, all of them torchmetrics'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hemiola_export.model import Model
from hemiola_runtime.artifacts import sha256_of
from hemiola_runtime.results import as_bytes
from hemiola_search.errors import SearchError
from hemiola_search.pretrained import METRICS, check, opened
from hemiola_search.quality import Floats

SMALLEST_SIDE: Final = 64  # of a picture in pixels: below, the networks see little but their own enlargement
PICTURES_AT_ONCE: Final = 16
SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")


class Perception:
    """Measures pictures by some of METRICS.

    Attributes:
        names: of the metrics.
        digest: of all that they depend on beside the pictures.
    """

    def __init__(self, names: Sequence[str], real_images: Path | None) -> None:
        """Open the networks.

        Args:
            names: of the metrics.
            real_images: folder of the pictures that FID refers to; None without FID.

        Raises:
            SearchError: packages, weights or real images are missing, or cannot be used.
        """
        self.names = tuple(name for name in METRICS if name in names)
        if ("fid" in names) != (real_images is not None):
            raise SearchError("fid is a distance to real images: --metric fid and --real-images FOLDER go together")
        for name in self.names:
            check(name)
        self._real = () if real_images is None else _pictures_in(real_images)
        self._metrics  # noqa: B018 - refuses what cannot be opened
        self.digest = sha256_of(
            " ".join([*self.names, *(sha256_of(path.read_bytes()) for path in self._real)]).encode()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_metrics"}  # opened again where it goes

    @cached_property
    def _metrics(self) -> dict[str, Any]:
        return {name: opened(name) for name in self.names}

    def check_model(self, model: Model) -> None:
        """Make sure that the metrics mean something for the pictures of a model.

        Raises:
            SearchError: they do not.
        """
        channels, *size = model.identity.latent_shape
        if model.vae is not None:
            channels = model.vae.config.out_channels
        sides = [side * model.pixels_per_latent for side in size]
        if channels != 3 or min(sides) < SMALLEST_SIDE:
            raise SearchError(
                f"{', '.join(self.names)}: their networks know RGB pictures of {SMALLEST_SIDE}×{SMALLEST_SIDE} pixels "
                f"and more, but {model.identity.name} draws {sides[0]}×{sides[1]}×{channels}. Leave --metric out; a "
                "judge of the model's own gives agreement and a Fréchet distance"
            )
        if "clip_score" in self.names and model.text is None:
            raise SearchError(f"clip_score compares pictures with prompts, and {model.identity.name} draws labels")

    def look(
        self, images: Floats, uncached: Floats, prompts: Sequence[str]
    ) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
        """Return the figures of each image, and those of all images together, by name.

        Args:
            images: (n, height, width, 3) in [0, 1].
            uncached: the same, drawn without caches.
            prompts: n of them; none where images are drawn of labels.
        """
        samples, totals, pictures = {}, {}, as_bytes(images)
        with torch.no_grad():
            for name, metric in self._metrics.items():
                metric.reset()  # which leaves FID its real images
                if name == "lpips":
                    for mine, theirs in zip(_parts(images), _parts(uncached), strict=True):
                        metric.update(mine.float(), theirs.float())
                    samples[name] = tuple(metric.compute().tolist())
                elif name == "clip_score":
                    samples[name] = tuple(
                        float(metric(picture, prompt))
                        for (picture,), prompt in zip(_parts(pictures, 1), prompts, strict=True)
                    )
                else:
                    totals[name] = self._fid(metric, pictures)
        return samples, totals

    def _fid(self, metric: Any, pictures: NDArray[np.uint8]) -> float:
        if not metric.real_features_num_samples:
            for part in _read(self._real):
                metric.update(part, real=True)
        for part in _parts(pictures):
            metric.update(part, real=False)
        return float(metric.compute())


def _parts(pictures: NDArray[Any], count: int = PICTURES_AT_ONCE) -> Iterator[Tensor]:
    """Split pictures (n, height, width, 3) into tensors (count, 3, height, width) on the networks' device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for start in range(0, len(pictures), count):
        part = np.ascontiguousarray(np.moveaxis(pictures[start : start + count], -1, 1))
        yield torch.from_numpy(part).to(device)


def _pictures_in(folder: Path) -> tuple[Path, ...]:
    found = sorted(path for path in folder.resolve().glob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise SearchError(f"{folder} holds {len(found)} pictures ({', '.join(SUFFIXES)}); FID takes 2 or more")
    for path in found:
        try:
            with Image.open(path) as picture:
                picture.verify()
        except (OSError, SyntaxError) as error:  # the latter of a damaged PNG
            raise SearchError(f"{path} is no picture: {error}") from error
    return tuple(found)


def _read(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Read pictures; those of one size that follow on each other come together."""
    same: list[NDArray[np.uint8]] = []
    for path in paths:
        with Image.open(path) as file:
            picture = np.asarray(file.convert("RGB"))
        if same and (picture.shape != same[0].shape or len(same) == PICTURES_AT_ONCE):
            yield from _parts(np.stack(same))
            same = []
        same.append(picture)
    yield from _parts(np.stack(same))
