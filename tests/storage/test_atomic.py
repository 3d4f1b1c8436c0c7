"""Files and folders are there as a whole or not at all, and lines are read as they were written."""

from pathlib import Path

import pytest

from llava_accel.storage.atomic import MANIFEST, atomic_file, beside, commit, is_complete
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


def test_others_may_read_it_as_any_file_that_the_user_writes(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_file(tmp_path / "whole") as unfinished:
        unfinished.write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("manifest", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, manifest: bool) -> None:
    target = tmp_path / "best"
    for content in ("old", "new"):
        unfinished = beside(target)
        (unfinished / "inner").mkdir()
        (unfinished / "inner" / "a.txt").write_text(content)
        commit(unfinished, target, manifest=manifest)
    assert (target / "inner" / "a.txt").read_text() == "new" and list(tmp_path.iterdir()) == [target]
    assert (target / MANIFEST).exists() == is_complete(target) == manifest


def test_only_the_last_line_may_be_cut_off_and_only_where_a_run_may_have_been_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_json_lines([{"text": "one\u2028line"}], path)
    assert read_json_lines(path) == [{"text": "one\u2028line"}]
    path.write_text(path.read_text() + '{"text": "ha')
    assert read_json_lines(path, may_be_cut=True) == [{"text": "one\u2028line"}]
    with pytest.raises(ValueError, match="Unterminated"):
        read_json_lines(path)
