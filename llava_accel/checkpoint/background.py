"""Work that is done while the next steps run, and the main memory that is free for the copies that it takes."""

import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import psutil

WORTH_IT = 256 << 20
"""From this many bytes per process on, "auto" writes in the background: fewer are written before a step is over."""
SHARE_OF_FREE = 0.8
"""Share of the free main memory that the copies may take. Data workers and cached pages of files need the rest."""


class Background:
    """Does one piece of work after the other while the process goes on."""

    def __init__(self) -> None:
        self._last = futures.Future[None]()
        self._last.set_result(None)

    @property
    def is_busy(self) -> bool:
        """Whether there is work that is not done."""
        return not self._last.done()

    def start(self, work: Callable[[], object]) -> None:
        """Do some work as soon as all earlier work is done. If that raised an error, this work fails with it."""
        before, done = self._last, futures.Future[None]()

        def run() -> None:
            try:
                before.result()
                work()
                done.set_result(None)
            except Exception as error:  # the main thread raises it
                done.set_exception(error)

        # A daemon: whoever presses Ctrl-C twice does not wait for it.
        threading.Thread(target=run, daemon=True, name="checkpoints").start()
        self._last = done

    def wait(self, seconds: float) -> bool:
        """Wait until all is done, but at most `seconds`; returns whether it is."""
        return not futures.wait([self._last], seconds).not_done

    def finish(self) -> None:
        """Wait until all is done, and raise what it has raised."""
        self._last.result()


def free_main_memory() -> int:
    """Bytes that are free on this machine, or in the container or job that this process belongs to, if that has fewer."""
    left = _left_of_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return min([psutil.virtual_memory().available, *left])


def _left_of_limits(root: Path, own: Path) -> list[int]:
    """Bytes that the limits of a process's control group, and of those above it, leave.

    Args:
        root: Where control groups are.
        own: The file that names the process's own.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    group = root / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    left: list[int] = []
    for each in (group, *group.parents):
        limit = each / "memory.max"
        if each.is_relative_to(root) and limit.is_file() and (most := limit.read_text().strip()) != "max":
            counts = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
            used = int((each / "memory.current").read_text()) - int(counts["inactive_file"])  # cache, which gives way
            left.append(int(most) - used)
    return left
