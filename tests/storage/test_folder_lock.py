"""A folder has one writer; what a dead one leaves behind is recognised, wherever it ran."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llava_accel.exceptions import UserError
from llava_accel.storage import folder_lock
from llava_accel.storage.folder_lock import LOCK, FolderLock, is_held, is_lock

HOLD = """
import sys, time
from pathlib import Path
from llava_accel.storage.folder_lock import FolderLock
FolderLock(Path(sys.argv[1])).take()
print(1, flush=True)
time.sleep(60)
"""


def held(folder: Path, code: str = HOLD) -> "subprocess.Popen[str]":
    """A process that takes the lock, says so and sleeps."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the lock."""
    started = held(tmp_path)
    assert started.stdout is not None and started.stdout.readline()
    yield started
    started.kill()
    started.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_SETTLE_S", 0.05), ("_SILENCE_S", 1.0), ("_TOUCHED_EVERY_S", 0.1)):
        monkeypatch.setattr(folder_lock, name, seconds)


def left_by(folder: Path, **changes: object) -> None:
    """A lock of a process that no longer touches it."""
    own = FolderLock(folder)._own
    (folder / LOCK).write_text(json.dumps({**vars(own), "token": "other", **changes}))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        FolderLock(folder).take()
    return str(caught.value)


def test_the_second_process_is_told_who_writes(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    text = refused(tmp_path)
    assert f"process {holder.pid} on {os.uname().nodename} since 20" in text and "run.name" in text
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_it_is_free_again_after_a_release(tmp_path: Path) -> None:
    for _ in range(2):
        lock = FolderLock(tmp_path)
        lock.take()
        assert is_lock(tmp_path / LOCK)
        lock.release()
        assert not list(tmp_path.iterdir())


def test_that_of_a_killed_process_is_taken_over_though_nobody_has_waited_for_it(
    tmp_path: Path, holder: "subprocess.Popen[str]", quick: None
) -> None:
    holder.kill()
    time.sleep(0.2)  # it is a zombie now
    lock = FolderLock(tmp_path)
    lock.take()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},
        {"started": "1"},
        {"machine": "an earlier start", "host": "here"},
        {"machine": "m", "host": "far"},
    ],
    ids=["no such process", "a number that was given out again", "a reboot", "another machine that is dead"],
)
def test_a_stale_one_is_taken_over(tmp_path: Path, quick: None, changes: dict[str, object]) -> None:
    left_by(tmp_path, **changes)
    said: list[str] = []
    lock = FolderLock(tmp_path)
    lock.take(said.append)
    assert ("machine" in changes) == any("waiting up to" in text for text in said)
    lock.release()


def test_one_that_cannot_be_read_counts_by_its_age(tmp_path: Path, quick: None) -> None:
    for content in ("", "{", "[]", "null", "\x00\x00", '{"pid": 1}'):
        (tmp_path / LOCK).write_text(content)
        assert not is_lock(tmp_path / LOCK), content
    lock = FolderLock(tmp_path)
    lock.take()
    lock.release()


def test_another_machine_that_lives_is_recognised_by_its_touch(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = FolderLock(tmp_path)
    far._own = replace(far._own, machine="far", host="far")
    far.take()
    assert "on far since" in refused(tmp_path)
    far.release()
    FolderLock(tmp_path).take()


def test_of_two_that_take_over_the_same_lock_one_has_it(tmp_path: Path) -> None:
    left_by(tmp_path, pid=2**22 + 1)
    started = [held(tmp_path) for _ in range(3)]
    deadline = time.monotonic() + 30
    while sum(one.poll() is None for one in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    winners = [one for one in started if one.poll() is None]
    assert len(winners) == 1
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == winners[0].pid
    winners[0].kill()
    for one in started:
        one.communicate()


@pytest.mark.parametrize("code", folder_lock._NO_LINKS)
def test_a_file_system_without_links_has_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refusing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refusing)
    lock = FolderLock(tmp_path)
    lock.take()
    assert "is being written by process" in refused(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_comes_back_while_its_holder_lives(tmp_path: Path, quick: None) -> None:
    lock = FolderLock(tmp_path)
    lock.take()
    (tmp_path / LOCK).unlink()
    time.sleep(0.5)
    assert "is being written by process" in refused(tmp_path)
    lock.release()


def test_a_holder_whose_lock_was_taken_over_ends_before_it_writes_again(tmp_path: Path) -> None:
    code = f"from llava_accel.storage import folder_lock; folder_lock._TOUCHED_EVERY_S = 0.1{HOLD}"
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stdout.readline()
    left_by(tmp_path, host="far", machine="far")
    _, said = started.communicate(timeout=20)
    assert started.returncode == 2 and "was taken over by process" in said


def test_a_lock_from_the_future_is_waited_for_no_longer_than_others(tmp_path: Path, quick: None) -> None:
    left_by(tmp_path, machine="another", host="far")
    os.utime(tmp_path / LOCK, (time.time() + 86400, time.time() + 86400))
    said, since = list[str](), time.monotonic()
    lock = FolderLock(tmp_path)
    lock.take(said.append)
    lock.release()
    assert 1.0 <= time.monotonic() - since < 10
    assert len(said) == 1 and "up to 1 s" in said[0]


def test_a_lock_from_the_future_is_held_by_nobody(tmp_path: Path) -> None:
    left_by(tmp_path, machine="another", host="far")
    assert is_held(tmp_path)
    os.utime(tmp_path / LOCK, (time.time() + 86400, time.time() + 86400))
    assert not is_held(tmp_path)
