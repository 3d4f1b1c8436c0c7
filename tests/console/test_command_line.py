"""How a verb ends where its output does, and where the disk is full."""

import errno
import os
import sys

import pytest

from llava_accel.console.command_line import run


def test_output_that_nobody_reads_ends_a_verb_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("a line", "much " * 10_000):  # which is written at its end, or meanwhile
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as unread, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", unread)
            with pytest.raises(SystemExit) as ended:
                run(lambda text=text: print(text))
        assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_another_connection_that_breaks_is_a_defect() -> None:
    def breaks() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(breaks)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_defect(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fills() -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(SystemExit) as ended:
        run(fills)
    assert ended.value.code == 2 and f"error: {os.strerror(code)}. Check that the path" in capsys.readouterr().err
