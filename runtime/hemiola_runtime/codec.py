"""Frozen dataclasses to JSON and back, strictly: unknown keys, missing keys and wrong types are errors.

It knows nothing of schedules or bundles; `schedule.py`, `manifest.py` and `solver_table.py` are its users.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from hemiola_runtime.artifacts import write_bytes

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
T = TypeVar("T")


def encode(value: Any) -> Json:
    """Turn a dataclass, and whatever it holds, into what `json` writes; fields keep their order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return encode(value.value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    assert value is None or isinstance(value, str | int | float | bool), f"{value!r} cannot be written as JSON"
    return value


def decode(kind: Any, data: Any, where: str) -> Any:
    """Turn parsed JSON into `kind`, a dataclass or any type that fields of one are annotated with.

    Args:
        kind: dataclass, Enum, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, `Literal`, or a JSON scalar.
        data: what `json.loads` gave.
        where: the path of `data` within the file, for messages, as in `schedule.json: steps[3]`.

    Raises:
        ValueError: `data` does not fit `kind`; the message begins with `where`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), data, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(arguments, data, where)
    if origin is typing.Literal:
        if not any(data == choice and type(data) is type(choice) for choice in arguments):
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, arguments))}, found {_show(data)}")
        return data
    if origin is tuple:
        _expect(isinstance(data, list), "a list", data, where)
        if arguments[-1] is Ellipsis:
            return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _expect(len(data) == len(arguments), f"a list of {len(arguments)}", data, where)
        return tuple(decode(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, data, strict=True)))
    if origin is dict:
        _expect(isinstance(data, dict), "an object", data, where)
        return {_text(key, where): decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = {choice.value: choice for choice in kind}
        _expect(isinstance(data, str) and data in choices, f"one of {', '.join(map(repr, choices))}", data, where)
        return choices[data]
    return _decode_scalar(kind, data, where)


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), "an object", data, where)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if "schema" in hints and "schema" in data:  # the first thing to be wrong about a file of another release
        decode(hints["schema"], data["schema"], f"{where}.schema")
    if unknown := sorted(set(data) - set(names)):
        raise ValueError(f"{where}: unknown key {', '.join(map(repr, unknown))}; known are {', '.join(names)}")
    if missing := [name for name in names if name not in data]:
        raise ValueError(f"{where}: missing key {', '.join(map(repr, missing))}")
    values = {name: decode(hints[name], data[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _decode_union(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    failures = []
    for choice in choices:
        try:
            return decode(choice, data, where)
        except ValueError as error:
            failures.append(str(error))
    raise ValueError(failures[0])


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is None or kind is type(None):
        _expect(data is None, "null", data, where)
        return None
    if kind is float:
        is_number = isinstance(data, int | float) and not isinstance(data, bool)
        _expect(is_number and abs(data) <= sys.float_info.max, "a finite number", data, where)
        return float(data)
    names: dict[Any, str] = {str: "a string", int: "an integer", bool: "true or false"}
    assert kind in names, f"no codec for {kind}"
    _expect(type(data) is kind, names[kind], data, where)
    return _text(data, where) if kind is str else data


def _text(text: str, where: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text!r} is not valid text") from error
    return text


def _expect(holds: bool, what: str, data: Any, where: str) -> None:
    if not holds:
        raise ValueError(f"{where}: expected {what}, found {_show(data)}")


def _show(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 60 else text[:57] + "..."


def parse(kind: type[T], text: str | bytes, where: str) -> T:
    """Read `kind` from JSON text.

    Raises:
        ValueError: the text is not JSON, or does not fit `kind`.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{where}: {constant} is not a number that JSON knows")

    try:
        data = json.loads(text, parse_constant=refuse, object_pairs_hook=_without_duplicates(where))
        result: T = decode(kind, data, where)
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    return result


def _without_duplicates(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError(f"{where}: a key stands twice in one object")
        return made

    return build


def as_json(value: Any) -> bytes:
    """Write a dataclass as JSON that is easy to read and to compare."""
    return (json.dumps(encode(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(value: Any, path: Path) -> None:
    """Write a dataclass as JSON, atomically."""
    write_bytes(as_json(value), path)
