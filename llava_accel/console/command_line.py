"""What all verbs share on the command line: recipe and overrides, and errors without a traceback."""

import argparse
import errno
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch.distributed

from llava_accel import compat
from llava_accel.console.output import printable
from llava_accel.exceptions import Interrupted, UserError
from llava_accel.recipe import Recipe, RecipeWarning, load_recipe


def recipe_parser(verb: str, description: str, example: str, *, needs_recipe: bool = True) -> argparse.ArgumentParser:
    """A parser that takes RECIPE and `table.key=value` overrides; `--help` shows a working example."""
    parser = argparse.ArgumentParser(
        prog=f"python -m llava_accel.{verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "a TOML file, for example recipes/okvqa_qlora.toml"
    parser.add_argument("recipe", metavar="RECIPE", nargs=None if needs_recipe else "?", help=about)
    parser.add_argument("overrides", metavar="table.key=value", nargs="*", help="change keys of the recipe")
    return parser


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with its overrides; keys that are set but have no effect are said on standard error.

    Raises:
        RecipeError: all problems at once.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RecipeWarning)
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    for warning in caught:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {warning.message}", file=sys.stderr)
    return recipe


def say_error(error: UserError | OSError) -> None:
    """Print what is wrong on standard error, with control characters written out."""
    text = str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror}. Check that the path is right, can be written, and has space left"
    print(f"error: {printable(text)}", file=sys.stderr)


def run(verb: Callable[[], object]) -> None:
    """Run a verb. What the user can mend ends with its message and exit code 2; defects of ours keep their traceback.

    A run that saved and ended because it was asked to has exit code 75 (`exceptions.EX_TEMPFAIL`), after Ctrl-C 130.
    """
    try:
        verb()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno != errno.ENOSPC:
            raise  # of no file of the user's: a defect of ours, or of a connection
        if os.environ.get("LLAVA_ACCEL_TRACEBACK"):
            traceback.print_exc()
        if is_reporting_rank():
            say_error(error)
        sys.exit(2)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    except Exception:
        if is_reporting_rank():
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


_KEY = "llava_accel/ended"
_HEAD_START = 1.0  # seconds that the others leave the speaker, before the launcher sees them end and ends it too
_LONGEST_START = 5.0  # seconds between the starts of two processes


def is_reporting_rank() -> bool:
    """Whether this rank, which ends with an error, is to say why. Call it once.

    The first to end is_reporting_rank; who loses its connection to it comes later, and has nothing to add. Before ranks are
    connected all meet the same errors (a recipe's): then the first of each machine is_reporting_rank.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left that it could wait for
    if torch.distributed.is_available() and torch.distributed.is_initialized():
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
