"""How a verb ends where the disk is full, and where a connection breaks."""

import errno
import os

import pytest

from llava_accel.console.command_line import run


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_defect(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fills() -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(SystemExit) as ended:
        run(fills)
    assert ended.value.code == 2 and f"error: {os.strerror(code)}. Check that the path" in capsys.readouterr().err


def test_a_connection_that_breaks_is_a_defect() -> None:
    def breaks() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(breaks)
