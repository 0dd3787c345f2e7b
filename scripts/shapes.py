"""Scenes of coloured shapes: their grammar, how they are drawn, and how they are read without learning.

The world of examples/shapes, which train_shapes.py trains a model of.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

SAMPLE_SIZE: Final = 32
LAYOUTS: Final = ("single", "side by side", "stacked")
SHAPES: Final = ("circle", "square", "triangle")
COLOURS: Final = {
    "red": (0.87, 0.15, 0.15),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.15, 0.32, 0.87),
    "yellow": (0.95, 0.80, 0.12),
    "purple": (0.56, 0.20, 0.70),
    "black": (0.10, 0.10, 0.10),
}
RELATIONS: Final = {  # the layout, and whether the object that is named first is the second of the scene
    "left of": ("side by side", False),
    "right of": ("side by side", True),
    "above": ("stacked", False),
    "below": ("stacked", True),
}
# layout, first colour, first shape, second colour, second shape; the last value of a second is "there is none"
HEADS: Final = (len(LAYOUTS), len(COLOURS), len(SHAPES), len(COLOURS) + 1, len(SHAPES) + 1)
SHARE_OF_SINGLES: Final = 0.15  # of the training pictures; of the captions they are 1 in 69
SHARE_HELD_OUT: Final = 0.05  # of the scenes with two objects: never trained on, by neither of their captions


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows.

    Attributes:
        layout: one of LAYOUTS.
        first: colour and shape of the only, the left or the upper object.
        second: colour and shape of the right or the lower object; None for a single.
    """

    layout: str
    first: tuple[str, str]
    second: tuple[str, str] | None = None

    def captions(self) -> list[str]:
        """Say it in every way that the grammar has: one for a single, two for a pair."""
        first = f"a {' '.join(self.first)}"
        if self.second is None:
            return [first]
        second = f"a {' '.join(self.second)}"
        return [
            f"{second} {relation} {first}" if is_reversed else f"{first} {relation} {second}"
            for relation, (layout, is_reversed) in RELATIONS.items()
            if layout == self.layout
        ]

    def attributes(self) -> list[int]:
        """Return the value of each of HEADS."""
        colours, shapes = [*COLOURS, None], [*SHAPES, None]
        second = self.second or (None, None)
        values = [LAYOUTS.index(self.layout)]
        for colour, shape in (self.first, second):
            values += [colours.index(colour), shapes.index(shape)]
        return values


def scenes() -> list[Scene]:
    """List every scene of the grammar, in the order of the judge's classes; the objects of a pair differ."""
    objects = list(product(COLOURS, SHAPES))
    pairs = [Scene(layout, *pair) for layout in LAYOUTS[1:] for pair in permutations(objects, 2)]
    return [Scene("single", each) for each in objects] + pairs


def scene_of_captions() -> dict[str, int]:
    """Map every caption of the grammar to the index of its scene."""
    return {caption: index for index, scene in enumerate(scenes()) for caption in scene.captions()}


def held_out_scenes(seed: int) -> set[int]:
    """Choose the scenes with two objects that neither the text encoder nor the transformer is trained on."""
    pairs = [index for index, scene in enumerate(scenes()) if scene.second]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return {pairs[place] for place in order[: round(SHARE_HELD_OUT * len(pairs))]}


def attribute_table() -> Tensor:
    """Return (C, H): 1 where scene c has the value h, the values of all HEADS side by side; H is the sum of HEADS."""
    attributes = torch.tensor([scene.attributes() for scene in scenes()])
    return torch.cat([F.one_hot(column, size) for column, size in zip(attributes.T, HEADS, strict=True)], 1).float()


def log_probabilities(logits: Tensor) -> Tensor:
    """Normalise each head on its own: (…, H) to (…, H)."""
    return torch.cat([head.log_softmax(-1) for head in logits.split(HEADS, -1)], -1)


