"""Progress bars of the command line: on stderr, and only where that is a terminal."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm


class Bar:
    """A bar with a stage in words; a context manager."""

    def __init__(self, title: str, total: int | None = None, unit: str | None = None) -> None:
        self._title = title
        # Where nothing is counted, only what is being done, and since when.
        form = "{desc} [{elapsed}]" if unit is None else None
        self._bar = tqdm(
            total=total, desc=title, unit=unit or "", bar_format=form, disable=None, leave=True, dynamic_ncols=True
        )

    def advance(self, count: int = 1) -> None:
        """Count one, or several."""
        self._bar.update(count)

    def expect(self, count: int) -> None:
        """Say how many are left, from which follows how long they take."""
        self._bar.total = self._bar.n + count
        self._bar.refresh()

    def stage(self, text: str) -> None:
        """Say what is being done."""
        self._bar.set_description_str(f"{self._title}: {text}")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.set_description_str(self._title)
        self._bar.close()
