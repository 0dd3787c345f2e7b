"""What the graphs of a model compute, whatever runs them, and which schedules fit that. Standard library alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hemiola_runtime.errors import ScheduleError
from hemiola_runtime.graphs import STEP_TABLE
from hemiola_runtime.schedule import ModelIdentity, Schedule, TokenSelector


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the graphs compute, whatever runs them.

    Attributes:
        model: the model they were exported from.
        guidance: `classifier_free` or `none`.
        num_blocks: L.
        width: D.
        num_tokens: N.
        branches: modules of a block that are cached, in the order of their residual sums.
        state_rows: 1 + k, the sample and the solver's history.
        deep_start: first deep block of `deep` and `tokens`, None if neither was exported.
        selector: of `tokens`, None if it was not exported.
        labels: class label → what people call it.
        image_shape: (height, width, channels) of one picture.
    """

    model: ModelIdentity
    guidance: Literal["classifier_free", "none"]
    num_blocks: int
    width: int
    num_tokens: int
    branches: tuple[str, ...]
    state_rows: int
    deep_start: int | None
    selector: TokenSelector | None
    labels: dict[str, str]
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if list(self.labels) != [str(label) for label in range(len(self.labels))] or not self.labels:
            raise ValueError("labels are numbered from 0, one after the other")

    @property
    def rows_per_image(self) -> int:
        """2 under classifier-free guidance, else 1."""
        return 2 if self.guidance == "classifier_free" else 1

    def symbols(self, batch_size: int, num_evaluations: int, num_selected: int = 0) -> dict[str, int]:
        """Return the number behind every symbol of a shape."""
        rows = batch_size * self.rows_per_image
        return {"B": batch_size, "R": rows, "K": num_selected, "T": num_evaluations, STEP_TABLE: num_evaluations * rows}

    def check_schedule(self, schedule: Schedule, forwards: set[str]) -> None:
        """Make sure that a schedule was made for this pipeline.

        Raises:
            ScheduleError: it was not; the message names both sides.
        """
        mine, theirs = self.model, schedule.model
        if (mine.family, mine.weights_sha256) != (theirs.family, theirs.weights_sha256):
            raise ScheduleError(
                f"the schedule was made for the model {theirs.name} (weights {theirs.weights_sha256[:12]}), "
                f"but here is {mine.name} (weights {mine.weights_sha256[:12]}). Search a schedule for this model"
            )
        if mine.latent_shape != theirs.latent_shape:
            raise ScheduleError(
                f"the schedule was made for latents of shape {list(theirs.latent_shape)}, but here they are "
                f"{list(mine.latent_shape)}. Search a schedule at this resolution"
            )
        if self.guidance != schedule.guidance:
            raise ScheduleError(
                f"the schedule was made with guidance `{schedule.guidance}`, but here it is `{self.guidance}`"
            )
        if missing := sorted({forward.value for forward in schedule.counts} - forwards):
            raise ScheduleError(
                f"the schedule runs `{', '.join(missing)}`, but only {', '.join(sorted(forwards))} were exported. "
                "Export again with this schedule among the others"
            )
        for name, wanted, here in (
            ("deep_start", schedule.deep_start, self.deep_start),
            ("selector", schedule.selector, self.selector),
        ):
            if wanted is not None and wanted != here:
                raise ScheduleError(
                    f"the schedule needs {name} = {wanted}, but the graphs were exported with {name} = {here}. "
                    "Export again with this schedule"
                )
        for i, step in enumerate(schedule.steps):
            if step.tokens is not None and step.tokens > self.num_tokens:
                raise ScheduleError(f"step {i} recomputes {step.tokens} tokens, but an image has {self.num_tokens}")
