"""The lines that a person typed come back with the arrow keys, today and tomorrow, and nobody else reads them."""

import os
import pty
import select
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_accel.inference import typed
from llava_accel.inference.typed import kept_history, remember, typed_paths

readline = pytest.importorskip("readline", reason="this Python has no line editing")

_SESSION = """
import sys
from concurrent.futures import Future
from llava_accel import chat
from llava_accel.inference.typed import kept_history

class Echo:
    has_begun = False
    def ask(self, text, on_text):
        on_text(f"asked {text}")

opened = Future()
opened.set_result(Echo())
with kept_history():
    chat.talk(opened, ["weights: these"])
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the history, and an empty history before and after."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline.clear_history()
    yield tmp_path / "llava_accel" / "chat_history"
    readline.clear_history()


def test_lines_are_kept_for_the_user_alone(state: Path) -> None:
    with kept_history():
        remember("What is it?\n")
        remember("  \n")
    assert state.read_text().splitlines()[-1] == "What is it?"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600 and stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    readline.clear_history()
    with kept_history():
        assert readline.get_history_item(readline.get_current_history_length()) == "What is it?"


def test_a_history_that_others_could_read_is_closed_to_them(state: Path) -> None:
    state.parent.mkdir()
    state.touch(mode=0o644)
    with kept_history():
        remember("a secret")
    assert stat.S_IMODE(state.stat().st_mode) == 0o600


def test_a_place_that_cannot_be_written_is_no_reason_to_end(state: Path) -> None:
    state.parent.write_text("a file in the place of the folder")
    with kept_history():
        remember("Hello")
    assert state.parent.is_file()


def test_without_line_editing_a_chat_has_no_history(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "_line_editing", lambda: None)
    with kept_history():
        remember("Hello")
    assert not state.exists()


def _session(typed_text: bytes, until: bytes, folder: Path) -> bytes:
    """What a terminal shows of a chat in which somebody types this, up to the end or to `until`."""
    pid, master = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm", "XDG_STATE_HOME": str(folder), "INPUTRC": "/dev/null"})
        os.execv(sys.executable, [sys.executable, "-c", _SESSION])
    shown, end = b"", time.monotonic() + 60
    while until not in shown and time.monotonic() < end:
        if b"> " in shown and typed_text:
            os.write(master, typed_text)
            typed_text = b""
        if select.select([master], [], [], 0.2)[0]:
            try:
                shown += os.read(master, 4096)
            except OSError:  # the end of a pseudo-terminal
                break
    os.close(master)
    os.waitpid(pid, 0)
    return shown


@pytest.mark.slow
def test_the_arrow_key_brings_back_a_line_in_this_session_and_in_the_next(tmp_path: Path) -> None:
    shown = _session(b"first\n\x1b[A\n/quit\n", b"no such text", tmp_path)
    assert b"weights: these" in shown and shown.count(b"asked first") == 2, shown
    again = _session(b"\x1b[A\x1b[A\n/quit\n", b"no such text", tmp_path)
    assert again.count(b"asked first") == 1, again


@pytest.mark.parametrize("text", ["$HOME/a.png", "a 'b", "100%.png", r"back\slash.png", "#1.png"])
def test_a_name_that_exists_is_taken_as_it_stands(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(text).parent.mkdir(exist_ok=True)
    Path(text).touch()
    assert typed_paths(text) == [Path(text)]


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").touch()
    assert typed_paths("~/a.png") == [tmp_path / "a.png"] == typed_paths('"~/a.png"')


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.png", "a" * 5000, "a\0.png"])
def test_what_can_be_no_file_is_a_name_that_is_wrong(name: str) -> None:
    assert typed_paths(name) == [Path(name)]
