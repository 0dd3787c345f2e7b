from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from hemiola_runtime.artifacts import (
    MadeBy,
    in_words,
    replacing_folder,
    sha256_of,
    write_bytes,
    write_text,
    write_together,
)
from hemiola_runtime.errors import HemiolaError


def _full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_written_with_the_folders_above_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(b"\x00\xff", path)
    assert path.read_bytes() == b"\x00\xff"
    assert _names(path.parent) == ["file.bin"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text("a longer first text", path)
    write_text("zweiter Text: ü", path)
    assert path.read_bytes() == "zweiter Text: ü".encode()
    assert _names(tmp_path) == ["file.txt"]


def test_a_written_file_can_be_read_by_everyone(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text("text", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def _write_and_raise(path: Path, error: type[BaseException]) -> NoReturn:
    with replacing_folder(path, "file.txt") as folder:
        (folder / "file.txt").write_text("new")
        raise error


FAULTS = [("fsync", _full_disk, OSError), ("fsync", _interrupted, KeyboardInterrupt)]


@pytest.mark.parametrize(("call", "fault", "error"), FAULTS, ids=["full disk", "interruption"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fault: Callable[..., NoReturn],
    error: type[BaseException],
) -> None:
    path = tmp_path / "file.txt"
    write_text("old", path)
    monkeypatch.setattr(os, call, fault)
    with pytest.raises(error):
        write_text("new", path)
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(("call", "fault", "error"), FAULTS, ids=["full disk", "interruption"])
def test_a_failed_first_write_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fault: Callable[..., NoReturn],
    error: type[BaseException],
) -> None:
    monkeypatch.setattr(os, call, fault)
    with pytest.raises(error):
        write_text("new", tmp_path / "file.txt")
    assert _names(tmp_path) == []


def test_a_file_that_cannot_take_its_place_leaves_no_temporary(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text("new", tmp_path / "taken")
    assert _names(tmp_path) == ["taken"]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "above" / "bundle"
    with replacing_folder(path, "file.txt") as folder:
        (folder / "file.txt").write_text("new")
        assert not path.exists()
    assert _contents(path) == {"file.txt": "new"}
    assert _names(path.parent) == ["bundle"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with replacing_folder(path, "both.txt") as folder:
        (folder / "old.txt").write_text("old")
        (folder / "both.txt").write_text("old")
    with replacing_folder(path, "both.txt") as folder:
        (folder / "both.txt").write_text("new")
        assert _contents(path) == {"old.txt": "old", "both.txt": "old"}  # until the block ends
    assert _contents(path) == {"both.txt": "new"}
    assert _names(tmp_path) == ["bundle"]


def test_a_relative_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with replacing_folder(Path("bundle"), "file.txt") as folder:
        monkeypatch.chdir(tmp_path / "elsewhere")
        (folder / "file.txt").write_text("new")
    assert _contents(tmp_path / "bundle") == {"file.txt": "new"}
    assert _names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_exception_in_the_block_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, error: type[BaseException], is_there: bool
) -> None:
    path = tmp_path / "bundle"
    if is_there:
        path.mkdir()
        (path / "file.txt").write_text("old")
    with pytest.raises(error):
        _write_and_raise(path, error)
    assert _names(tmp_path) == (["bundle"] if is_there else [])
    assert not is_there or _contents(path) == {"file.txt": "old"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("thesis")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("thesis")
    with pytest.raises(HemiolaError, match="Give another --out"), replacing_folder(path, "manifest.json"):
        pass
    assert (path if kind == "file" else path / "thesis.txt").read_text() == "thesis"
    assert _names(tmp_path) == ["precious"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with replacing_folder(tmp_path / "bundle", "file.txt") as folder:
        (folder / "file.txt").write_text("new")
    assert _contents(tmp_path / "bundle") == {"file.txt": "new"}


def test_of_files_that_belong_together_none_is_replaced_before_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    write_together({first: b"old", second: b"old"})
    calls = []

    def full_at_the_second(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        write_together({first: b"new", second: b"new"})
    assert _contents(tmp_path) == {"a.txt": "old", "b.txt": "old"}


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "file.txt").write_text("old")
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(OSError, match="No space left"), replacing_folder(path, "file.txt") as folder:
        write_text("new", folder / "file.txt")
    assert _contents(path) == {"file.txt": "old"}
    assert _names(tmp_path) == ["bundle"]


def test_a_new_folder_that_cannot_take_its_place_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    (path / "file.txt").write_text("old")
    replace = Path.replace

    def refuse_the_new(self: Path, target: Path) -> Path:
        if target == path and (self / "file.txt").read_text() == "new":
            raise PermissionError(errno.EPERM, "not now")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_the_new)
    with pytest.raises(PermissionError, match="not now"), replacing_folder(path, "file.txt") as folder:
        (folder / "file.txt").write_text("new")
    assert _contents(path) == {"file.txt": "old"}
    assert _names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (17_160_000, "17.2 MB"),
        (2_500_000_000, "2.5 GB"),
        (12_345_000_000_000, "12.3 TB"),
        (5_000_000_000_000_000, "5000.0 TB"),  # there is no larger unit
    ],
)
def test_sizes_are_written_as_people_read_them(num_bytes: int, text: str) -> None:
    assert in_words(num_bytes) == text


def test_the_digest_is_that_of_the_bytes_whatever_holds_them() -> None:
    # FIPS 180-2, appendix B.1: SHA-256 of "abc"
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(b"abc") == expected
    assert sha256_of(np.frombuffer(b"abc", dtype=np.uint8)) == expected
    assert sha256_of(b"") == hashlib.sha256().hexdigest()


def test_made_by_names_the_command_without_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/hemiola", "search", "--steps", "50"])
    assert MadeBy.here().command == "hemiola search --steps 50"


def test_made_by_names_the_versions_of_what_is_installed() -> None:
    made_by = MadeBy.here("numpy", "no-such-distribution")
    assert made_by.versions["numpy"] == np.__version__
    assert "no-such-distribution" not in made_by.versions
    assert made_by.versions["python"].count(".") == 2


def test_outside_a_checkout_there_is_no_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert MadeBy.here().git_revision is None


def test_without_git_there_is_no_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert MadeBy.here().git_revision is None
