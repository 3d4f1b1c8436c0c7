"""Describes the problems of a recipe: each has a key, its value, what is expected, and a remedy."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llava_accel.exceptions import UserError
from llava_accel.recipe.inputs import Source
from llava_accel.recipe.names import DEFAULTS, FREE_TABLES, KEYS, REQUIRED, nearest_keys
from llava_accel.recipe.tables import Recipe
from llava_accel.recipe.toml import flatten, toml_value

_LONGEST_VALUE = 200  # characters; a list of sources may be longer than anybody reads in an error
_MOST_SHOWN = 50  # problems; looking for the key that was meant takes a moment for each

_SOURCES = ("data.train[", "data.eval[")
_MEMBERS = ("literal[", "constrained-")  # pydantic's names of the members of a union of texts
_EXPECTED = {
    "int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "string_type": "text in quotes", "string_too_short": "text that is not empty",
    "tuple_type": "a list", "list_type": "a list",
    "too_short": "a list of at least {min_length}", "too_long": "a list of at most {max_length}",
    "model_type": "a table",
    "greater_than_equal": "at least {ge:,.12g}", "greater_than": "more than {gt:,.12g}",
    "less_than_equal": "at most {le:,.12g}", "less_than": "less than {lt:,.12g}",
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe.

    Args:
        given: The keys concerned, dotted, each with its value; None where the recipe does not have the key.
        expected: What is expected of them, or why they exclude each other; a sentence.
        remedy: What to do about it; a sentence.
        nearest: Valid keys that may have been meant, likeliest first.
    """

    given: Mapping[str, object]
    expected: str
    remedy: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(_shown(*item) for item in self.given.items())}\n   {self.expected}\n   {self.remedy}"


class RecipeError(UserError):
    """A recipe that cannot be run. `problems` holds all of its problems, `source` names the recipe.

    `rest` is the recipe with its wrong keys at their defaults, so that the rest can still be checked;
    None where nothing could be read.
    """

    def __init__(self, source: str, problems: Sequence[Problem], rest: Recipe | None = None) -> None:
        super().__init__(source, problems)
        self.source, self.problems, self.rest = source, tuple(problems), rest

    def is_about(self, *names: str) -> bool:
        """Whether a problem concerns one of these keys, or a table or an item of it."""
        keys = {key.partition("[")[0] for problem in self.problems for key in problem.given}
        return any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for key in keys for name in names)

    def __str__(self) -> str:
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        lines = [f"{number}. {problem}" for number, problem in enumerate(self.problems[:_MOST_SHOWN], start=1)]
        lines += [f"and {len(self.problems) - _MOST_SHOWN:,} more"] if len(self.problems) > _MOST_SHOWN else []
        return f"{self.source}: {count}\n" + "\n".join(lines)


def unknown_key(key: str, value: object, keys: Iterable[str] = KEYS) -> Problem:
    """The problem of a key that no table has."""
    nearest = nearest_keys(key, keys)
    if not nearest:
        return Problem({key: value}, "There is no such key.", "Remove it.")
    table, _, name = nearest[0].rpartition(".")
    place = f" under [{table}]" if table else ""
    expected = f"There is no such key. Did you mean {' or '.join(nearest)}?"
    return Problem({key: value}, expected, f"Write it as `{name}`{place}, or remove it.", nearest)


