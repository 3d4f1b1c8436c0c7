"""Every key of a recipe with its type, default and meaning, read from the schema."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llava_accel.recipe import recipe_schema
from llava_accel.recipe.toml import toml_value

_WORDS = {"integer": "integer", "number": "number", "boolean": "`true` or `false`", "string": "text"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
_LARGE = 10**6  # a maximum from here on only catches typing errors, and is not shown


@dataclass(frozen=True, slots=True)
class KeyLine:
    """A key. In `type` and `default`, what is written in a recipe is in backticks."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class TableLines:
    """A table, and the keys in it that are not tables themselves."""

    path: str
    """Its dotted name, which ends in [] where there may be several."""
    meaning: str
    keys: tuple[KeyLine, ...]

    @property
    def title(self) -> str:
        """The line that begins it in a recipe."""
        return f"[[{self.path[:-2]}]]" if self.path.endswith("[]") else f"[{self.path}]"


def described_tables() -> list[TableLines]:
    """All tables of a recipe, each followed by its sub-tables."""
    schema = json.loads(recipe_schema())
    tables = schema["$defs"]
    return [table for name, item in schema["properties"].items() for table in _walk(name, _named(item, tables), tables)]


def _walk(path: str, table: Mapping[str, Any], tables: Mapping[str, Any]) -> Iterator[TableLines]:
    lines: list[KeyLine] = []
    inner: list[TableLines] = []
    for name, key in table["properties"].items():
        if "$ref" in key:
            inner += _walk(f"{path}.{name}", _named(key, tables), tables)
            continue
        default = f"`{toml_value(key['default'])}`" if "default" in key else "required"
        lines.append(KeyLine(f"{path}.{name}", _type(key), default, " ".join(key["description"].split())))
        # A list under this key may hold tables.
        items = [choice["items"] for choice in key.get("oneOf", ()) if "$ref" in choice.get("items", ())]
        for item in items:
            inner += _walk(f"{path}.{name}[]", _named(item, tables), tables)
    yield TableLines(path, " ".join(table["description"].split()), tuple(lines))
    yield from inner


def _named(reference: Mapping[str, Any], tables: Mapping[str, Any]) -> Mapping[str, Any]:
    return tables[reference["$ref"].rpartition("/")[2]]


def _type(key: Mapping[str, Any]) -> str:
    """The values that a key takes, for example `"nf4"`, `"fp4"`, or: integer from 1."""
    if "enum" in key or "const" in key:
        return ", ".join(f"`{toml_value(value)}`" for value in key.get("enum", [key.get("const")]))
    if choices := key.get("anyOf") or key.get("oneOf"):
        return " or ".join(map(_type, choices))
    if "prefixItems" in key:
        return f"list of {len(key['prefixItems'])}, each {_type(key['prefixItems'][0])}"
    if key["type"] == "object":
        return "table of texts"
    if key["type"] == "array":
        return "list of tables" if "$ref" in key["items"] else f"list of {_type(key['items'])}"
    bounds = [f"{word} {key[name]:g}" for name, word in _BOUNDS.items() if key.get(name, _LARGE) < _LARGE]
    return " ".join([_WORDS[key["type"]], *bounds])
