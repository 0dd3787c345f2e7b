"""Artifacts appear whole or not at all: they are written under a temporary name and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hemiola_runtime.errors import HemiolaError

Buffer: TypeAlias = Any  # whatever gives its bytes to hashlib: bytes, or an array

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MadeBy:
    """What made an artifact.

    Attributes:
        command: the command line, without the path of the program.
        versions: distribution → version, of everything that had a hand in it.
        git_revision: of the working directory, where it is a git checkout.
    """

    command: str
    versions: dict[str, str]
    git_revision: str | None

    @classmethod
    def here(cls, *distributions: str) -> MadeBy:
        """Describe the running process and the versions of the named distributions."""
        from importlib import metadata  # here, since it takes 20 ms to import and a service never needs it

        versions = {"python": ".".join(map(str, sys.version_info[:3]))}
        for name in ("hemiola", *distributions):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(command, versions, _git_revision())


def _git_revision() -> str | None:
    import subprocess  # as above

    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def sha256_of(data: Buffer) -> str:
    """Return the SHA-256 of a buffer, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file atomically: a full disk or an interruption leaves what was there before."""
    write_together({path: data})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: none of them is replaced before all of them are on the disk."""
    written: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            written[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written[path].chmod(0o644)
        for path, temporary in written.items():
            temporary.replace(path)
            logger.info("wrote %s (%s)", path, in_words(len(contents[path])))
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path, marker: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an exception.

    Otherwise it is removed, and what stood at `path` before stands there still.

    Args:
        path: where the folder will be.
        marker: a file that tells folders of this kind; one without it is somebody else's and is not replaced.

    Raises:
        HemiolaError: something else stands at `path`.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise HemiolaError(f"{path} is a file, where a folder would be written. Give another --out")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise HemiolaError(
            f"{path} holds files that are not Hemiola's (there is no {marker}), and would be replaced as a whole. "
            "Give another --out, or empty it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old)
            try:
                temporary.replace(path)
            except BaseException:
                old.replace(path)
                raise
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def in_words(num_bytes: int) -> str:
    """Write a size as people read it: `17.2 MB`."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
