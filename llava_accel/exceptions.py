"""How a verb ends other than well: with an error that the user can mend, or because it was asked to end."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing.util import get_temp_dir
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT)
"""Signals with which schedulers, terminals and people end a job."""
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
"""The disk, or only the user's quota of it."""
EX_TEMPFAIL = 75
"""Exit code of a run that saved and ended because it was asked to: start the same command again (sysexits.h)."""


class UserError(ValueError):
    """Something that the user can mend: the message names the key or file, its value, and the remedy.

    Every other ValueError is a defect of this package and keeps its traceback.
    """


def in_short(error: BaseException) -> str:
    """The text of an error on one line of at most 300 characters."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


class Interrupted(Exception):
    """The run was asked to end, and all ranks know it."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received
        self.exit_code = 130 if received == signal.SIGINT else EX_TEMPFAIL


def end_at_once(received: signal.Signals, text: str) -> NoReturn:
    """End the process and its workers inside a signal's handler: an exception may be lost in the imports of a library."""
    interrupted = Interrupted(received)
    if os.environ.get("RANK", "0") == "0":
        print(f"{interrupted}: {text}", file=sys.stderr, flush=True)
    with contextlib.suppress(RuntimeError, OSError):  # the signal came in the middle of a line, or nobody reads
        sys.stdout.write("\x1b[?25h" if sys.stdout.isatty() else "")  # a bar hides the cursor
        sys.stdout.flush()
    has_workers = bool(multiprocessing.active_children())
    kill_workers()
    with contextlib.suppress(OSError):  # no room for a folder of sockets: so there is none
        if has_workers:  # nothing that is registered for the exit runs
            shutil.rmtree(get_temp_dir(), ignore_errors=True)
    os._exit(interrupted.exit_code)


def kill_workers() -> None:
    """End the data workers of this process: they ignore SIGTERM, by which multiprocessing would end them, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for an error
    for worker in multiprocessing.active_children():
        worker.kill()
