"""How a verb ends where the disk is full, where a connection breaks, and where a data worker ends."""

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


@pytest.mark.parametrize(
    ("code", "remedy", "other"), [(errno.EMFILE, "ulimit -n", "--shm-size"), (errno.ENOSPC, "--shm-size", "ulimit -n")]
)
def test_a_worker_that_cannot_send_says_what_it_lacked(
    code: int, remedy: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks() -> None:
        raise RuntimeError(f"unable to open shared memory object </torch_1> in read-write mode: {os.strerror(code)}")

    with pytest.raises(SystemExit):
        run(lacks)
    said = capsys.readouterr().err
    assert said.startswith("error: a data worker was unable to open shared memory. ")
    assert remedy in said and other not in said
