"""Every key of a recipe: what it takes, its default, and what it means."""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("keys")


import argparse
import difflib
import textwrap

from llava_accel.exceptions import UserError
from llava_accel.recipe.described import KeyLine, described_tables
from llava_accel.recipe.names import nearest_keys

_WIDTH = 80


def shown(name: str) -> str:
    """The tables and keys at `name`, a table or a key; all where it is empty.

    Raises:
        UserError: there is no such table and no such key.
    """
    name = name.strip("[]")
    sections: list[str] = []
    for table in described_tables():
        path = table.path.removesuffix("[]")
        is_asked = not name or f"{path}.".startswith(f"{name}.")
        keys = [key for key in table.keys if is_asked or key.path == name]
        title = [textwrap.fill(f"{table.title} {table.meaning}", _WIDTH), ""] if is_asked else []
        if keys:
            sections.append("\n".join([*title, *map(_key, keys)]))
    if not sections:
        raise _unknown(name)
    return "\n\n".join(sections)


def _key(key: KeyLine) -> str:
    given = "" if key.default == "required" else f" = {key.default}"
    takes = f"{key.type}, required" if not given else key.type
    lines = [("  ", f"{key.path}{given}"), ("      ", takes), ("      ", key.meaning)]
    return "\n".join(
        textwrap.fill(text.replace("`", ""), _WIDTH, initial_indent=indent, subsequent_indent="      ")
        for indent, text in lines
    )


def _unknown(name: str) -> UserError:
    tables = [table.path.removesuffix("[]") for table in described_tables()]
    near = [*difflib.get_close_matches(name, tables, n=1), *nearest_keys(name)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Name one of {', '.join(dict.fromkeys(tables))}"
    return UserError(f"keys {name}: there is no such table and no such key. {hint}")


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel keys [TABLE]`."""
    print(shown(arguments.name))
