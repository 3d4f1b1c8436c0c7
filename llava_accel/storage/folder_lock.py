"""A lock of a folder: a file in it that says which process writes there, on any machine that shares the folder.

It needs no lock server. The file is made by a hard link, which only one process can make, over NFS too, and its time is
that of the file server. A process that was killed leaves the file: on the same machine its process number is looked up; on
another machine the file is watched, as a living holder touches it again and again.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from llava_accel.exceptions import UserError

LOCK = "run.lock"
_TOUCHED_EVERY_S = 15.0
_SILENCE_S = 180.0  # of a holder elsewhere, which then counts as dead; a pause of its file server is shorter
_SETTLE_S = 1.0  # two processes that take over the same lock see each other after that
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True)
class Holder:
    """The process that a lock belongs to."""

    host: str
    pid: int
    since: str
    machine: str
    """Equal where process numbers mean the same processes: one boot of one machine, one container."""
    started: str
    """When the process began, on the clock of that boot: process numbers are used again."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class FolderLock:
    """Keeps other processes from writing a folder, from `take` to `release` or to the end of this process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._own = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now().astimezone().isoformat(" ", "seconds"),
            machine=_machine(),
            started=_started(os.getpid()),
            token=uuid.uuid4().hex,
        )
        self._released = threading.Event()

    def take(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the lock, also one whose holder is dead.

        Args:
            say: Called if it has to wait for a sign of life from another machine.

        Raises:
            UserError: another process has it.
            OSError: the folder cannot be written.
        """
        while not self._made():
            holder, time_of_lock = _read(self._path)
            if time_of_lock is None:  # released meanwhile
                continue
            if holder is not None and holder.machine == self._own.machine:
                is_alive = _is_alive(holder)
            else:
                is_alive = self._shows_life(holder, time_of_lock, say)
            if is_alive:
                raise UserError(self._refusal(holder))
            if self._taken_over(holder):
                break
        threading.Thread(target=self._touch, daemon=True, name="lock").start()

    def release(self) -> None:
        """Remove the lock, if it is this process's own."""
        self._released.set()
        with suppress(OSError):  # the folder may be gone, and how the run ended must not be hidden by it
            if os.getpid() == self._own.pid and self._is_own():
                self._path.unlink()

    def _made(self) -> bool:
        with self._written() as mine:
            try:
                os.link(mine, self._path)
            except FileExistsError:
                return mine.stat().st_nlink == 2  # the answer to the first try may have been lost on its way
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._made_without_links()
        return True

    def _made_without_links(self) -> bool:
        try:
            with self._path.open("x") as file:
                json.dump(asdict(self._own), file)
        except FileExistsError:
            return False
        return True

    def _taken_over(self, dead: Holder | None) -> bool:
        with self._written() as mine:
            if _read(self._path)[0] != dead:
                return False
            os.replace(mine, self._path)
        time.sleep(_SETTLE_S)
        return self._is_own()

    @contextmanager
    def _written(self) -> Iterator[Path]:
        """The content of the lock under a name of its own, new on the file server's clock."""
        mine = self._path.with_name(f"{LOCK}.{self._own.token}.tmp")
        try:
            mine.write_text(json.dumps(asdict(self._own)))
            yield mine
        finally:
            mine.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        return _read(self._path)[0] == self._own

    def _shows_life(self, holder: Holder | None, touched: float, say: Callable[[str], None]) -> bool:
        """Whether the lock is touched or changes before it is so old that its holder counts as dead."""
        has_said, since = False, touched
        while True:
            with self._written() as mine:
                now = mine.stat().st_mtime
            since = min(since, now)  # a time in the future tells nothing
            age = now - since
            if age > _SILENCE_S:
                return False
            if not has_said:
                has_said = True
                left, whose = max(0.0, _SILENCE_S - age), holder or "another process"
                say(f"{self._path} belongs to {whose}: waiting up to {left:.0f} s for a sign of life")
            time.sleep(_SETTLE_S)
            holder_now, touched_now = _read(self._path)
            if touched_now is None:
                return False
            if holder_now != holder or touched_now != touched:
                return True

    def _refusal(self, holder: Holder | None) -> str:
        return (
            f"run.output_dir: {self._path.parent} is being written by {holder or 'another process'} ({self._path}). Wait "
            "until that run has ended, or end it; a second run needs a run.name or run.output_dir of its own"
        )

    def _touch(self) -> None:
        while not self._released.wait(_TOUCHED_EVERY_S):
            with suppress(OSError):  # the file server may be away for a while
                if not self._is_own() and not (_read(self._path)[1] is None and self._made()):
                    holder = _read(self._path)[0]
                    print(
                        f"error: {self._path} was taken over by {holder or 'another process'} while this process was "
                        "silent. It ends here and writes nothing more",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(2)
                os.utime(self._path)


def is_held(folder: Path) -> bool:
    """Whether a process, this one or another, writes the folder, judged by its lock."""
    holder, touched = _read(folder / LOCK)
    if touched is None:
        return False
    if holder is not None and holder.machine == _machine():
        return _is_alive(holder)
    return abs(time.time() - touched) <= _SILENCE_S


def is_lock(path: Path) -> bool:
    """Whether a file is a lock that was written here."""
    return path.name == LOCK and _read(path)[0] is not None


def _read(path: Path) -> tuple[Holder | None, float | None]:
    """The holder, None if the file does not tell; and when the file was touched, None if there is none."""
    try:
        with path.open("rb") as file:  # opening asks the file server anew
            content, touched = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None, None
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None, touched
    return holder if isinstance(holder.pid, int) else None, touched


def _machine() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists() and os.path.lexists(namespace):
        return f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return f"{uuid.getnode():x}"


def _is_alive(holder: Holder) -> bool:
    """Whether a process of this machine is there, and is the one that took the lock."""
    if not psutil.pid_exists(holder.pid):
        return False
    started = _started(holder.pid)
    return started != "dead" and ("" in (started, holder.started) or started == holder.started)


def _started(pid: int) -> str:
    """Ticks from the machine's boot to the start of a process; "dead" once it has ended, "" if that is not known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "dead" if state in "ZX" else fields[18]
