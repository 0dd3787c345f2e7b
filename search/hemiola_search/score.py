"""Rhythms as scores: one note for each step, the higher the more of the model it computes."""

from __future__ import annotations

import unicodedata
from typing import Final

from markupsafe import Markup

HEIGHT: Final = 58  # of a bar, with the numbers of its steps
STEPS_OF_A_BAR: Final = 5
STEPS_OF_A_LINE: Final = 10  # between two bar lines
NOTE_WIDTH: Final = 14  # a note as it is drawn in the page
LONG_TRAJECTORY: Final = 100  # steps from which on numbers have three digits, and take more room
STAFF: Final = (8, 16, 24, 32, 40)  # heights of its lines

NOTES: Final[dict[str, str]] = {  # what each letter is, in the order of the legend
    "F": "full",
    "D": "deep blocks",
    "M": "masked layers",
    "S": "selected tokens",
    "C": "reuse",
    "1": "forecast of order 1",
    "2": "forecast of order 2",
    "3": "forecast of order 3",
    "4": "forecast of order 4",
    "R": "residual",
    "¹": "residual forecast of order 1",
    "²": "residual forecast of order 2",
    "³": "residual forecast of order 3",
    "⁴": "residual forecast of order 4",
}


def note_id(letter: str) -> str:
    """Return the id of a note's symbol, in letters that any page can refer to."""
    return f"note-{letter}" if letter.isascii() else f"note-R{unicodedata.digit(letter)}"


def score(rhythm: str) -> list[Markup]:
    """Draw a rhythm as bars of a few steps, so that a narrow page can break the line between any two.

    The notes themselves are symbols of the page: `note-F` and so on, and `staff`. Full steps have their number below.
    """
    width = NOTE_WIDTH if len(rhythm) <= LONG_TRAJECTORY else NOTE_WIDTH + 5
    return [_bar(rhythm, start, width) for start in range(0, len(rhythm), STEPS_OF_A_BAR)]


def _bar(rhythm: str, start: int, width: int) -> Markup:
    letters = rhythm[start : start + STEPS_OF_A_BAR]
    parts = [Markup('<use href="#staff"/>')]
    if start % STEPS_OF_A_LINE == 0:
        parts.append(Markup('<path class="barline" d="M.5 {}V{}"/>').format(STAFF[0], STAFF[-1]))
    for i, letter in enumerate(letters):
        left = i * width + (width - NOTE_WIDTH) / 2
        if letter in NOTES:
            parts.append(Markup('<use href="#{}" x="{:g}"/>').format(note_id(letter), left))
        if letter == "F":
            parts.append(Markup('<text x="{:g}" y="{}">{}</text>').format((i + 0.5) * width, HEIGHT - 2, start + i))
    right = len(letters) * width
    if start + len(letters) == len(rhythm):
        parts.append(
            Markup('<path class="end" d="M{0} {2}V{3}H{1}V{2}Z"/>').format(right + 3, right + 6, STAFF[0], STAFF[-1])
        )
        parts.append(Markup('<path class="barline" d="M{:g} {}V{}"/>').format(right + 0.5, STAFF[0], STAFF[-1]))
        right += 6
    svg = Markup('<svg width="{0}" height="{1}" viewBox="0 0 {0} {1}">{2}</svg>')
    return svg.format(right, HEIGHT, Markup("").join(parts))


def in_words(rhythm: str) -> str:
    """Count the notes of a rhythm, the most frequent first, as in `33 × forecast of order 2, 17 × full`."""
    counts = {letter: rhythm.count(letter) for letter in dict.fromkeys(rhythm)}
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(
        f"{count}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{NOTES.get(letter, letter)}" for letter, count in ordered
    )
