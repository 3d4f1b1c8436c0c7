"""Checks of types at run time as jaxtyping makes them, and without its work where no type names an array's shape."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial, wraps
from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any, Literal, get_args, get_origin
from unittest.mock import patch

import jaxtyping
from jaxtyping import _array_types, _import_hook


def quicken() -> None:
    """Before a module of ours is imported."""
    # As it comes, all that such a module imports is looked for under that name too, not found, and compiled anew: torch
    # and the others take twice as long.
    del _import_hook._JaxtypingLoader.exec_module
    _import_hook._JaxtypingLoader.get_code = _typed_code
    jaxtyping.jaxtyped = partial(_checked, jaxtyping.jaxtyped)


def _typed_code(self: Any, fullname: str) -> CodeType | None:
    """The code of a module of ours, with checks of its types."""
    cache_name = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", cache_name):
        return SourceFileLoader.get_code(self, fullname)


def _names_shapes(annotation: object) -> bool:
    """Whether an array's shape is part of it, or could be: what is text is not looked into."""
    if isinstance(annotation, str | _array_types._MetaAbstractArray):
        return True
    return get_origin(annotation) is not Literal and any(map(_names_shapes, get_args(annotation)))


def _either(function: Any, typechecker: Any) -> Any:
    """With and without checks of its types, which are made at its first call: most are never called, or never checked.

    jaxtyping has both, too, and binds every argument before.
    """
    if not inspect.isfunction(function) or any(map(_names_shapes, inspect.get_annotations(function).values())):
        return None
    checked = None

    @wraps(function)
    def either(*arguments: Any, **named: Any) -> Any:
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return function(*arguments, **named)
        if checked is None:
            checked = typechecker(function)
        return checked(*arguments, **named)

    return either


def _checked(jaxtyped: Callable[..., Any], typechecker: Any) -> Callable[[Any], Any]:
    """Checks of a function's or class's types, unless it is made anew at each call of another: that takes a millisecond."""

    def check(found: Any) -> Any:
        if "<locals>" in found.__qualname__:
            return found
        if inspect.isclass(found) and dataclasses.is_dataclass(found) and "__init__" in vars(found):
            if either := _either(vars(found)["__init__"], typechecker):
                found.__init__ = either
                return found
        return _either(found, typechecker) or jaxtyped(found, typechecker=typechecker)

    return check
