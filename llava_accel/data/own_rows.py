"""`data.reader`: the user's own function, which turns one of their rows into a row of a known form."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_accel.own_code import digest, file_of, load_own, where
from llava_accel.sources.problems import DataError, quoted

_KEY = "data.reader"


@dataclass(frozen=True, slots=True)
class Reader:
    """The function by name and by content: it is sent to worker processes and is part of the data's fingerprint."""

    name: str = field(repr=False)
    """As in the recipe; the file may move."""
    function: str
    content: str
    """The file's hash."""

    def __call__(self, fields: dict[str, Any]) -> bytes | None:
        """The row that the function makes of one, as JSON; None leaves the row out.

        Raises:
            DataError: it fails, or its result is not a row. Without file and row.
        """
        function = _function(self.name, self.content)
        try:
            made = function(fields)
        except (Exception, SystemExit) as error:  # whatever the user's code raises is the user's to mend
            raise _wrong(
                where(error, file_of(self.name).resolve()), "Correct the function, or let it return None"
            ) from error
        if made is None:
            return None
        if not isinstance(made, Mapping):
            raise _wrong(f"{self.name} returns {quoted(made)}", "Return a dict in one of the known forms, or None")
        try:
            return json.dumps({**made}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            remedy = "Return texts, numbers, lists and dicts; an image is the name of its file"
            raise _wrong(f"{self.name} returns a value that is not JSON: {error}", remedy) from None


def open_reader(name: str) -> Reader | None:
    """The recipe's reader; None where it names none.

    Raises:
        UserError: it cannot be loaded.
    """
    if not name:
        return None
    load_own(_KEY, name)
    return Reader(name, name.rpartition(":")[2], digest(name))


@functools.lru_cache(maxsize=4)
def _function(name: str, content: str) -> Callable[[dict[str, Any]], Any]:
    """Load it, once per process. A worker that starts later must not read rows in another way than the run does."""
    function = load_own(_KEY, name)
    if digest(name) != content:
        raise _wrong(f"{name} has changed since the data was opened", "Start the command again")
    return function


def _wrong(problem: str, remedy: str) -> DataError:
    return DataError("reader", f"{_KEY}: {problem}", remedy)
