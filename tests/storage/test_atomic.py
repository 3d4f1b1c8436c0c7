"""A file of the cache is there as a whole or not at all."""

from pathlib import Path

import pytest

from llava_accel.storage.atomic import whole_file


def test_it_has_its_name_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with whole_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        assert not path.exists() and unfinished.parent == path.parent
        unfinished.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), whole_file(path) as unfinished:
        unfinished.write_bytes(b"half")
        raise OSError("full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
