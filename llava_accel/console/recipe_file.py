"""The recipe that a command line names."""

import argparse
import os
import sys
import warnings

from llava_accel.console.command_line import say_error
from llava_accel.recipe import RecipeError, RecipeWarning, load_recipe


def read_recipe(arguments: argparse.Namespace) -> None:
    """Put the recipe with its overrides into `arguments.loaded`; keys that have no effect are said on standard error.

    `check` goes on with what is right in a recipe: there, what is wrong with it is said, and put into `arguments.wrong`.

    Raises:
        RecipeError: all problems at once.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RecipeWarning)
        try:
            arguments.loaded = load_recipe(arguments.recipe, arguments.overrides)
        except RecipeError as error:
            if not hasattr(arguments, "wrong") or error.rest is None:
                raise
            say_error(error)
            arguments.loaded, arguments.wrong = error.rest, error
    for warning in caught:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {warning.message}", file=sys.stderr)
