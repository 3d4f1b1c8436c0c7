"""`python -m llava_accel.recipe` prints the JSON schema with which editors complete and check recipes.

With `--keys` it prints every key, its type, its default and its meaning in Markdown: the end of recipes/README.md.
"""

import argparse

from llava_accel.recipe import recipe_schema
from llava_accel.recipe.described import TableLines, described_tables


def key_tables() -> str:
    """One Markdown table for each table of a recipe, made from the schema."""
    return "\n".join(map(_section, described_tables()))


def _section(table: TableLines) -> str:
    rows = []
    for key in table.keys:
        cells = (f"`{key.path}`", key.type, key.default, key.meaning.replace("<", "&lt;"))
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    head = [f"### `{table.title}`", "", table.meaning, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def main() -> None:
    """Print the schema, or the keys."""
    parser = argparse.ArgumentParser(prog="python -m llava_accel.recipe", description="The JSON schema of a recipe.")
    parser.add_argument("--keys", action="store_true", help="print every key as Markdown instead")
    print(key_tables() if parser.parse_args().keys else recipe_schema(), end="")


if __name__ == "__main__":
    main()
