"""Commands of a Python that has imported all before: a start takes four seconds of a core for the imports, and this none.

`Forked` is `subprocess.Popen` for `python -m MODULE ...`, `python FILE ...` and `python -c CODE ...`. A process waits that
has imported what a run needs, and started no thread; for each command a copy of it (fork) takes on arguments, variables,
folder, output and default signals, and runs the module as the interpreter would. Processes that the launchers of torch and
Accelerate start are copies in the same way, of the launcher. What comes before a module's first line stays unproved here:
every verb and way of launching has a test that starts the real command, too. Reports have frames in place of their plots,
as in conftest.py.
"""

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures.thread import _threads_queues as _pools  # pyright: ignore[reportAttributeAccessIssue]
from functools import cache
from pathlib import Path
from subprocess import Popen
from typing import Any

SAY_WHERE = signal.SIGRTMIN + 5
"""Such a process, asked so, writes where each of its threads is on its standard error."""
_SET_CHILD_SUBREAPER = 36  # of prctl
_MODULES = (
    "llava_accel.train",
    "llava_accel.pages.write",
    "llava_accel.runtime.launcher",
    "deepspeed",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
)


class Forked(Popen[str]):
    """A child of this process like any other."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        job, streams = _asked(args, rest)
        (link, _), libc = _waiting(), ctypes.CDLL(None)
        libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a process whose parent is gone becomes a child of this one
        try:
            socket.send_fds(link, [json.dumps(job).encode()], streams)
            self.pid = int(link.recv(100))
        finally:
            libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert self.pid, "the process has another parent"
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])  # pyright: ignore[reportAttributeAccessIssue]


class _Rank(Popen[str]):
    """A copy of the launcher that starts it."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        job, streams = _asked(args, rest)
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        code = 1
        try:
            _take_on(job, streams)
            _pools.clear()  # pyright: ignore[reportAttributeAccessIssue]  its threads are the launcher's
            _run(job["args"])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        try:  # as an interpreter ends, but not on into the launcher's frames, nor to what its threads hold
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _asked(args: Any, rest: Sequence[Any]) -> tuple[dict[str, Any], list[int]]:
    """A job, and its input, output and errors, from what subprocess hands to `_execute_child` behind the command:
    executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread, p2cwrite, c2pread,
    c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session, process_group.
    """
    job = {"args": list(args), "cwd": str(rest[4] or os.getcwd()), "env": dict(rest[5] or os.environ)}
    streams = [own if given == -1 else given for own, given in enumerate((rest[9], rest[12], rest[14]))]
    return job | {"parent": os.getpid(), "session": rest[20]}, streams


def run(command: list[str], how: type[Popen[str]] = Forked, **settings: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text."""
    with how(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@cache
def _waiting() -> tuple[socket.socket, Popen[bytes]]:
    """The way to the process that waits, which ends with this one, and that process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    few = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = Popen(command, env=os.environ | few, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours, process


def _serve(link: socket.socket) -> dict[str, Any] | None:
    """Returns in each new process, with its job; and at the end."""
    while True:
        message, streams, *_ = socket.recv_fds(link, 1 << 20, 3)
        if not message:
            return None
        between = os.fork()
        if not between:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:
                time.sleep(0.0005)
            job = json.loads(message)
            link.send(str(os.getpid() * (os.getppid() == job["parent"])).encode())
            link.close()
            _take_on(job, streams)
            return job
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)


def _take_on(job: dict[str, Any], streams: list[int]) -> None:
    """Be what a start would have made of this process."""
    if job["session"]:
        os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for stream, own in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, own)
    # New ones: the old know whether a file can be sought in that is no longer theirs.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    faulthandler.register(SAY_WHERE)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path[1:1] = [path for path in job["env"].get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    tempfile.tempdir = None


def _run(command: list[str]) -> None:
    """Run a command of this interpreter in this process."""
    assert command[0] == sys.executable, command
    sys.orig_argv, words = list(command), command[1:]
    if words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
        return
    if words[0] != "-m":
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.argv, sys.path[0] = words[1:], os.getcwd()
    if not hasattr(sys.modules.get(words[1]), "__path__"):  # a package's __main__ is run
        sys.modules.pop(words[1], None)  # a module is run as another than it would be imported as
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def _import_all() -> None:
    """As a verb does."""
    from llava_accel.console import command_line

    with command_line._quick_imports():
        for module in _MODULES:
            importlib.import_module(module)
    from markupsafe import Markup
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from llava_accel.pages import plots

    plots.drawn = lambda title, height, draw: Markup("<svg></svg>")
    subprocess_handler.Popen = _Rank  # pyright: ignore[reportPrivateImportUsage]
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _import_all()
    _job = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _job is not None:
        _run(_job["args"])