def place(layouts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sizes and places of two objects: radii (B, 2) and centres (B, 2, 2), x before y, in pixels.

    A single is anywhere. Of a pair, each object keeps to its half along the axis of the layout (B,), 2 pixels from the
    other at least; across that axis the two differ by 5 pixels at most.
    """
    u = torch.rand((len(layouts), 2, 3), generator=generator)
    radii = torch.where((layouts == 0)[:, None], 5 + 4 * u[..., 0], 4.5 + 2 * u[..., 0])  # (B, 2)
    anywhere = radii[..., None] + 1 + (SAMPLE_SIZE - 2 - 2 * radii[..., None]) * u[..., 1:]  # (B, 2, 2)
    half = SAMPLE_SIZE / 2
    along = radii + 1 + (half - 2 - 2 * radii) * u[..., 1] + torch.tensor([0.0, half])  # (B, 2)
    common = 10.5 + 11 * torch.rand((len(layouts), 1), generator=generator)
    across = common + 5 * (u[..., 2] - 0.5)  # (B, 2)
    beside = torch.stack([along, across], -1)  # (B, 2, 2)
    layouts = layouts[:, None, None]
    return radii, torch.where(layouts == 0, anywhere, torch.where(layouts == 1, beside, beside.flip(-1)))


def render(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Draw scenes, given as attributes (B, 5), on white: (B, 3, 32, 32) in [-1, 1], edges one pixel soft."""
    radii, centres = place(attributes[:, 0], generator)
    palette = torch.tensor([*COLOURS.values()])
    axis = torch.arange(SAMPLE_SIZE) + 0.5
    pictures = torch.ones(len(attributes), 3, SAMPLE_SIZE, SAMPLE_SIZE)
    for i in range(2):
        colours, shapes = attributes[:, 1 + 2 * i], attributes[:, 2 + 2 * i]
        r = radii[:, i, None, None]
        x = axis[None, None, :] - centres[:, i, 0, None, None]  # (B, 1, 32)
        y = axis[None, :, None] - centres[:, i, 1, None, None]  # (B, 32, 1)
        circle = r - torch.hypot(x, y)
        square = 0.9 * r - torch.maximum(x.abs(), y.abs())
        triangle = torch.minimum(((y + r) / 2 - x.abs()) / 1.25**0.5, r - y)  # as wide as high, apex on top
        distances = torch.stack([circle, square, triangle, torch.full_like(circle, -1)], 1)  # inside is positive
        distance = distances[torch.arange(len(shapes)), shapes][:, None]  # (B, 1, 32, 32)
        shade = 0.08 * torch.rand((len(colours), 3), generator=generator) - 0.04
        colour = palette[colours.clamp(max=len(COLOURS) - 1)] + shade  # an object that is not there has no pixels
        pictures = pictures.lerp(colour[..., None, None], (distance + 0.5).clamp(0, 1))
    return pictures * 2 - 1


def as_pictures(samples: Tensor) -> Tensor:
    """Turn samples (B, 3, H, W) in [-1, 1] into pictures (B, H, W, 3) in [0, 1]."""
    return (samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def draw_scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Render random scenes, SHARE_OF_SINGLES of them singles: pictures (count, 32, 32, 3) and their scenes (count,)."""
    attributes = torch.tensor([scene.attributes() for scene in scenes()])
    num_singles = int((attributes[:, 0] == 0).sum())
    single = torch.randint(0, num_singles, (count,), generator=generator)
    pair = torch.randint(num_singles, len(attributes), (count,), generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < SHARE_OF_SINGLES, single, pair)
    return as_pictures(render(attributes[chosen], generator)), chosen


def read_by_rule(picture: NDArray[np.float32]) -> Scene | None:
    """Read a picture (32, 32, 3) in [0, 1] without learning, as a second opinion; None if it shows no scene.

    Objects are connected regions that are not white. The colour is the nearest of the palette's; the shape follows
    from the share of the bounding box that is covered: all by a square, π/4 by a circle, half by a triangle.
    """
    regions, num_regions = ndimage.label((1 - picture).max(2) > 0.25)
    if num_regions not in (1, 2):
        return None
    found = []
    for region in range(1, num_regions + 1):
        ys, xs = np.nonzero(regions == region)
        colour = np.median(picture[ys, xs], 0)
        name = min(COLOURS, key=lambda name: float(np.square(colour - COLOURS[name]).sum()))
        contrast = 1 - colour
        near = ndimage.binary_dilation(regions == region, np.ones((3, 3)))
        covered = ((1 - picture) @ contrast / (contrast @ contrast)).clip(0, 1) * near  # (32, 32)
        filled = covered.sum() / (covered.sum(0).max() * covered.sum(1).max())
        shape = "triangle" if filled < 0.7 else "circle" if filled < 0.89 else "square"
        found.append((float(xs.mean()), float(ys.mean()), (name, shape)))
    if num_regions == 1:
        return Scene("single", found[0][2])
    (ax, ay, _), (bx, by, _) = found
    axis = 0 if abs(ax - bx) > abs(ay - by) else 1
    first, second = sorted(found, key=lambda each: each[axis])
    return Scene(LAYOUTS[1 + axis], first[2], second[2])


def rule_agreement(pictures: Tensor, asked: Tensor) -> float:
    """Return the share of pictures (n, 32, 32, 3) that the rule reads as the scenes asked for (n,)."""
    known = scenes()
    read = [read_by_rule(picture) == known[scene] for picture, scene in zip(pictures.numpy(), asked, strict=True)]
    return round(float(np.mean(read)), 4)


def agreement(read: Tensor, asked: Tensor) -> dict[str, float]:
    """Tell which share of scenes (n,) is read as asked: the whole of it, and what it is made of."""
    attributes = torch.tensor([scene.attributes() for scene in scenes()])
    same = attributes[read] == attributes[asked]  # (n, 5)
    parts = {"scene": same, "layout": same[:, :1], "colours": same[:, [1, 3]], "shapes": same[:, [2, 4]]}
    return {name: round(part.all(1).float().mean().item(), 4) for name, part in parts.items()}