def problems_of(error: ValidationError) -> list[Problem]:
    """The problems of a failed validation, one per key, in the order of the tables."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_dotted(path_of(detail)), []).append(detail)
    problems: list[Problem] = []
    with_items = {key.partition("[")[0] for key in by_key if "[" in key}
    for key, details in by_key.items():
        value = details[0]["input"]
        if details[0]["type"] == "extra_forbidden":
            valid = Source.model_fields if key.startswith(_SOURCES) else KEYS
            # Each key of a table that does not exist may belong to another one.
            is_table = isinstance(value, Mapping) and not nearest_keys(key, FREE_TABLES)
            unknown = (flatten({key: value}) if is_table else {}) or {key: value}
            for item in unknown.items():
                problems.append(unknown_key(*item, valid if len(problems) < _MOST_SHOWN else ()))
        elif key not in with_items:
            # Else pydantic adds that the list is too short, because it did not count the items with errors.
            problems.append(_problem(key, details))
    return problems


def path_of(detail: ErrorDetails) -> tuple[str | int, ...]:
    """The keys and indices that lead to an error, without the union members that pydantic puts between them."""
    path: list[str | int] = []
    table: type[BaseModel] | None = Recipe
    for part in detail["loc"]:
        if table is None and isinstance(part, str) and (not isinstance(path[-1], int) or part.startswith(_MEMBERS)):
            continue
        path.append(part)
        field = table.model_fields.get(str(part)) if table else None
        annotation = field.annotation if field else None
        table = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return tuple(path)


def _problem(key: str, details: Sequence[ErrorDetails]) -> Problem:
    value, types = details[0]["input"], {detail["type"] for detail in details}
    table, _, name = key.rpartition(".")
    for detail in details:
        if detail["type"] == "refused":
            return Problem({key: value}, detail["msg"], detail.get("ctx", {})["remedy"])
    if "missing" in types and key.endswith("]"):
        whole = key.partition("[")[0]
        remedy = f"Write all of its values. {_default(whole, whole.rpartition('.')[2])}"
        return Problem({key: None}, "The list is too short.", remedy)
    if "missing" in types:
        example = f"{name} = {toml_value(flatten(REQUIRED).get(key, '...'))}"
        place = f"to {table}" if table.endswith("]") else f"under [{table}]"
        return Problem({key: None}, "It has no default.", f"Add `{example}` {place}, with your own value.")

    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    remedy = _default(key, name)
    choices = re.findall(r"'([^']*)'", " ".join(detail.get("ctx", {}).get("expected", "") for detail in details))
    if similar := difflib.get_close_matches(str(value), choices, n=1):
        remedy = f'Did you mean "{similar[0]}"? {remedy}'
    elif types & {"int_type", "float_type", "bool_type"} and isinstance(value, str):
        remedy = f"Write numbers, true and false without quotes. {remedy}"
    elif types == {"string_type"} and not isinstance(value, Mapping | list):
        remedy = f"Put it in quotes: `{name} = {toml_value(str(value))}`."
    elif types & {"tuple_type", "list_type"} and isinstance(value, str):
        remedy = f"Write it as a list: `{name} = {toml_value([value])}`."
    elif "model_type" in types:
        remedy = (
            f"Write it as {{path = {toml_value(value if isinstance(value, str) else '...')}}}."
            if key.endswith("]")
            else f"Write its keys under [{key}]."
        )
    return Problem({key: value}, f"Expected {expected}.", remedy)


def _default(key: str, name: str) -> str:
    """A sentence with a key's default, or else with an example of its value."""
    if key in DEFAULTS:
        return f"The default is `{name} = {toml_value(DEFAULTS[key])}`."
    field = Source.model_fields.get(name) if key.startswith(_SOURCES) else None
    if field and not field.is_required():
        return f"The default is `{name} = {toml_value(field.default)}`."
    example = flatten(REQUIRED).get(key)
    return f"Write for example `{name} = {toml_value(example)}`." if example else "Change it."


def _expected(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        choices: str = context["expected"].replace("'", '"')
        return f"one of {choices}" if " or " in choices else choices
    if detail["type"] == "string_pattern_mismatch":
        return 'a function in a file such as "my_scores.py:name"'
    template = _EXPECTED.get(detail["type"])
    return template.format(**context) if template else detail["msg"]


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(key: str, value: object) -> str:
    key = key if len(key) <= _LONGEST_VALUE else f"{key[:_LONGEST_VALUE]} ..."
    if value is None:
        return f"{key} (not set)"
    text = toml_value(value)
    return f"{key} = {text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + ' ...'}"
