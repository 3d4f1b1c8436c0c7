"""Writes a recipe as a user would: few keys, each followed by its reason."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llava_accel.recipe.toml import toml_value

_WIDTH = 118
_COLUMN = 44  # where reasons begin, unless the line is longer


class Key(NamedTuple):
    """A key, its value, and the reason for it."""

    name: str
    value: object
    why: str


def to_commented(head: Sequence[str], tables: Mapping[str, Sequence[Key]]) -> str:
    """The text of a recipe.

    Args:
        head: Lines of the comment at its top.
        tables: Keys of each table; one without keys is left out.
    """
    blocks = ["\n".join(line for text in head for line in _comment(text))]
    blocks += ["\n".join([f"[{name}]", *map(_line, keys)]) for name, keys in tables.items() if keys]
    return "\n\n".join(blocks) + "\n"


def run_name(stem: str) -> str:
    """A name for the run, made from the name of the file."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:100]
    return name or "run"


def _line(key: Key) -> str:
    text = f"{key.name} = {_value(key.value)}"
    if not key.why:
        return text
    comment = f"# {key.why}"
    last = text.rpartition("\n")[2]
    start = max(_COLUMN, len(last) + 2)
    if start + len(comment) <= _WIDTH:
        return text + " " * (start - len(last)) + comment
    return "\n".join([*_comment(key.why), text])


def _comment(text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines]


def _value(value: object) -> str:
    """The value as TOML, on one line; of a list of tables, each on its own line."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return "[\n" + "".join(f"    {toml_value(item)},\n" for item in value) + "]"
    return toml_value(value)
