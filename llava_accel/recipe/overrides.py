"""Keys that are set on the command line: `table.key=value`, and what the shell may have made of them."""

import copy
import shlex
import tomllib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from llava_accel.recipe.errors import Problem, unknown_key
from llava_accel.recipe.names import DEFAULTS, REQUIRED
from llava_accel.recipe.tables import Recipe
from llava_accel.recipe.toml import flatten

_MOST_DOTS = 5000  # of a key
_EXAMPLES = DEFAULTS | flatten(REQUIRED)


def apply_overrides(overrides: Sequence[str], tables: dict[str, Any]) -> list[Problem]:
    """Set keys of `tables` in place, and return the problems of the overrides themselves."""
    whole, problems = _join(list(overrides))
    for override in whole:
        problems += _apply(override, tables)
    return problems


def accepts(override: str) -> bool:
    """Whether an override names a key of a recipe and a value that it takes, as far as that key alone goes."""
    tables: dict[str, Any] = copy.deepcopy(REQUIRED)
    if apply_overrides([override], tables):
        return False
    try:
        Recipe.model_validate(tables)
    except ValidationError:
        return False
    return True


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads` with a limit on dots: it keeps every prefix of a dotted key, which is 40 GB for 100,000 dots.

    Raises:
        ValueError: It is not TOML, or a key has too many dots.
    """
    if any(part.count(".") > _MOST_DOTS for line in text.split("\n") for part in line.split("=")):
        raise ValueError(f"more than {_MOST_DOTS:,} dots in a key")
    return tomllib.loads(text)


def _join(words: list[str]) -> tuple[list[str], list[Problem]]:
    """The words that are overrides; and a problem for each override that the shell has split."""
    whole: list[str] = []
    problems: list[Problem] = []
    while words:
        if (parts := _apart_at_equals(words)) > 1:
            key, _, value = "".join(words[:parts]).partition("=")
            problems.append(_taken_apart(" ".join(words[:parts]), "There are spaces round the =", key, value, parts))
        elif whole and _is_text(whole[-1]) and _is_bare(words):
            while parts < len(words) and _is_bare(words[parts:]):
                parts += 1
            key, _, value = whole.pop().partition("=")
            between = "," if isinstance(DEFAULTS.get(key), tuple) and "," not in value else " "
            text = between.join([value, *words[:parts]])
            shown = " ".join([f"{key}={value}", *words[:parts]])
            problems.append(_taken_apart(shown, "The value was not quoted", key, text, parts + 1))
        else:
            whole.append(words[0])
        del words[:parts]
    return whole, problems


def _apart_at_equals(words: Sequence[str]) -> int:
    """How many of the first words make one override; 1 where the first is whole, or not part of any."""
    first, second, third = [*words[:3], "", ""][:3]
    if "=" not in first and second == "=" and third:
        return 3
    is_cut = first != "=" and first.find("=") == len(first) - 1 and _is_bare(words[1:])
    return 2 if (first and "=" not in first and second.startswith("=") and second != "=") or is_cut else 1


def _is_bare(words: Sequence[str]) -> bool:
    """Whether there is a first word, it has no =, and the next word does not begin with its =."""
    return bool(words) and bool(words[0]) and "=" not in words[0] and not [*words, ""][1].startswith("=")


def _is_text(override: str) -> bool:
    """Whether an override sets a key that takes text, or a list."""
    key, equals, value = override.partition("=")
    return bool(equals and value) and isinstance(_EXAMPLES.get(key), str | tuple)


def _taken_apart(shown: str, reason: str, key: str, value: str, number: int) -> Problem:
    plain = shlex.quote(value)
    # In double quotes, as people write it, where the shell changes nothing in them.
    quoted = f'"{value}"' if plain != value and not set('$`"\\!') & set(value) else plain
    return Problem({"override": shown}, f"{reason}: the shell made {number} words of it.", f"Write {key}={quoted}")


def _apply(override: str, tables: dict[str, Any]) -> list[Problem]:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    readable = override.encode("utf-8", "backslashreplace").decode()
    if not equals or not all(path) or readable != override:
        expected = "An override has the form table.key=value, in UTF-8."
        return [Problem({"override": readable}, expected, "Write for example optim.learning_rate=1e-4.")]
    table = tables
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return [unknown_key(key, text)]
    table[path[-1]] = _value(text.strip(), is_list=isinstance(DEFAULTS.get(".".join(path)), tuple))
    return []


def _value(text: str, is_list: bool) -> Any:
    """The value as TOML, or else as text. A list may also be one item, or several separated by commas: the shell removes
    the quotes of `["wandb"]`."""
    try:
        parsed = parse_toml(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    value = parsed["value"] if parsed.keys() == {"value"} else text
    if not is_list or not isinstance(value, str):
        return value
    items = value.removeprefix("[").removesuffix("]").split(",")
    return [_value(item.strip(), is_list=False) for item in items if item.strip()]
