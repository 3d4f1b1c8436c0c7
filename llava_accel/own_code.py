"""Functions and classes of the user's own, in a file that the recipe names as "my_scores.py:anls_de", and its hash.

No other file is ever run: none of a model's folder, and none from the network.
"""

import functools
import hashlib
import traceback
from collections.abc import Callable, Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

from llava_accel.exceptions import UserError

_run: set[str] = set()
"""Files that were run."""


def is_own(name: str) -> bool:
    """Whether a name is that of a function in a file."""
    return ".py:" in name


def file_of(name: str) -> Path:
    """The file that a name holds."""
    return Path(name.rpartition(":")[0]).expanduser()


def load_own(key: str, name: str) -> Callable[..., Any]:
    """The function; the file is run the first time that it is asked for, and again once it has changed.

    Args:
        key: The key of the recipe that names it, for errors.

    Raises:
        UserError: there is no such file or function, or the file cannot be run.
    """
    path, _, function = name.rpartition(":")
    file = file_of(name)
    if "://" in path:
        raise UserError(f"{key}: {path} is not on this machine. Download it, read it, and name the file")
    if not file.is_file():
        raise UserError(f"{key}: there is no file {path}, as seen from {Path.cwd()}. Correct the path in {name!r}")
    found = _module(key, file.resolve(), digest(name)).get(function)
    if not callable(found):
        raise UserError(f"{key}: {file} has no function {function!r}. Write it there, or correct {name!r}")
    return found


def own_line(key: str, name: str) -> str:
    """What is said before code of the user's own is run; UserError if it cannot be loaded."""
    load_own(key, name)
    return f"{key}: {name} is code of yours, which this process runs (sha256 {digest(name)[:12]})"


def call_own(key: str, name: str, *arguments: object) -> Any:
    """What the function returns; UserError with its line where it cannot be loaded or fails."""
    function, file = load_own(key, name), file_of(name).resolve()
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is the user's to mend
        raise UserError(f"{key}: {where(error, file)}. Mend the function") from error


def say_own(named: Mapping[str, str], say: Callable[[str], object]) -> None:
    """Say which of these values, by key, are code of the user's own; UserError if one cannot be loaded."""
    for key, name in named.items():
        if is_own(name):
            say(own_line(key, name))


def digest(name: str) -> str:
    """The file's content as a hash, which tells whether it has changed."""
    return hashlib.sha256(file_of(name).read_bytes()).hexdigest()


class _FromSource(SourceFileLoader):
    """Reads the file itself: bytecode of an earlier import is known by time and size, which a changed file may share."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


@functools.lru_cache(maxsize=32)
def _module(key: str, file: Path, content: str) -> dict[str, Any]:
    _run.add(str(file))
    name = f"own_{file.stem}_{content[:12]}"
    spec = spec_from_file_location(name, file, loader=_FromSource(name, str(file)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is the user's to mend
        raise UserError(f"{key}: {where(error, file)}. Mend the file") from error
    return vars(module)


def explained(error: Exception) -> UserError | None:
    """What to tell of an error that was raised in a file of the user's, or in what it has called; None of any other."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _run]
    if not files:
        return None
    return UserError(f"{where(error, files[-1])}. Mend it; with LLAVA_ACCEL_TRACEBACK=1 all of the traceback is shown")


def where(error: BaseException, file: Path) -> str:
    """What went wrong in the user's file, and in which of its lines."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if Path(each.filename) == file]
    line = lines[-1] if lines else error.lineno if isinstance(error, SyntaxError) else None
    place = f"{file}, line {line}" if line else str(file)
    return f"{place}: {type(error).__name__}: {error}"
