"""What was evaluated before: one SQLite file, so that a search that was interrupted goes on where it was.

Every entry lies under a digest of all that its figures depend on. A file may hold the entries of many searches, and
several processes may use it at once.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from hemiola_search.errors import SearchError

TIMEOUT_SECONDS: Final = 60.0  # that one process waits for another to write


class Store:
    """Figures by key; a context manager. Every entry is on the disk when `put` returns."""

    def __init__(self, path: Path | None) -> None:
        """Open a file; one that is not there is made with the first entry. None keeps everything in memory.

        Raises:
            SearchError: it is no store.
        """
        self._path = path
        self._database = self._opened() if path is None or path.exists() else None

    def _opened(self) -> sqlite3.Connection:
        database = None
        try:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(":memory:" if self._path is None else self._path, timeout=TIMEOUT_SECONDS)
            with database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
                )
            return database
        except (sqlite3.Error, OSError) as error:
            if database is not None:
                database.close()
            raise SearchError(
                f"{self._path} cannot keep what is evaluated: {error}. Name another file with --store"
            ) from error

    def get(self, key: str) -> Any | None:
        """Return an entry, None if there is none.

        Raises:
            SearchError: the file is damaged.
        """
        if self._database is None:
            return None
        try:
            with closing(self._database.execute("SELECT value FROM entries WHERE key = ?", (key,))) as found:
                row = found.fetchone()
            return None if row is None else json.loads(row[0])
        except (sqlite3.Error, ValueError) as error:
            raise SearchError(
                f"{self._path} cannot tell what was evaluated: {error}. Remove it, or name another file with --store"
            ) from error

    def put(self, key: str, value: Any) -> None:
        """Keep an entry, JSON; of two under one key the later stays.

        Raises:
            SearchError: it cannot be written.
        """
        if self._database is None:
            self._database = self._opened()
        try:
            with self._database:
                self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, json.dumps(value)))
        except sqlite3.Error as error:
            raise SearchError(
                f"what was evaluated cannot be kept: {error}. Free some space, or name another --store"
            ) from error

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
