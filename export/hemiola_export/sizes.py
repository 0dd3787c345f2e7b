"""Sizes of the pictures that a bundle draws, from what a user asks for in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hemiola_export.errors import ExportError
from hemiola_export.model import Model
from hemiola_runtime.pipeline import Size
from hemiola_runtime.schedule import TokenSelector

Pixels = tuple[int, int]  # (height, width)
UNTILED: Final = 128  # side of the largest latents that are decoded at once: 1024 pixels of a usual VAE


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a user asks for.

    Attributes:
        smallest: height and width in pixels; None for the size that the model is configured for.
        largest: likewise.
        tile: side in pixels of what a VAE decodes at once, where pictures are larger; None for 1024 pixels of a
            usual VAE.
    """

    smallest: Pixels | None = None
    largest: Pixels | None = None
    tile: int | None = None

    def in_latents(self, model: Model, selector: TokenSelector | None) -> tuple[Size, Size]:
        """Return the smallest and the largest (H, W) in latents.

        Raises:
            ExportError: the model does not draw pictures of these sizes.
        """
        _, *native = model.family.latent_shape
        default = (native[0], native[1])
        least, most = (self._latents(model, size, default) for size in (self.smallest, self.largest))
        if (least, most) == (default, default):
            return least, most
        if not model.family.has_sizes:
            raise ExportError(f"a model of the family {model.family.key} draws pictures of one size")
        unit = model.family.patch_size
        if selector is not None and selector.has_squares:
            unit *= selector.spatial_size
        for name, small, usual, large in zip(("height", "width"), least, default, most, strict=True):
            if small % unit or large % unit:
                step = unit * model.pixels_per_latent
                raise ExportError(f"the smallest and the largest {name} are multiples of {step} pixels")
            if not 0 < small <= usual <= large:
                pixels = " ≤ ".join(str(side * model.pixels_per_latent) for side in (small, usual, large))
                raise ExportError(f"the model's own {name} lies between the smallest and the largest: not {pixels}")
        return least, most

    @staticmethod
    def _latents(model: Model, size: Pixels | None, default: Size) -> Size:
        if size is None:
            return default
        if any(side % model.pixels_per_latent for side in size):
            raise ExportError(f"a latent becomes {model.pixels_per_latent} pixels, which does not divide {size}")
        return size[0] // model.pixels_per_latent, size[1] // model.pixels_per_latent

    def tile_in_latents(self, model: Model, largest: Size) -> int | None:
        """Return the side of a tile in latents; None where all pictures are decoded at once.

        Raises:
            ExportError: it cannot be one.
        """
        side = UNTILED if self.tile is None else self.tile // model.pixels_per_latent
        if self.tile is not None and (self.tile < 1 or self.tile % (model.family.patch_size * model.pixels_per_latent)):
            unit = model.family.patch_size * model.pixels_per_latent
            raise ExportError(f"a tile is a multiple of {unit} pixels, not {self.tile}")
        return side if side < max(largest) else None
