from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_runtime.codec import decode, encode, parse, write_json
from strategies import examples, finite, json_values


class Colour(str, Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float


@dataclass(frozen=True, slots=True)
class Drawing:
    points: tuple[Point, ...]
    pair: tuple[str, int]
    by_name: dict[str, Point]
    colour: Colour
    mode: Literal["thin", "thick", 1]
    frame: Point | None
    is_closed: bool
    extra: dict[str, Any]

    def __post_init__(self) -> None:
        if len(self.points) > 3:
            raise ValueError(f"{len(self.points)} points; a drawing has 3 at most")


VALID: dict[str, Any] = {
    "points": [{"x": 1, "y": 2.5}, {"x": 3, "y": 4.0}],
    "pair": ["a", 1],
    "by_name": {"centre": {"x": 0, "y": 0.0}},
    "colour": "blue",
    "mode": "thin",
    "frame": None,
    "is_closed": True,
    "extra": {"anything": [None, {"deep": 1.5}]},
}

DRAWING = Drawing(
    points=(Point(1, 2.5), Point(3, 4.0)),
    pair=("a", 1),
    by_name={"centre": Point(0, 0.0)},
    colour=Colour.BLUE,
    mode="thin",
    frame=None,
    is_closed=True,
    extra={"anything": [None, {"deep": 1.5}]},
)


def test_json_becomes_the_dataclass_it_describes() -> None:
    assert parse(Drawing, json.dumps(VALID), "file") == DRAWING


def test_a_dataclass_becomes_the_json_that_describes_it_with_its_fields_in_order() -> None:
    assert encode(DRAWING) == VALID
    assert list(VALID) == list(encode(DRAWING))  # type: ignore[arg-type]


drawings = st.builds(
    Drawing,
    points=st.lists(st.builds(Point, x=st.integers(), y=finite()), max_size=3).map(tuple),
    pair=st.tuples(st.text(), st.integers()),
    by_name=st.dictionaries(st.text(), st.builds(Point, x=st.integers(), y=finite()), max_size=2),
    colour=st.sampled_from(Colour),
    mode=st.sampled_from(["thin", "thick", 1]),
    frame=st.none() | st.builds(Point, x=st.integers(), y=finite()),
    is_closed=st.booleans(),
    extra=st.dictionaries(st.text(), json_values(), max_size=2),
)


@examples(20)
@given(drawing=drawings)
def test_what_is_written_reads_back_equal(drawing: Drawing, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("codec") / "drawing.json"
    write_json(drawing, path)
    assert parse(Drawing, path.read_bytes(), path.name) == drawing


@examples(50)
@given(number=finite())
def test_a_float_reads_back_bit_for_bit(number: float) -> None:
    assert parse(float, json.dumps(encode(number)), "file").hex() == number.hex()


def test_an_integer_is_taken_where_a_float_belongs() -> None:
    point = parse(Point, '{"x": 1, "y": 2}', "file")
    assert isinstance(point.y, float)


REFUSED = [
    ({"points": 1}, "file.points: expected a list, found 1"),
    ({"points": [{"x": 1, "y": 2.5}, {"x": 1.0, "y": 2.5}]}, "file.points[1].x: expected an integer, found 1.0"),
    ({"points": [{"x": True, "y": 2.5}]}, "file.points[0].x: expected an integer, found true"),
    ({"points": [{"x": 1, "y": "2.5"}]}, 'file.points[0].y: expected a finite number, found "2.5"'),
    ({"points": [{"x": 1, "y": False}]}, "file.points[0].y: expected a finite number, found false"),
    ({"points": [{"x": 1}]}, "file.points[0]: missing key 'y'"),
    ({"points": [{"x": 1, "y": 2.5, "z": 0}]}, "file.points[0]: unknown key 'z'; known are x, y"),
    ({"points": [[]]}, "file.points[0]: expected an object, found []"),
    ({"points": [{"x": 1, "y": 2.5}] * 4}, "file: 4 points; a drawing has 3 at most"),
    ({"pair": ["a"]}, 'file.pair: expected a list of 2, found ["a"]'),
    ({"pair": ["a", 1, 2]}, "file.pair: expected a list of 2"),
    ({"pair": [None, 1]}, "file.pair[0]: expected a string, found null"),
    ({"by_name": []}, "file.by_name: expected an object, found []"),
    ({"by_name": {"a": {"x": 0}}}, "file.by_name.a: missing key 'y'"),
    ({"colour": "green"}, "file.colour: expected one of 'red', 'blue', found \"green\""),
    ({"colour": ["red"]}, "file.colour: expected one of 'red', 'blue'"),
    ({"mode": "bold"}, "file.mode: expected one of 'thin', 'thick', 1, found \"bold\""),
    ({"mode": True}, "file.mode: expected one of"),  # True == 1, but is not the choice
    ({"mode": 1.0}, "file.mode: expected one of"),
    ({"frame": {"x": 1}}, "file.frame: missing key 'y'"),
    ({"is_closed": 1}, "file.is_closed: expected true or false, found 1"),
    ({"is_closed": None}, "file.is_closed: expected true or false, found null"),
    ({"extra": None}, "file.extra: expected an object, found null"),
    ({"colour": "x" * 100}, '"' + "x" * 56 + "..."),  # long values are cut
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_does_not_fit_is_refused_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^file") as caught:
        parse(Drawing, json.dumps(VALID | change), "file")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("1 2", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b'"\xc3\x28"', "not valid JSON"),
        ('{"x": NaN, "y": 0}', "NaN is not a number that JSON knows"),
        ('{"x": 0, "y": Infinity}', "Infinity is not a number that JSON knows"),
        ('{"x": 0, "y": -Infinity}', "-Infinity is not a number that JSON knows"),
        ('{"x": 0, "y": 1e999}', "file.y: expected a finite number"),
        ('{"x": 0, "x": 0, "y": 1}', "a key stands twice"),
        ('{"x": 0, "y": {"a": 1, "a": 1}}', "a key stands twice"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"^file") as caught:
        parse(Point, text, "file")
    assert message in str(caught.value)


@examples(100)
@given(data=json_values())
def test_only_value_errors_escape_from_arbitrary_json(data: Any) -> None:
    try:
        decoded = decode(Drawing, data, "file")
    except ValueError as error:
        assert str(error).startswith("file")  # noqa: PT017 - either outcome is right, if it says where
    else:
        assert encode(decoded) == data


def test_json_is_written_for_people_to_read(tmp_path: Path) -> None:
    write_json(Point(1, 2.5), tmp_path / "point.json")
    assert (tmp_path / "point.json").read_text() == '{\n "x": 1,\n "y": 2.5\n}\n'


def test_text_is_written_as_it_is_spelt(tmp_path: Path) -> None:
    write_json({"name": "Schrödinger"}, tmp_path / "name.json")
    assert "Schrödinger" in (tmp_path / "name.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_the_reader_would_refuse_is_not_written(number: float, tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    write_json(Point(1, 2.5), path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(Point(1, number), path)
    assert parse(Point, path.read_bytes(), "file") == Point(1, 2.5)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j])
def test_what_json_cannot_hold_is_a_fault_of_the_caller(value: object) -> None:
    with pytest.raises(AssertionError, match="cannot be written as JSON"):
        encode(value)
