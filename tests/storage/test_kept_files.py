"""A cache is where the user wants it, and is no reason for a run to end."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_accel.exceptions import UserError
from llava_accel.storage import kept_files
from llava_accel.storage.kept_files import cache_folder, contents, store, stored


def test_the_cache_is_where_the_recipe_or_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "llava_accel"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "llava_accel"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llava_accel"
    assert cache_folder(str(tmp_path / "own")) == tmp_path / "own"
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("home", ["none", "a file"])
def test_without_a_home_it_is_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kept_files.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    if home == "none":
        monkeypatch.setattr(Path, "home", _no_home)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "tmp" / f"llava_accel-{os.getuid()}"
    assert str(tmp_path / "tmp") in capsys.readouterr().err


def test_a_folder_that_somebody_else_has_made_there_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(kept_files.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", _no_home)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"llava_accel-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*cannot be used"):
        cache_folder()


def test_a_user_without_an_entry_and_without_a_home_is_served(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "XDG_CACHE_HOME")}
    code = "from llava_accel.storage.kept_files import cache_folder; print(cache_folder())"
    command = ["unshare", "--user", "--map-user=54321", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"TMPDIR": str(tmp_path)})
    if "unshare" in done.stderr:
        pytest.skip("no namespaces here")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "llava_accel-54321"), done.stderr


def test_a_damaged_file_is_said_and_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "number"
    assert stored(path, lambda path: int(path.read_text())) is None
    assert capsys.readouterr().err == ""
    path.write_text("1x")
    assert stored(path, lambda path: int(path.read_text())) is None
    assert str(path) in capsys.readouterr().err
    assert store(path, lambda path: path.write_text("2"))
    assert stored(path, lambda path: int(path.read_text())) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_refuses_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int) -> None:
    def refusing(_path: Path) -> None:
        raise OSError(code, os.strerror(code))

    for _ in range(2):
        assert not store(tmp_path / f"file{code}", refusing)
    assert capsys.readouterr().err.count(os.strerror(code)) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_is_no_content(tmp_path: Path) -> None:
    ours = ("tables/" + "0" * 20 + ".arrow", "features/tower/" + "a" * 32 + ".safetensors", "towers/" + "b" * 64)
    for name in (*ours, "tables/my.arrow", "features/tower/model.safetensors", "a.arrow", "features/lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted(file for some in contents(tmp_path).values() for file in some) == sorted(tmp_path / n for n in ours)
