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
        strategy: which proposed it.
        name: what tells it from the strategy's others.
        num_steps: T of its scheduler.
        rhythm: its steps as letters.
        tokens: K of its `tokens` steps, 0 without any.
        images: which images the figures are of.
        quality: figures by name.
        tera_flops: per image, by the FLOPs model.
    """

    strategy: str
    name: str
    num_steps: int
    rhythm: str
    tokens: int
    images: Literal["searched", "held_out"]
    quality: dict[str, float]
    tera_flops: float


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """All that a search tried.

    Attributes:
        schema: of the file, now 2.
        model: name of the model.
        sampler: as in `DDIM-50`.
        guidance_scale: of all trajectories.
        num_images: on which candidates were scored.
        num_held_out: images of the final figures.
        chosen: rhythm of the schedule that was found.
        points: everything that was tried.
        made_by: command and versions.
        prompts: of the held-out images; none where images are drawn of labels.
    """

    schema: Literal[2]
    model: str
    sampler: str
    guidance_scale: float
    num_images: int
    num_held_out: int
    chosen: str
    points: tuple[Point, ...]
    made_by: MadeBy
    prompts: tuple[str, ...]


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
