from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.codec import encode
from hemiola_runtime.errors import BundleError
from hemiola_runtime.schedule import SchedulerIdentity
from hemiola_runtime.solver_table import SolverTable, solver_table_from_json, write_solver_table
from strategies import examples, json_values, mutated, solver_tables

GOLDEN: Final = Path(__file__).parent / "golden" / "solver_table.json"

TABLE: Final = SolverTable(
    schema=1,
    scheduler=SchedulerIdentity("DEISMultistepScheduler", {"solver_order": 2}, 2, (999.0, 499.0)),
    init_noise_sigma=1.0,
    input_scale=(1.0, 0.5),
    coefficients=(
        ((1.0, 0.0, -0.25), (0.0, 0.0, 1.0)),
        ((0.875, 0.125, -0.5), (0.0, 0.0, 1.0)),
    ),
    residual=1e-15,
)


def _bits(table: SolverTable) -> list[str]:
    numbers = [table.init_noise_sigma, table.residual, *table.input_scale, *np.ravel(table.coefficients)]
    return [float(number).hex() for number in numbers]


@examples(25)
@given(table=solver_tables())
def test_a_written_table_reads_back_bit_for_bit(table: SolverTable, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("solver") / "table.json"
    write_solver_table(table, path)
    again = solver_table_from_json(path.read_bytes(), path.name)
    assert again == table
    assert _bits(again) == _bits(table)  # == takes -0.0 for 0.0


def test_the_golden_table_keeps_loading() -> None:
    assert solver_table_from_json(GOLDEN.read_bytes(), GOLDEN.name) == TABLE


REFUSED: list[tuple[list[str | int], Any, str]] = [
    (["schema"], 2, "table.json.schema: expected one of 1, found 2"),
    (["surprise"], 1, "table.json: unknown key 'surprise'"),
    (["input_scale"], [1.0], "table.json: a table for 2 evaluations has as many coefficients and input scales"),
    (["coefficients"], [[[1.0, 0.0]]], "a table for 2 evaluations has as many"),
    (["coefficients"], [], "a table for 2 evaluations has as many"),
    (["scheduler", "timesteps"], [1.0], "a table for 1 evaluations has as many"),
    (["coefficients", 1, 0], [1.0, 0.0], "table.json: every matrix has 2 rows and 3 columns"),
    (["coefficients", 1], [[1.0, 0.0, 0.0]], "every matrix has 2 rows and 3 columns"),
    (["coefficients"], [[], []], "every matrix has 0 rows and 1 columns"),
    (["coefficients", 0, 1, 2], None, "table.json.coefficients[0][1][2]: expected a finite number, found null"),
    (["coefficients", 0, 1, 2], "1", "table.json.coefficients[0][1][2]: expected a finite number"),
    (["init_noise_sigma"], True, "table.json.init_noise_sigma: expected a finite number, found true"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[message[:70] for *_, message in REFUSED])
def test_an_invalid_table_is_refused_with_the_place(path: list[str | int], value: Any, message: str) -> None:
    data: Any = json.loads(GOLDEN.read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BundleError) as caught:
        solver_table_from_json(json.dumps(data).encode(), "table.json")
    assert message in str(caught.value)
    assert "Export again" in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_table_holds_finite_numbers_only(number: str) -> None:
    text = GOLDEN.read_text()
    assert "0.875" in text
    with pytest.raises(BundleError, match=r"is not a number that JSON knows|expected a finite number"):
        solver_table_from_json(text.replace("0.875", number).encode(), "table.json")


def _read_or_refuse(content: bytes) -> SolverTable | None:
    """Read a table; the one exception that may escape becomes None."""
    try:
        return solver_table_from_json(content, "table.json")
    except BundleError:
        return None


@examples(50)
@given(content=st.binary(max_size=40) | json_values().map(lambda data: json.dumps(data).encode()))
def test_arbitrary_files_are_refused_as_a_bundle_error(content: bytes) -> None:
    assert _read_or_refuse(content) is None


@examples(150)
@given(data=mutated(encode(TABLE)))
def test_a_mutated_table_is_read_as_it_is_or_refused_as_a_bundle_error(data: Any) -> None:
    table = _read_or_refuse(json.dumps(data).encode())
    assert table is None or encode(table) == data


def test_padding_adds_rows_of_zeros_and_keeps_the_weight_of_the_model_output_last() -> None:
    assert TABLE.padded(3).coefficients == (
        ((1.0, 0.0, 0.0, -0.25), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0)),
        ((0.875, 0.125, 0.0, -0.5), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0)),
    )


@examples(25)
@given(table=solver_tables(), extra=st.integers(0, 3))
def test_a_padded_table_changes_nothing_but_the_coefficients_and_they_act_alike(table: SolverTable, extra: int) -> None:
    padded = table.padded(table.state_rows + extra)
    assert replace(padded, coefficients=table.coefficients) == table
    assert padded.state_rows == table.state_rows + extra
    rows = table.state_rows
    for small, large in zip(np.array(table.coefficients), np.array(padded.coefficients), strict=True):
        assert (large[:rows, :rows] == small[:, :rows]).all()
        assert (large[:rows, -1] == small[:, -1]).all()
        assert not large[rows:].any()
        assert not large[:, rows:-1].any()


def test_a_table_with_more_history_than_the_engines_keep_is_refused_with_both_sides() -> None:
    with pytest.raises(BundleError) as caught:
        TABLE.padded(1)
    assert "DEISMultistep-2 keeps a state of 2 rows" in str(caught.value)
    assert "exported for 1" in str(caught.value)
    assert "Export again with this schedule" in str(caught.value)
