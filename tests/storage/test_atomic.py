"""Files and folders are there as a whole or not at all, and lines are read as they were written."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_accel.exceptions import DISK_IS_FULL
from llava_accel.storage.atomic import MANIFEST, atomic_file, beside, commit, is_complete, recover, remove
from llava_accel.storage.jsonl import read_json_lines, write_json_lines


def test_it_has_its_name_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        assert not path.exists() and unfinished.parent == path.parent
        unfinished.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), atomic_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        raise OSError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", DISK_IS_FULL)
def test_a_full_disk_is_said_with_the_file_that_has_no_room(tmp_path: Path, code: int) -> None:
    with pytest.raises(OSError) as full, atomic_file(tmp_path / "a.bin"):
        raise OSError(code, "no room")
    assert full.value.filename == str(tmp_path / "a.bin")
    with pytest.raises(OSError) as other, atomic_file(tmp_path / "a.bin"):
        raise OSError(errno.ECONNRESET, "gone")
    assert other.value.filename is None


def test_others_may_read_it_as_any_file_that_the_user_writes(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_file(tmp_path / "whole") as unfinished:
        unfinished.write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def put(target: Path, content: str, *, manifest: bool = True) -> None:
    unfinished = beside(target)
    (unfinished / "inner").mkdir()
    (unfinished / "inner" / "a.txt").write_text(content)
    commit(unfinished, target, manifest=manifest)


def test_a_folder_takes_the_place_of_another_and_of_an_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "best"
    target.mkdir()
    for content in ("old", "new"):
        put(target, content)
    assert (target / "inner" / "a.txt").read_text() == "new" and list(tmp_path.iterdir()) == [target]
    assert is_complete(target)


def test_a_folder_without_a_manifest_bears_no_mark(tmp_path: Path) -> None:
    put(tmp_path / "export", "text", manifest=False)
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["inner"]


@pytest.mark.parametrize("manifest", [None, '{"name": "a web page"}', "[1]"])
def test_what_was_not_written_here_keeps_its_place_and_its_name(tmp_path: Path, manifest: str | None) -> None:
    for name in ("best", "best.old", "best.tmp", "best.0123abcd.old", "best.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("precious")
        if manifest:
            (tmp_path / name / MANIFEST).write_text(manifest)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(OSError, match=f"without a {MANIFEST}"):
        put(tmp_path / "best", "ours")
    recover(tmp_path)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("manifest", ["", "{}", "[]", "null", "{", '{"inner/a.txt": 1}', "[" * 100_000, "\x00" * 50])
def test_a_manifest_that_lists_nothing_seals_nothing(tmp_path: Path, manifest: str) -> None:
    put(tmp_path / "step-000001", "text")
    (tmp_path / "step-000001" / MANIFEST).write_text(manifest)
    assert not is_complete(tmp_path / "step-000001")


@pytest.mark.parametrize("place", ["between the two renames", "behind them"])
def test_a_kill_while_a_folder_takes_anothers_place_leaves_one_of_them(tmp_path: Path, place: str) -> None:
    target = tmp_path / "best"
    put(target, "old")
    target.rename(tmp_path / "best.0123abcd.old")
    if place == "behind them":
        put(target, "new")
    beside(target)
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (target / "inner" / "a.txt").read_text() == ("old" if place == "between the two renames" else "new")


@pytest.mark.parametrize("last", range(5))
def test_a_kill_while_a_folder_is_removed_leaves_nothing_of_its_name_and_nothing_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    target = tmp_path / "step-000001"
    put(target, "text")
    (target / "a.txt").write_text("text")
    done = 0

    def until_killed(work: Callable[..., None]) -> Callable[..., None]:
        def counted(*place: Any, **how: Any) -> None:
            nonlocal done
            if done == last:
                raise KeyboardInterrupt
            done += 1
            work(*place, **how)

        return counted

    with monkeypatch.context() as killed:
        for name in ("unlink", "rmdir"):
            killed.setattr(os, name, until_killed(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            remove(target)
    assert not target.exists() and any(tmp_path.iterdir())
    recover(tmp_path)
    assert not any(tmp_path.iterdir())


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "text")
    (tmp_path / "step-000001").symlink_to(tmp_path / "elsewhere")
    remove(tmp_path / "step-000001")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and is_complete(tmp_path / "elsewhere")


def test_a_kill_before_a_new_folder_has_its_mark_leaves_nothing_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "best.0123abcd.tmp").mkdir()
    recover(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_line_may_be_damaged_only_where_a_run_may_have_been_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_json_lines([{"text": "one\u2028line"}], path)
    assert read_json_lines(path) == [{"text": "one\u2028line"}]
    path.write_text(path.read_text() + '{"text": "ha')
    assert read_json_lines(path, may_be_damaged=True) == [{"text": "one\u2028line"}]
    with pytest.raises(ValueError, match="Unterminated"):
        read_json_lines(path)
