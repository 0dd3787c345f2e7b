from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from hemiola_runtime.errors import EngagementError
from hemiola_runtime.report import RunReport, TextReport, report_of
from hemiola_runtime.schedule import Schedule, read_schedule
from hemiola_runtime.slot import Ran

Forwards: TypeAlias = dict[str, tuple[str, ...]]

SCHEDULE: Final = read_schedule(Path(__file__).parent / "golden" / "schedule.json")  # FCSFCDFF
SEPARATE: Final[Forwards] = {name: (name,) for name in ("full", "deep", "tokens", "reuse")}
SEGMENTED: Final[Forwards] = SEPARATE | {"full": ("front", "deep")}
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


def ran_of(launches: list[tuple[str, float]]) -> Ran:
    """Return what is told of a trajectory that was launched engine by engine, with half a millisecond between two."""
    milliseconds = tuple(ms for _, ms in launches)
    return Ran(tuple(engine for engine, _ in launches), milliseconds, sum(milliseconds) + 0.5 * len(launches), None)


def report_on(
    launches: list[tuple[str, float]],
    schedule: Schedule = SCHEDULE,
    forwards: Forwards = SEPARATE,
    *,
    wall_ms: float = 100.0,
) -> RunReport:
    return report_of("fast", schedule, forwards, 3, ran_of(launches), wall_ms)


def test_the_report_says_what_ran_and_how_long_it_took() -> None:
    report = report_on(LAUNCHES)
    assert report == RunReport(
        schedule="fast",
        rhythm="FCSFCDFF",
        batch_size=3,
        counts={"conditioning": 1, "full": 4, "reuse": 2, "tokens": 1, "deep": 1, "vae_decoder": 1},
        engine_ms={"conditioning": 4.0, "full": 43.0, "reuse": 2.5, "tokens": 3.0, "deep": 5.0, "vae_decoder": 20.0},
        trajectory_ms=82.5,  # 77.5 in engines, and 10 halves
        wall_ms=100.0,
        graph_bytes=None,
        text=None,
        step_ms=(10.0, 1.0, 3.0, 11.0, 1.5, 5.0, 10.0, 12.0),
    )
    assert report.overhead == pytest.approx(0.225)  # 77.5 of 100 ms were spent in engines


def test_a_captured_trajectory_is_timed_as_a_whole() -> None:
    ran = Ran(tuple(engine for engine, _ in LAUNCHES), (), 80.0, 4096)
    report = report_of("fast", SCHEDULE, SEPARATE, 3, ran, 100.0)
    assert (report.rhythm, report.counts["full"], report.graph_bytes) == ("FCSFCDFF", 4, 4096)
    assert (report.engine_ms, report.step_ms, report.trajectory_ms) == ({}, (), 80.0)
    assert report.overhead == pytest.approx(0.2)


def test_the_report_says_what_became_of_the_prompts() -> None:
    text = TextReport(3, 1, truncated={"a very long story": 130}, unknown={"a pink cat": ("pink",)})
    report = report_of("fast", SCHEDULE, SEPARATE, 2, ran_of(LAUNCHES), 100.0, text)
    assert report == replace(report_on(LAUNCHES), batch_size=2, text=text)
    assert json.loads(json.dumps(asdict(report)))["text"] == {  # as `hemiola run --report` writes it
        "num_kept": 3,
        "num_encoded": 1,
        "truncated": {"a very long story": 130},
        "unknown": {"a pink cat": ["pink"]},
    }


def test_a_report_without_wall_time_has_no_overhead() -> None:
    assert report_on(LAUNCHES, wall_ms=0.0).overhead == 0


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
        report_on(launches)
    assert f"the schedule fast is FCSFCDFF, but {ran} ran" in str(caught.value)
    assert "please report it" in str(caught.value)


def test_a_run_that_computed_everything_is_the_uncached_schedule() -> None:
    launches = [("full", 1.0)] * 8
    assert report_on(launches, SCHEDULE.uncached()).rhythm == "FFFFFFFF"
    with pytest.raises(EngagementError, match="FCSFCDFF, but FFFFFFFF ran"):
        report_on(launches)


# forwards that are chains of engines


def _in_chains(launches: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Replace every launch of `full` by one of `front` and one of `deep`, a quarter and the rest of its time."""
    parts = {"full": (("front", 0.25), ("deep", 0.75))}
    return [(name, share * ms) for engine, ms in launches for name, share in parts.get(engine, ((engine, 1.0),))]


def test_a_front_followed_by_deep_is_a_full_step_and_deep_alone_is_not() -> None:
    report = report_on(_in_chains(LAUNCHES), forwards=SEGMENTED)
    assert report.rhythm == "FCSFCDFF"
    assert report.counts == {"conditioning": 1, "front": 4, "deep": 5, "reuse": 2, "tokens": 1, "vae_decoder": 1}
    # full took 43 ms: a quarter is front's, the rest deep's, which ran 5 ms alone
    assert (report.engine_ms["front"], report.engine_ms["deep"]) == (10.75, 32.25 + 5)
    assert report.step_ms == report_on(LAUNCHES).step_ms  # a step of two engines takes what both take


@pytest.mark.parametrize(
    ("engines", "rhythm"),
    [
        (["front", "deep", "deep", "deep"], "FDD"),
        (["front", "deep", "front", "deep"], "FF"),
        (["front", "deep", "reuse", "deep", "tokens", "front", "deep"], "FCDSF"),
        (["deep", "front", "deep"], "DF"),
        (["front", "reuse", "deep"], "?CD"),  # half a chain is no forward
        (["front", "deep", "front"], "F?"),
        (["front", "front", "deep"], "?F"),
    ],
)
def test_the_rhythm_is_read_off_chains(engines: list[str], rhythm: str) -> None:
    with pytest.raises(EngagementError, match=f"but {re.escape(rhythm)} ran"):
        report_on([(engine, 1.0) for engine in engines], forwards=SEGMENTED)


@pytest.mark.parametrize("engine", ["full", "front", "turbo"])
def test_an_engine_that_makes_up_no_forward_is_no_step(engine: str) -> None:
    uncached = SCHEDULE.uncached()
    forwards: Forwards = {"full": ("full",)} if engine != "full" else {"full": ("front", "deep")}
    with pytest.raises(EngagementError, match="FFFFFFFF, but  ran"):
        report_on([(engine, 1.0)] * 8, uncached, forwards)


def test_the_share_of_time_outside_engines_follows_the_wall_time() -> None:
    report = RunReport("fast", "F", 1, {"full": 1}, {"full": 30.0}, 36.0, 40.0, None)
    assert report.overhead == pytest.approx(0.25)  # 1 - 30 / 40
    assert replace(report, wall_ms=60.0).overhead == pytest.approx(0.5)
    assert replace(report, graph_bytes=1).overhead == pytest.approx(0.1)  # 1 - 36 / 40
