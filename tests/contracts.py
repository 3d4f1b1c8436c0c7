"""Contracts with the parts of libraries that `llava_accel/compat.py` reaches into."""

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def contract(function: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test of what `function` reads in a library: where it fails it says what broke, and where to look."""
    name, (promise, _, place) = function.__name__, inspect.cleandoc(function.__doc__ or "").partition("\n\n")
    library = place.split()[2]

    def held(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*arguments: Any, **fixtures: Any) -> None:
            try:
                test(*arguments, **fixtures)
            except Exception as error:
                raise AssertionError(
                    f"{library} {version(library)} broke compat.{name}: {promise}\n{type(error).__name__}: {error}\n"
                    f"Where to look: {place}"
                ) from error

        return run

    return held
