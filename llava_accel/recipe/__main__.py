"""`python -m llava_accel.recipe` prints the JSON schema with which editors complete and check recipes.

With `--keys` it prints every key, its type, its default and its meaning in Markdown: the end of recipes/README.md.
"""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from llava_accel.recipe import recipe_schema
from llava_accel.recipe.toml import toml_value

_WORDS = {"integer": "integer", "number": "number", "boolean": "`true` or `false`", "string": "text"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
_LARGE = 10**6  # a maximum from here on only catches slips of the hand


def key_tables() -> str:
    """One Markdown table for each table of a recipe, made from the schema."""
    schema = json.loads(recipe_schema())
    tables = schema["$defs"]
    return "\n".join(_section(name, _named(item, tables), tables) for name, item in schema["properties"].items())


def _section(path: str, table: Mapping[str, Any], tables: Mapping[str, Any]) -> str:
    """The keys of the table at `path`, and after them its sub-tables."""
    rows, inner = [], []
    for name, key in table["properties"].items():
        if "$ref" in key:
            inner.append(_section(f"{path}.{name}", _named(key, tables), tables))
            continue
        default = f"`{toml_value(key['default'])}`" if "default" in key else "required"
        cells = (f"`{path}.{name}`", _type(key), default, key["description"].replace("<", "&lt;"))
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
        # A list under this key may hold tables.
        items = [choice["items"] for choice in key.get("oneOf", ()) if "$ref" in choice.get("items", ())]
        inner += [_section(f"{path}.{name}[]", _named(item, tables), tables) for item in items]
    title = f"[[{path[:-2]}]]" if path.endswith("[]") else f"[{path}]"
    head = [f"### `{title}`", "", table["description"], "", "| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", *inner])


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


def main() -> None:
    """Print the schema, or the keys."""
    parser = argparse.ArgumentParser(prog="python -m llava_accel.recipe", description="The JSON schema of a recipe.")
    parser.add_argument("--keys", action="store_true", help="print every key as Markdown instead")
    print(key_tables() if parser.parse_args().keys else recipe_schema(), end="")


if __name__ == "__main__":
    main()
