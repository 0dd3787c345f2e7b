"""What the folders of export and build have in common: paths that stay inside, and how their description is read."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TypeVar

from hemiola_runtime.codec import parse
from hemiola_runtime.errors import BundleError

T = TypeVar("T")


def check_path(path: str) -> None:
    """Make sure that a path names something within its folder.

    Raises:
        ValueError: it does not.
    """
    parts = PurePosixPath(path)
    is_inside = parts.parts and not parts.is_absolute() and ".." not in parts.parts and "\\" not in path
    if not is_inside or str(parts) != path or "\0" in path:
        raise ValueError(f"the path {path!r} leaves the bundle")


def read_description(kind: type[T], path: Path, mend: str) -> T:
    """Read the JSON file that describes a folder.

    Raises:
        BundleError: there is none, or it is not valid; the message ends with `mend`.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}. {mend}") from error
    try:
        return parse(kind, text, path.name)
    except ValueError as error:
        other = ": another release of Hemiola wrote it. Export and build again" if ".schema:" in str(error) else ""
        raise BundleError(f"{error}{other}. {mend}") from error
