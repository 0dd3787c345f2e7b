"""Artifacts appear whole or not at all: they are written under a temporary name and renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

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
        versions = {"python": ".".join(map(str, sys.version_info[:3]))}
        for name in ("hemiola", *distributions):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(command, versions, _git_revision())


def _git_revision() -> str | None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    logger.info("wrote %s (%s)", path, in_words(len(data)))


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an exception.

    Otherwise it is removed, and what stood at `path` before stands there still.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a folder would replace this file; give another --out", str(path))
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
