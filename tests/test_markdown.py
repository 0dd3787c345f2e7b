from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import done
from hemiola_runtime.codec import write_json
from hemiola_search.markdown import record_lines
from hemiola_search.record import CostSource
from records import FIGURES, point, record


def test_every_budget_has_a_table_that_a_page_of_markdown_can_hold() -> None:
    made = record(point("uniform"), point("taylorseer"), point("uniform", budget="2×", cost=20.0))
    lines = record_lines(made)
    assert [line for line in lines if line.startswith("Budget of ")] == [
        "Budget of 3 full: at most 31.00 ms per image",
        "Budget of 2×: at most 31.00 ms per image",
    ]
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            table = lines[i - 1 : i + 3]
            assert len({row.count("|") for row in table}) == 1
            assert lines[i - 2] == ""
            assert lines[i + 1] == "| uncached |  | 6 | 60.00 | 1.00× | 0 |  |"


def test_a_row_tells_cost_speed_up_error_and_interval() -> None:
    lines = record_lines(record())
    assert "| strategy | schedule | full steps | ms | speed-up | relative L2 (95 %) | PSNR |" in lines
    assert "| uniform (FORA) | as named | 3 | 30.00 | 2.00× | 0.0500 (0.0450–0.0550) | 31.3 dB |" in lines


def test_the_chosen_schedule_is_bold_and_named_first() -> None:
    lines = record_lines(record())
    assert lines[0] == "search of tiny, DDIM-6, guidance 3.5: FF1F11"
    assert lines[1].startswith("TaylorSeer “as named” was chosen; 5 schedules were tried on 20 images (quick)")
    bold = [line for line in lines if "**" in line]
    expected = [*("TaylorSeer", "as named", "3", "30.00", "2.00×"), "0.0100 (0.00900–0.0110)", "31.3 dB"]
    assert bold == ["| " + " | ".join(f"**{cell}**" for cell in expected) + " |"]


def test_what_was_searched_is_summed_up_in_a_line_for_each_strategy() -> None:
    errors = 0.01, 0.03, 0.02
    tried = [point("procache", "searched", error=error, name=str(error)) for error in errors]
    lines = record_lines(record(point("uniform"), point("uniform", "searched"), *tried))
    assert [line for line in lines if line.startswith("searched")] == [
        "searched: uniform (FORA), 1 tried, relative L2 0.0500",
        "searched: ProCache, 3 tried, relative L2 0.0100 to 0.0300",
    ]


def test_strategies_that_found_nothing_are_listed_with_their_reason() -> None:
    lines = record_lines(record(failures={"3 full": {"toca": "no interval keeps to 3 full"}}))
    assert "ToCa found nothing: no interval keeps to 3 full" in lines


def test_figures_of_a_judge_have_columns_where_there_is_one() -> None:
    judged = point("uniform", quality={**FIGURES, "agreement": 0.95, "frechet": 12.345})
    lines = record_lines(record(judged, point("taylorseer")))
    assert any(line.endswith("| relative L2 (95 %) | PSNR | agreement | Fréchet |") for line in lines)
    assert any(line.endswith("| 31.3 dB | 95.0% | 12.35 |") for line in lines)
    assert any(line.endswith("| **31.3 dB** |  |  |") for line in lines)


def test_names_cannot_break_a_table() -> None:
    lines = record_lines(record(point("uniform", name="a|b", error=0.3), point("taylorseer")))
    assert any(line.startswith("| uniform (FORA) | a\\|b | 3 |") for line in lines)


@pytest.mark.parametrize("unit", ["ms", "GFLOP"])
def test_inspect_prints_the_tables_of_a_record(unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = CostSource("ms", "here", ()) if unit == "ms" else CostSource("GFLOP", "", ())
    path = tmp_path / "search.json"
    write_json(record(costs=source), path)
    assert json.loads(path.read_text())["schema"] == 3
    said = done(capsys, "inspect", path)
    assert f"| full steps | {unit} | speed-up |" in said
    assert "\nCosts are " in said
