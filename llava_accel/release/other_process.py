"""The process in which transformers and peft alone load an export (`plain_inference.py`): started, given a job, ended."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llava_accel import compat
from llava_accel.release import plain_inference

_LOOK_S = 0.2  # between two checks of whether this process was asked to end
_OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@contextmanager
def other_process() -> Iterator[subprocess.Popen[str]]:
    """A process that imports its libraries and then waits for a job; ended with the block, whatever it does then."""
    # This process's environment without the launcher's variables about ranks: the other process is alone.
    launched = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")
    environment = {
        key: value
        for key, value in compat.uncompiled().items()
        if key not in _OF_RANKS and not key.startswith(launched)
    }
    process = subprocess.Popen(
        # -P: the program's own folder holds modules of ours, which must not be found.
        [sys.executable, "-P", plain_inference.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # In a session of its own: a terminal sends Ctrl-C to all others, and this process decides what that means.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()  # closes its pipes


def computed(
    job: Path, process: subprocess.Popen[str], is_asked: Callable[[], bool]
) -> subprocess.CompletedProcess[str] | None:
    """Give the process a job, and return how it ended; None if this process was asked to end before."""
    line: str | None = f"{job}\n"
    while not is_asked():
        with suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(line, timeout=_LOOK_S)
            return subprocess.CompletedProcess(process.args, process.returncode, "", said)
        line = None  # it has been sent
    return None
