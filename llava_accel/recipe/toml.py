"""TOML out: writes what `tomllib` reads, as far as the values of a recipe go."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


def toml_value(value: object) -> str:
    """One value as TOML on a single line: text, numbers, booleans, lists, and tables inside lists.

    Anything else is written as its quoted text, so that an error message can show whatever was in the file.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_key(str(key))} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # JSON escapes what TOML wants escaped, with one exception: TOML forbids a bare DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(key: str) -> str:
    """A bare key where TOML allows one, else a quoted one."""
    is_bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if is_bare else toml_value(key)


def to_toml(tables: Mapping[str, object], path: tuple[str, ...] = ()) -> str:
    """A nested mapping as TOML text: in each table the plain keys first, then the sub-tables."""
    nested = {key: value for key, value in tables.items() if isinstance(value, Mapping)}
    lines = [f"{toml_key(key)} = {toml_value(value)}" for key, value in tables.items() if key not in nested]
    if path:
        lines.insert(0, f"[{'.'.join(map(toml_key, path))}]")
    blocks = ["\n".join(lines) + "\n"] if lines else []
    blocks += [to_toml(value, (*path, key)) for key, value in nested.items()]
    return "\n".join(blocks)


def line_hint(line: str, reason: str) -> str:
    """A sentence that says what to change in a line that is not TOML; "" where that is not known.

    Args:
        reason: The message of `tomllib`.
    """
    key, sign, value = (part.strip() for part in line.partition("="))
    if reason.startswith(("Cannot declare", "Cannot overwrite")):
        return (
            "It is there twice: keep one, with the keys of both." if line.startswith("[") else "The key is there twice."
        )
    if "\\" in value:
        return f"Write / in place of \\, or the text in single quotes: {key} = '{value.strip(chr(34))}'."
    if value.startswith("{") and ":" in value:
        return "Between { and } write KEY = VALUE."
    if (pair := re.fullmatch(r"([\w.-]+)\s*:\s*(.+)", line)) and not sign:
        return f"Write {pair[1]} = {pair[2]}"
    if value.lower() in ("none", "null", "nil", ""):
        return "Remove the line: a key that is left out has its default." if sign else ""
    if value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"Write {key} = {'true' if value.lower() in ('true', 'yes', 'on') else 'false'}"
    if value[0] in "\"'" and value.count(value[0]) == 1:
        return f"The text has no second quote: {key} = {value}{value[0]}"
    is_word = re.fullmatch(r"[\w~/][^\"'\[\]{}#=]*", value) is not None
    return f"Put text in quotes: {key} = {toml_value(value)}" if is_word else ""


def is_deeper(value: object, most: int) -> bool:
    """Whether mappings and lists are nested more than `most` levels deep. Walked level by level: recursion would fail."""
    level: list[Any] = [value]
    for _ in range(most):
        inner = (each for node in level for each in (node.values() if isinstance(node, Mapping) else node))
        level = [each for each in inner if isinstance(each, Mapping | list | tuple)]
    return bool(level)


def flatten(tables: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested mapping as one of dotted keys; lists stay whole, empty tables vanish."""
    flat: dict[str, object] = {}
    for key, value in tables.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
