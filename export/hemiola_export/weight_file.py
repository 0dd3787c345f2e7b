"""The weight file that all graphs of one precision share."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Final

from hemiola_runtime.artifacts import sha256_of

ALIGNMENT: Final = 256  # of weights within their file, in bytes


class WeightFile:
    """The weight file under construction; equal weights are stored once, whichever graphs they are in."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._end = 0

    def store(self, data: bytes) -> int:
        """Return the offset at which these bytes lie, and write them if they are new."""
        digest = sha256_of(data)
        if digest not in self._offsets:
            padding = bytes(-self._end % ALIGNMENT)
            self._offsets[digest] = self._end + len(padding)
            for part in (padding, data):
                self._file.write(part)
                self._digest.update(part)
            self._end += len(padding) + len(data)
        return self._offsets[digest]

    @property
    def sha256(self) -> str:
        """Digest of all that was written."""
        return self._digest.hexdigest()
