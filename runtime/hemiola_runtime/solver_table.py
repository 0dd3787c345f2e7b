"""The solver table: a deterministic diffusers scheduler as one small matrix per model evaluation.

`next_state = W · [state; model_output]`, where the state's rows are the sample and whatever history the solver keeps.
Export measures the table (`hemiola_export.solver`); the step engines apply it. This module only reads and writes it,
with the standard library alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hemiola_runtime.codec import parse, write_json
from hemiola_runtime.errors import BundleError
from hemiola_runtime.schedule import SchedulerIdentity


@dataclass(frozen=True, slots=True)
class SolverTable:
    """A sampler as numbers: E model evaluations, a state of 1 + k rows.

    Attributes:
        schema: of the file, now 1.
        scheduler: what was measured.
        init_noise_sigma: factor that turns unit noise into the first sample.
        input_scale: (E,), factor of the sample before it enters the model.
        coefficients: (E, 1 + k, 2 + k); row 0 makes the next sample, the last column weighs the model output.
        residual: largest error of the table against the scheduler on random trajectories, relative to their size.
    """

    schema: Literal[1]
    scheduler: SchedulerIdentity
    init_noise_sigma: float
    input_scale: tuple[float, ...]
    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    residual: float

    def __post_init__(self) -> None:
        evaluations = len(self.scheduler.timesteps)
        if not len(self.input_scale) == len(self.coefficients) == evaluations:
            raise ValueError(f"a table for {evaluations} evaluations has as many coefficients and input scales")
        rows = self.state_rows
        if rows < 1 or any(len(w) != rows or any(len(row) != rows + 1 for row in w) for w in self.coefficients):
            raise ValueError(f"every matrix has {rows} rows and {rows + 1} columns")

    @property
    def state_rows(self) -> int:
        """Rows of the state, 1 + k: the sample and k rows of history."""
        return len(self.coefficients[0])

    def padded(self, state_rows: int) -> SolverTable:
        """Return the same solver with rows of zeros added, so that engines of a longer history can run it."""
        if state_rows < self.state_rows:
            raise BundleError(
                f"{self.scheduler.label} keeps a state of {self.state_rows} rows, but the engines were exported for "
                f"{state_rows}. Export again with this schedule among the others"
            )
        extra = state_rows - self.state_rows
        blank = (0.0,) * (state_rows + 1)
        coefficients = tuple(
            (*((*row[:-1], *(0.0,) * extra, row[-1]) for row in matrix), *(blank,) * extra)
            for matrix in self.coefficients
        )
        return SolverTable(
            self.schema, self.scheduler, self.init_noise_sigma, self.input_scale, coefficients, self.residual
        )


def solver_table_from_json(text: bytes, name: str) -> SolverTable:
    """Read a table from the bytes of its file.

    Raises:
        BundleError: the bytes are not a valid table.
    """
    try:
        return parse(SolverTable, text, name)
    except ValueError as error:
        raise BundleError(f"{error}. Export again") from error


def write_solver_table(table: SolverTable, path: Path) -> None:
    """Write a table atomically; its numbers read back bit for bit."""
    write_json(table, path)
