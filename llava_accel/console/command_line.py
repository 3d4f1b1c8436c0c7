"""What all verbs share on the command line: how they begin, recipe and overrides, and errors without a traceback.

A verb's arguments and its recipe are read before its module is imported, because that imports torch, which takes seconds:
neither help nor a mistake waits for it.
"""

import argparse
import errno
import gc
import importlib
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from llava_accel import compat
from llava_accel.console.output import LastingOutput, printable
from llava_accel.console.verbs import read_arguments
from llava_accel.exceptions import DISK_IS_FULL, SIGNALS, Interrupted, UserError, end_at_once
from llava_accel.own_code import explained


def start(verb: str) -> None:
    """Read the arguments of a verb and its recipe, import the module that does the work, and run its `main(arguments)`.

    Where the verb takes a recipe, `arguments.loaded` is what was read.
    """
    arguments = read_arguments(verb, sys.argv[1:])
    run(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> None:
    if getattr(arguments, "recipe", None) is not None:
        _read_recipe(arguments)
    with _ended_by_signals(), _quick_imports():
        module = importlib.import_module(arguments.module)
    module.main(arguments)


@contextmanager
def _quick_imports() -> Iterator[None]:
    """In the block no garbage is collected: imports leave none, and looking for it takes a fifth of their time.

    Later collections leave out what was imported, which saves a second when the process ends. Nor is any library's
    function compiled.
    """
    added = {name: value for name, value in compat.uncompiled().items() if name not in os.environ}
    gc.disable()
    os.environ |= added
    try:
        yield
    finally:
        for name in added:  # what libraries set as they are imported stays
            del os.environ[name]
        if not gc.get_freeze_count():  # a second verb of a process would keep the first one's garbage
            gc.freeze()
        gc.enable()


def _read_recipe(arguments: argparse.Namespace) -> None:
    """Put the recipe with its overrides into `arguments.loaded`, and name keys without effect on standard error.

    `check` goes on with the valid part of a recipe: its problems are printed, and put into `arguments.wrong`.

    Raises:
        RecipeError: all problems at once.
    """
    # Here, because pydantic takes as long as all of a verb's help.
    from llava_accel.recipe import RecipeError, RecipeWarning, load_recipe
    from llava_accel.recipe.paths import refuse_missing

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RecipeWarning)
        try:
            arguments.loaded = load_recipe(arguments.recipe, arguments.overrides)
            if arguments.reads_data:
                refuse_missing(arguments.loaded, arguments.recipe)
        except RecipeError as error:
            if not hasattr(arguments, "wrong") or error.rest is None:
                raise
            say_error(error)
            arguments.loaded, arguments.wrong = error.rest, error
    for warning in caught:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {warning.message}", file=sys.stderr)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """In the block, a signal ends the process at once: nothing has been done yet."""

    def end(number: int, _frame: FrameType | None) -> None:
        end_at_once(signal.Signals(number), "ended before anything was done")

    known = {one: signal.getsignal(one) for one in SIGNALS}
    for one, handler in known.items():
        if handler != signal.SIG_IGN:  # nohup ignores some, and shells do for jobs in the background
            signal.signal(one, end)
    try:
        yield
    finally:
        for one, handler in known.items():
            signal.signal(one, handler)


def say_error(error: UserError | OSError) -> None:
    """Print what is wrong on standard error, with control characters written out."""
    text = str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror}. Check that the path is right, can be written, and has space left"
    print(f"error: {printable(text)}", file=sys.stderr)


def run(verb: Callable[[], object]) -> None:
    """Run a verb. An error that the user can correct ends it with a message and exit code 2; our defects keep a traceback.

    A run that saved and ended because it was asked to has exit code 75 (`exceptions.EX_TEMPFAIL`), after Ctrl-C 130.
    """
    sys.stdin = sys.stdin or open(os.devnull)
    if isinstance(sys.stdin, io.TextIOWrapper):  # no character of a question or of an answer may end a command
        sys.stdin.reconfigure(errors="replace")
    if sys.stdout is sys.__stdout__ and type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = LastingOutput(sys.stdout)
    try:
        verb()
    except (UserError, OSError) as error:
        _ended_by[:] = [error]
        if isinstance(error, OSError) and error.filename is None and error.errno not in DISK_IS_FULL:
            raise  # not about a file of the user's: a defect of ours, or of a connection
        _refuse(error)
    except Interrupted as interrupted:
        _ended_by[:] = [interrupted]
        sys.exit(interrupted.exit_code)
    except SystemExit as exit:
        if (own := explained(exit)) is not None:
            _refuse(own)
        raise
    except Exception as error:
        _ended_by[:] = [error]
        if (end := compat.end_of_worker(error)) is not None:
            remedy = _MORE_FILES if os.strerror(errno.EMFILE) in str(error) else _MORE_MEMORY
            _refuse(UserError(f"a data worker {end}. {remedy}. The same command goes on from the last checkpoint"))
        if (own := explained(error)) is not None:
            _refuse(own)
        if is_reporting_rank(may_be_cut_off=True):
            raise
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        _ended_by[:] = [interrupt]
        sys.exit(130)


_MORE_FILES = "It may not have more files open: raise the limit (ulimit -n), or set data.workers = 0"
_MORE_MEMORY = (
    "If nobody killed it, the machine's memory was full; shared memory is /dev/shm, which containers keep small (docker run "
    "--shm-size=8g). Give it more, or set data.workers or train.per_device_batch_size lower"
)
_ended_by: list[BaseException] = []
"""What ended the verb. Its frames keep the loaders, which would wait five seconds for each worker that hangs, until the
workers have been killed at exit."""


def _refuse(error: UserError | OSError) -> NoReturn:
    if os.environ.get("LLAVA_ACCEL_TRACEBACK"):
        traceback.print_exc()
    if is_reporting_rank():
        say_error(error)
    sys.exit(2)


_KEY = "llava_accel/ended"
_HEAD_START = 1.0  # seconds: in them the first rank reports, and the launcher, which looks every 0.1 s, ends the others
_LONGEST_START = 5.0  # seconds between the starts of two processes


def is_reporting_rank(*, may_be_cut_off: bool = False) -> bool:
    """Whether this rank, which ends with an error, is the one to report it. Call it once.

    The first rank to end reports; one that loses its connection to it comes later, and has nothing to add. Before ranks
    are connected all meet the same errors (a recipe's): then the first rank of each machine reports.

    Args:
        may_be_cut_off: The error may be that another rank was killed. Then the launcher ends this one, and names that one.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to wait for
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        if may_be_cut_off:
            time.sleep(_HEAD_START)
        try:
            is_first = compat.count_up(_KEY) == 1
        except RuntimeError:  # the machine that kept it is gone
            return True
        if not is_first:
            time.sleep(_HEAD_START)
        return is_first
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_LONGEST_START)  # as a rule the launcher ends this process meanwhile
    return True
