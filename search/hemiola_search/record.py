"""The record of a search, `search.json`: every schedule that was tried, with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hemiola_runtime.artifacts import MadeBy
from hemiola_runtime.codec import parse
from hemiola_search.errors import SearchError


@dataclass(frozen=True, slots=True)
class Point:
    """One schedule that was tried, with its figures.

    Attributes:
        budget: that it was tried for, as it was asked for; empty for the uncached run.
        strategy: which proposed it.
        name: what tells it from the strategy's others.
        key: digest of what it computes.
        num_steps: T of its scheduler.
        rhythm: its steps as letters.
        max_tokens: largest K of its `tokens` steps, 0 without any.
        images: which images the figures are of.
        quality: figures by name, means over the images.
        intervals: in which the means lie with 95 % confidence, by bootstrap; of figures that every image has.
        path: relative L2 of the sample behind every step; empty where it was not followed.
        cost: for one image, in the unit of the record's costs.
        tera_flops: for one image, by the FLOPs model.
    """

    budget: str
    strategy: str
    name: str
    key: str
    num_steps: int
    rhythm: str
    max_tokens: int
    images: Literal["searched", "held_out"]
    quality: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    path: tuple[float, ...]
    cost: float
    tera_flops: float

    @property
    def num_full(self) -> int:
        """How many steps are `full`."""
        return self.rhythm.count("F")


@dataclass(frozen=True, slots=True)
class CostSource:
    """Where costs come from.

    Attributes:
        unit: `ms`, measured, or `GFLOP` by the FLOPs model.
        measured: on which machine, by which backend, at which batch size, in words; empty for the FLOPs model.
        estimated: kinds of steps that were not measured, and were priced by their share of FLOPs.
    """

    unit: Literal["ms", "GFLOP"]
    measured: str
    estimated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """All that a search tried.

    Attributes:
        schema: of the file, now 3.
        model: name of the model.
        sampler: as in `DDIM-50`.
        guidance_scale: of all trajectories.
        num_images: on which candidates were scored.
        num_held_out: images of the final figures.
        effort: `quick` or `thorough`.
        costs: where they come from.
        limits: what a schedule may cost, by budget; the first budget is what the chosen schedule was searched for.
        chosen: key of the schedule that was found.
        points: everything that was tried.
        failures: by budget and strategy, why it found nothing.
        made_by: command and versions.
        prompts: of the held-out images; none where images are drawn of labels.
    """

    schema: Literal[3]
    model: str
    sampler: str
    guidance_scale: float
    num_images: int
    num_held_out: int
    effort: str
    costs: CostSource
    limits: dict[str, float]
    chosen: str
    points: tuple[Point, ...]
    failures: dict[str, dict[str, str]]
    made_by: MadeBy
    prompts: tuple[str, ...]

    @property
    def held_out(self) -> tuple[Point, ...]:
        """The points of held-out images."""
        return tuple(point for point in self.points if point.images == "held_out")


def read_record(path: Path) -> SearchRecord:
    """Read a record.

    Raises:
        SearchError: there is none, or it is not valid.
    """
    try:
        return parse(SearchRecord, path.read_bytes(), path.name)
    except OSError as error:
        raise SearchError(f"cannot read {path}: {error.strerror}. `hemiola search` writes it") from error
    except ValueError as error:
        raise SearchError(f"{error}. `hemiola search` writes valid records") from error
