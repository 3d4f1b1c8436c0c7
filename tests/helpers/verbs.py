"""The verbs as users start them, in this process: what they print and how they end."""

import contextlib
import importlib
import io
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from helpers.runs import PARITY, tables
from llava_accel.__main__ import main
from llava_accel.model import processing
from llava_accel.recipe.toml import to_toml


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """What was said to be wrong, each with the lines that belong to it."""
        return [part.strip() for part in re.split(r"(?m)^error: ", self.err)[1:]]


@cache
def _read_once() -> SimpleNamespace:
    """The same tokenizer for the same [model]: reading it anew takes longer than all else that a case does."""
    kept = {}

    def load_processing(model: object, image_aspect: str) -> object:
        key = (repr(model), image_aspect)
        kept[key] = kept.get(key) or processing.load_processing(model, image_aspect)  # pyright: ignore
        return kept[key]

    return SimpleNamespace(load_processing=load_processing)


def start(verb: str, *arguments: str, fresh: bool = False) -> Ended:
    """`python -m llava_accel.VERB ARGUMENTS`; an exception that a shell would show as a traceback is one here too.

    Args:
        fresh: Read the model's folder anew, for cases that break it.
    """
    module = importlib.import_module(f"llava_accel.{verb}")
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(patch.object(sys, "argv", ["llava-accel", verb, *arguments]))
        if not fresh and hasattr(module, "load_processing"):
            stack.enter_context(patch.object(module, "load_processing", _read_once().load_processing))
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            code = 1
            err.write(traceback.format_exc(limit=-4, chain=False))
    return Ended(code, out.getvalue(), err.getvalue())


def assert_refused(ended: Ended, says: Sequence[str]) -> None:
    """One message that names the thing and the remedy, an exit code that is not 0, and no traceback."""
    assert ended.code not in (0, 1), f"exit code {ended.code}\n{ended.err}"
    assert "Traceback" not in ended.err + ended.out, ended.err
    assert len(ended.messages) == 1, ended.err
    assert_helpful(ended.messages[0], says)


def assert_helpful(message: str, says: Sequence[str]) -> None:
    """The message has each of these words, a remedy behind the problem, and nothing that drives a terminal."""
    assert not [word for word in says if word not in message], message
    assert re.search(r"[.?!)]\s+[A-Z`]\S+ ", message), f"no remedy: {message}"
    assert all(character.isprintable() or character == "\n" for character in message), repr(message)
    assert len(message) < 3000, "longer than anybody reads"


def write_recipe(folder: Path, records: Path | None = None, /, **changes: dict[str, object]) -> Path:
    """A recipe of `runs.tables` as a file; [optim] and [train] are small enough for one step a second."""
    file = folder / "recipe.toml"
    file.write_text(to_toml(tables(folder, records, **changes)))
    return file


def good_record(number: int) -> dict[str, object]:
    """A record that can be trained on, with an image of the parity folder."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
    return {"id": f"good {number}", "image": f"{PARITY}/images/t{number}.png", "conversations": turns}
