from __future__ import annotations

import re

import pytest

from hemiola_runtime.schedule import KINDS
from hemiola_search.score import NOTES, in_words, note_id, score


@pytest.mark.parametrize("rhythm", ["F", "FCSCFC", "FDM1234", "FR¹²³⁴", "F" * 50, "FC" * 125])
def test_a_score_has_a_note_for_every_step_in_their_order(rhythm: str) -> None:
    drawn = "".join(score(rhythm))
    assert re.findall(r'href="#(note-.+?)"', drawn) == [note_id(letter) for letter in rhythm]


def test_every_kind_of_step_has_a_note_of_its_own() -> None:
    assert set(KINDS.values()) == set(NOTES)
    assert len({note_id(letter) for letter in NOTES}) == len(NOTES)
    assert all(note_id(letter).isascii() for letter in NOTES)


def test_full_steps_bear_their_numbers() -> None:
    drawn = "".join(score("FCCFSF1CCCCF"))
    assert re.findall(r">([0-9]+)</text>", drawn) == ["0", "3", "5", "11"]


@pytest.mark.parametrize(("num_steps", "lines"), [(5, 1), (10, 1), (11, 2), (50, 5)])
def test_a_bar_line_stands_before_every_tenth_step_and_a_double_one_at_the_end(num_steps: int, lines: int) -> None:
    drawn = "".join(score("F" * num_steps))
    assert drawn.count('class="barline"') == lines + 1
    assert drawn.count('class="end"') == 1
    assert 'class="end"' in score("F" * num_steps)[-1]


def test_a_line_can_be_broken_behind_every_fifth_step() -> None:
    bars = score("FCCCC" * 3 + "FC")
    assert [bar.count('<use href="#note-') for bar in bars] == [5, 5, 5, 2]
    widths = [int(re.findall(r'<svg width="(\d+)"', bar)[0]) for bar in bars]
    assert widths == [70, 70, 70, 34]  # 14 for each step, and 6 for the line at the end
    assert max(widths) < 358  # the room on a phone


def test_numbers_of_long_trajectories_have_room() -> None:
    bars = score("F" * 250)
    assert bars[0].startswith('<svg width="95"')  # 19 for each step


def test_letters_that_stand_for_nothing_have_no_note() -> None:
    assert "".join(score('F"<b>')).count("#note-") == 1


def _words(rhythm: str) -> str:
    return in_words(rhythm).replace("\N{NO-BREAK SPACE}", " ")


def test_a_rhythm_is_counted_in_words_the_most_frequent_first() -> None:
    assert _words("FCSCFC") == "3 × reuse, 2 × full, 1 × selected tokens"
    assert _words("F2221") == "3 × forecast of order 2, 1 × full, 1 × forecast of order 1"
