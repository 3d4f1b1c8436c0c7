"""Trains a recipe as the verb does, with something bad at some places: `python drive_injected.py PLACES RECIPE`.

PLACES are module:function=BAD@CALL, with commas between them; BAD is a key of `BAD`, and CALL counts the calls of a process.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llava_accel.console.command_line import start


def _raise(error: BaseException) -> None:
    raise error


def _kill_worker() -> None:
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)


BAD = {
    "error": lambda: _raise(RuntimeError("injected")),
    "disk": lambda: _raise(OSError(5, "Input/output error")),
    "memory": lambda: _raise(torch.OutOfMemoryError("injected")),
    "python memory": lambda: _raise(MemoryError()),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "exit": lambda: sys.exit(7),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill worker": _kill_worker,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(600),
}


def inject(place: str, bad: str, call: int) -> None:
    """Put what is bad in front of a call of a function."""
    module_name, _, path = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *owners, name = path.split(".")
    for one in owners:
        owner = getattr(owner, one)
    original, calls = getattr(owner, name), iter(range(1, 10**6))

    def spoilt(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            if bad != "hangs":
                Path(os.environ["INJECTED"]).touch()
            BAD[bad]()
        return original(*arguments, **named)

    setattr(owner, name, spoilt)


if __name__ == "__main__":
    spoilings, sys.argv = sys.argv[1].split(","), ["train", *sys.argv[2:]]
    for spoiling in spoilings:
        place, _, what = spoiling.partition("=")
        bad, _, call = what.partition("@")
        inject(place, bad, int(call))
    start("train")
