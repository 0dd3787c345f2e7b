from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from hemiola_runtime.errors import EngagementError
from hemiola_runtime.report import RunReport, Tally
from hemiola_runtime.schedule import Schedule, read_schedule

SCHEDULE: Final = read_schedule(Path(__file__).parent / "golden" / "schedule.json")  # FCSFCDFF
LAUNCHES: Final = [
    ("conditioning", 4.0),
    ("full", 10.0),
    ("reuse", 1.0),
    ("tokens", 3.0),
    ("full", 11.0),
    ("reuse", 1.5),
    ("deep", 5.0),
    ("full", 10.0),
    ("full", 12.0),
    ("vae_decoder", 20.0),
]


def tally_of(launches: list[tuple[str, float]]) -> Tally:
    tally = Tally.empty()
    for engine, milliseconds in launches:
        tally.add(engine, milliseconds)
    return tally


def test_the_report_says_what_ran_and_how_long_it_took() -> None:
    report = tally_of(LAUNCHES).report("fast", SCHEDULE, batch_size=3, wall_ms=100.0)
    assert report == RunReport(
        schedule="fast",
        rhythm="FCSFCDFF",
        batch_size=3,
        counts={"conditioning": 1, "full": 4, "reuse": 2, "tokens": 1, "deep": 1, "vae_decoder": 1},
        engine_ms={"conditioning": 4.0, "full": 43.0, "reuse": 2.5, "tokens": 3.0, "deep": 5.0, "vae_decoder": 20.0},
        wall_ms=100.0,
    )
    # 4 + 43 + 2.5 + 3 + 5 + 20 = 77.5 of 100 ms were spent in engines
    assert report.overhead == pytest.approx(0.225)


def test_a_report_without_wall_time_has_no_overhead() -> None:
    report = tally_of(LAUNCHES).report("fast", SCHEDULE, batch_size=1, wall_ms=0.0)
    assert report.overhead == 0


def _without(launches: list[tuple[str, float]], index: int) -> list[tuple[str, float]]:
    return [launch for i, launch in enumerate(launches) if i != index]


@pytest.mark.parametrize(
    ("launches", "ran"),
    [
        (_without(LAUNCHES, 2), "FSFCDFF"),  # a step is missing
        ([*LAUNCHES, ("full", 1.0)], "FCSFCDFFF"),  # there is one more
        ([("full", 1.0) if engine == "reuse" else (engine, ms) for engine, ms in LAUNCHES], "FFSFFDFF"),  # no cache
        ([LAUNCHES[0], LAUNCHES[2], LAUNCHES[1], *LAUNCHES[3:]], "CFSFCDFF"),  # other order, same counts
        ([], ""),
    ],
)
def test_other_forwards_than_the_schedule_names_are_an_error_with_both_rhythms(
    launches: list[tuple[str, float]], ran: str
) -> None:
    with pytest.raises(EngagementError) as caught:
        tally_of(launches).report("fast", SCHEDULE, batch_size=1, wall_ms=1.0)
    assert f"the schedule fast is FCSFCDFF, but {ran} ran" in str(caught.value)
    assert "please report it" in str(caught.value)


def test_a_run_that_computed_everything_is_the_uncached_schedule() -> None:
    uncached: Schedule = SCHEDULE.uncached()
    launches = [("full", 1.0)] * 8
    assert tally_of(launches).report("full", uncached, 1, 10.0).rhythm == "FFFFFFFF"
    with pytest.raises(EngagementError, match="FCSFCDFF, but FFFFFFFF ran"):
        tally_of(launches).report("fast", SCHEDULE, 1, 10.0)


def test_counts_begin_empty_and_are_not_shared() -> None:
    first, second = Tally.empty(), Tally.empty()
    first.add("full", 1.0)
    assert (second.steps, dict(second.counts), second.engine_ms) == ([], {}, {})


def test_the_share_of_time_outside_engines_follows_the_wall_time() -> None:
    report = RunReport("fast", "F", 1, {"full": 1}, {"full": 30.0}, 40.0)
    assert report.overhead == pytest.approx(0.25)  # 1 - 30 / 40
    assert replace(report, wall_ms=60.0).overhead == pytest.approx(0.5)
