from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemiola_search.errors import SearchError
from hemiola_search.store import Store
from strategies import examples, finite

ENTRY: Final = {"samples": {"relative_l2": [0.1, 0.2]}, "totals": {}, "path": [0.5]}


def entries() -> st.SearchStrategy[dict[str, Any]]:
    figures = st.dictionaries(st.sampled_from(["relative_l2", "psnr"]), st.lists(finite(), min_size=1, max_size=3))
    return st.fixed_dictionaries({"samples": figures, "totals": st.just({}), "path": st.lists(finite(), max_size=3)})


@given(kept=st.dictionaries(st.text(max_size=8), entries(), max_size=4))
@examples(10)
def test_what_was_kept_comes_back_to_the_last_bit(
    kept: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("store") / "search.sqlite"
    with Store(path) as store:
        for key, value in kept.items():
            store.put(key, value)
    with Store(path) as store:
        assert {key: store.get(key) for key in kept} == kept
        assert store.get("another key") is None


def test_of_two_entries_under_one_key_the_later_stays() -> None:
    with Store(None) as store:
        store.put("key", 1)
        store.put("key", 2)
        assert store.get("key") == 2


def test_a_file_is_made_with_its_first_entry_and_its_folder_too(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "search.sqlite"
    with Store(path) as store:
        assert store.get("key") is None
        assert list(tmp_path.iterdir()) == []
        store.put("key", ENTRY)
        assert path.is_file()


def test_a_store_in_memory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store(None) as store:
        store.put("key", ENTRY)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_on_the_disk_when_it_was_put(tmp_path: Path) -> None:
    """What a process has put is there for others while it still runs, and after it was killed."""
    path = tmp_path / "search.sqlite"
    with Store(path) as mine, Store(path) as other:
        mine.put("key", ENTRY)
        other.put("other key", ENTRY)
        assert other.get("key") == mine.get("other key") == ENTRY
    code = "import os, sys; from pathlib import Path; from hemiola_search.store import Store; "
    code += "Store(Path(sys.argv[1])).put('of a process', 3); os._exit(9)"
    ran = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert ran.returncode == 9
    with Store(path) as store:
        assert (store.get("of a process"), store.get("key")) == (3, ENTRY)


MANY: Final = """
import sys
from pathlib import Path
from hemiola_search.store import Store
with Store(Path(sys.argv[1])) as store:
    for i in range(20):
        store.put(f"{sys.argv[2]} {i}", i)
        store.put("shared", i)
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "search.sqlite"
    command = [sys.executable, "-c", MANY, str(path)]
    writers = [subprocess.Popen([*command, name]) for name in ("first", "second")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    with Store(path) as store:
        assert [store.get(f"{name} {i}") for name in ("first", "second") for i in range(20)] == [*range(20)] * 2
        assert store.get("shared") == 19


def _of_something_else(path: Path) -> None:
    path.write_bytes(b"This is a letter, and no database. " * 100)


def _a_folder(path: Path) -> None:
    path.mkdir()


def _with_another_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE entries (name TEXT)")


def _cut(path: Path) -> None:
    with Store(path) as store:
        for i in range(20):
            store.put(str(i), "x" * 1000)
    path.write_bytes(path.read_bytes()[:6000])


def _with_half_an_entry(path: Path) -> None:
    with Store(path) as store:
        store.put("7", ENTRY)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE entries SET value = substr(value, 1, 9)")


@pytest.mark.parametrize("damage", [_of_something_else, _a_folder, _with_another_table, _cut, _with_half_an_entry])
def test_a_file_that_is_no_store_or_damaged_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "search.sqlite"
    damage(path)
    with pytest.raises(SearchError, match=r"cannot (keep|tell) what .* another file with --store") as raised:
        _read_all(path)
    assert str(path) in str(raised.value)


def _read_all(path: Path) -> None:
    with Store(path) as store:
        for i in range(20):
            store.get(str(i))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Store(tmp_path / "file" / "search.sqlite") as store, pytest.raises(SearchError, match="cannot keep what"):
        store.put("key", ENTRY)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with Store(tmp_path / "search.sqlite") as store:
        store.put("key", ENTRY)
        assert store._database is not None
        store._database.execute("PRAGMA max_page_count = 3")
        with pytest.raises(SearchError, match=r"cannot be kept: .*full.*Free some space"):
            store.put("large", "x" * 100_000)
        assert store.get("key") == ENTRY
