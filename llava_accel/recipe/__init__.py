"""The typed recipe: one TOML file per run, checked in full before anything heavy is loaded.

`python -m llava_accel.recipe` prints the JSON schema that editors complete and check recipes with. inputs.py and
tables.py say what the keys mean, rules.py says which of them cannot be combined.
"""

import copy
import difflib
import json
import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_accel.recipe.errors import Problem, RecipeError, path_of, problems_of
from llava_accel.recipe.inputs import DataTable, LoraTable, ModelTable, QuantizationTable
from llava_accel.recipe.names import REQUIRED
from llava_accel.recipe.overrides import accepts, apply_overrides, parse_toml
from llava_accel.recipe.rules import changed_keys, conflicts, unused
from llava_accel.recipe.tables import OptimTable, Recipe, TrainTable
from llava_accel.recipe.toml import is_deeper, line_hint, to_toml

__all__ = [
    "DataTable", "LoraTable", "ModelTable", "OptimTable", "QuantizationTable", "Recipe", "RecipeError", "RecipeWarning",
    "TrainTable", "accepts", "changed_keys", "dump_recipe", "load_recipe", "make_recipe", "recipe_schema",
]  # fmt: skip

_LONGEST_LINE = 200  # characters of a line of the file in an error
_MOST_BYTES = 1 << 20  # of a recipe: enough for a list of ten thousand sources
_NO_FILE = "Check the path. The recipe comes first, then its changes; `llava-accel recipes` lists those that ship."
_DEEPEST = 20  # levels of nested tables: recipes have six at most, and reading each takes room on the stack


class RecipeWarning(UserWarning):
    """A key is set to something but has no effect in this recipe."""


def load_recipe(recipe: Path | str | Mapping[str, Any], overrides: Sequence[str] = (), *, warns: bool = True) -> Recipe:
    """Read a recipe, apply the overrides, and check all of it.

    Args:
        recipe: A TOML file, or a mapping that holds what such a file would.
        overrides: `table.key=value` each; the value is read as TOML, and taken as text where it is not TOML. A key that
            takes a list also takes one value, or several separated by commas.
        warns: Warn of keys that have no effect; False for the recipe of an earlier run, which has warned already.

    Raises:
        RecipeError: The file cannot be read, or something in it or in an override is wrong.
    """
    is_file = isinstance(recipe, Path | str)
    tables = _read(Path(recipe)) if is_file else copy.deepcopy(dict(recipe))
    problems = apply_overrides(overrides, tables)
    loaded = make_recipe(tables, str(recipe) if is_file else "recipe", problems)
    for message in unused(loaded) if warns else ():
        warnings.warn(message, RecipeWarning, stacklevel=2)
    return loaded


def make_recipe(tables: Mapping[str, Any], source: str = "recipe", problems: Sequence[Problem] = ()) -> Recipe:
    """Make a recipe from a nested mapping, and check all of it.

    Args:
        tables: What the TOML file would hold.
        source: Names the recipe in the error.
        problems: Problems found before, to be reported with the rest.

    Raises:
        RecipeError: With every problem of every key and of every combination of keys.
    """
    if is_deeper(tables, _DEEPEST):
        problem = Problem({"file": source}, f"Tables are nested more than {_DEEPEST} deep.", "Write TABLE.KEY = VALUE.")
        raise RecipeError(source, [problem])
    # A missing table counts as empty: the error then names its required keys, not the table.
    tables, problems = {**{name: {} for name in REQUIRED}, **tables}, list(problems)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        problems += problems_of(error)
        recipe = Recipe.model_validate(_without_errors(tables, error))
    # A conflict between two keys means nothing while one of them is wrong in itself.
    wrong = {key.partition("[")[0] for problem in problems for key in (*problem.given, *problem.nearest)}
    problems += [problem for problem in conflicts(recipe) if not _is_about(problem, wrong)]
    if problems:
        raise RecipeError(source, problems, recipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with every key written out; loading it gives an equal recipe."""
    return to_toml(recipe.model_dump())


def recipe_schema() -> str:
    """The JSON schema of a recipe, as text. Combinations of keys are beyond it: load_recipe checks those."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[str, Any]:
    def refuse(expected: str, remedy: str) -> RecipeError:
        return RecipeError(str(path), [Problem({"file": str(path)}, expected, remedy)])

    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise refuse(f"A recipe has at most {_MOST_BYTES >> 20} MiB.", "Name a recipe; data.train names the data.")
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        names = [file.name for file in path.parent.glob("*.toml")]
        similar = difflib.get_close_matches(path.name, names, n=1)
        hint = f"Did you mean {path.parent / similar[0]}?" if similar else _NO_FILE
        raise refuse("There is no such file.", hint) from error
    except IsADirectoryError as error:
        raise refuse("Expected a TOML file; this is a folder.", "Name one of the .toml files in it.") from error
    except UnicodeDecodeError as error:
        raise refuse(f"Not UTF-8: byte {error.start} cannot be read.", "Save the file as UTF-8.") from error
    except OSError as error:
        raise refuse(f"The file cannot be read: {error.strerror}.", "Check its permissions.") from error
    try:
        return parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        position = re.search(r"at line (\d+)", str(error))
        line = text.split("\n")[int(position[1]) - 1].strip() if position else "the end of the file"
        change = line_hint(line, str(error)) if position and len(line) <= _LONGEST_LINE else ""
        remedy = f"Correct this line: {line[:_LONGEST_LINE]}" + (f"\n   {change}" if change else "")
        raise refuse(f"Not TOML: {error}.", remedy) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise refuse(f"Not readable as TOML: {error}.", "Write shorter numbers, fewer brackets, fewer dots.") from error


def _without_errors(tables: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """`tables` without the keys that have an error, and with examples for the required ones."""
    repaired = copy.deepcopy(dict(tables))
    for detail in error.errors(include_url=False):
        *parents, name = (str(part) for part in takewhile(lambda part: isinstance(part, str), path_of(detail)))
        reduce(lambda table, parent: table.get(parent, {}), parents, repaired).pop(name, None)
    for name, keys in REQUIRED.items():
        repaired[name] = {**keys, **repaired.get(name, {})}
    return repaired


def _is_about(problem: Problem, wrong: set[str]) -> bool:
    """Whether one of the keys of `problem`, or the table that holds it, is in `wrong`."""
    return any(key == name or key.startswith(f"{name}.") for key in problem.given for name in wrong)
