"""Functions and classes of the user's own, in a file that the recipe names as "my_scores.py:anls_de", and its hash.

No other file is ever run: none of a model's folder, and none from the network.
"""

import functools
import hashlib
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

from llava_accel.exceptions import UserError

_OF_MODELS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json")
"""Any of these files shows that a folder is a model's."""
_run: set[str] = set()
"""Files that were run."""


def is_own(name: str) -> bool:
    """Whether a name is that of a function in a file."""
    return ".py:" in name


def file_of(name: str) -> Path:
    """The file in such a name."""
    return Path(os.path.expanduser(name.rpartition(":")[0]))


def load_own(key: str, name: str) -> Callable[..., Any]:
    """The function of that name. Its file is run when it is first asked for, and again once it has changed.

    Args:
        key: The recipe key that names it, for errors.

    Raises:
        UserError: there is no such file or function, or the file is a model's, or cannot be run.
    """
    path, _, function = name.rpartition(":")
    file = file_of(name)
    if "://" in path:
        raise UserError(f"{key}: {path} is not on this machine. Download it, read it, and name the file")
    if not os.path.isfile(file):
        raise UserError(f"{key}: there is no file {path}, as seen from {Path.cwd()}. Correct the path in {name!r}")
    if folder := _models_folder(file):
        remedy = "Read it, and copy it to a folder of yours"
        raise UserError(f"{key}: {file} is in the folder of a model, {folder}, and no model's code is run. {remedy}")
    own = _module(key, file.resolve(), digest(name)).get(function)
    if not callable(own):
        raise UserError(f"{key}: {file} has no function {function!r}. Write it there, or correct {name!r}")
    return own


def own_line(key: str, name: str) -> str:
    """The line to print before code of the user's is run; UserError if it cannot be loaded."""
    load_own(key, name)
    return f"{key}: {name} is code of yours, which this process runs (sha256 {digest(name)[:12]})"


def call_own(key: str, name: str, *arguments: object) -> Any:
    """Call the function and return its result; UserError, with the line of its file, if it cannot be loaded or fails."""
    function = load_own(key, name)
    with mended_by_user(key, file_of(name)):
        return function(*arguments)


@contextmanager
def mended_by_user(key: str, file: Path, what: str = "function", of: str = "") -> Iterator[None]:
    """Around a call of the user's code: UserError with the line where it fails, or tries to end the process.

    Args:
        what: The thing to mend, for the message.
        of: What the call was about, after the error in the message.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # whatever the user's code raises is the user's to mend
        raise UserError(f"{key}: {where(error, file.resolve())}{of}. Correct the {what}") from error


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


def _models_folder(file: Path) -> Path | None:
    """The folder of a model that holds a file, whatever links lead there."""
    folders = [folder for path in (file.absolute(), file.resolve()) for folder in path.parents]
    names = ((each, any((each / name).exists() for name in _OF_MODELS)) for each in folders)
    return next((each for each, is_model in names if is_model or each.name.startswith("models--")), None)


@functools.lru_cache(maxsize=32)
def _module(key: str, file: Path, content: str) -> dict[str, Any]:
    _run.add(str(file))
    name = f"own_{file.stem}_{content[:12]}"
    spec = spec_from_file_location(name, file, loader=_FromSource(name, str(file)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    with mended_by_user(key, file, "file"):
        spec.loader.exec_module(module)
    return vars(module)


def explained(error: BaseException) -> UserError | None:
    """The UserError for an error that was raised in a file of the user's, or in what that called; None for other errors."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _run]
    if not files:
        return None
    return UserError(
        f"{where(error, files[-1])}. Correct it; with LLAVA_ACCEL_TRACEBACK=1 all of the traceback is shown"
    )


def where(error: BaseException, file: Path) -> str:
    """The line of the user's file in which an error arose, and the error."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if Path(each.filename) == file]
    line = lines[-1] if lines else error.lineno if isinstance(error, SyntaxError) else None
    place = f"{file}, line {line}" if line else str(file)
    return f"{place}: {type(error).__name__}: {error}"
