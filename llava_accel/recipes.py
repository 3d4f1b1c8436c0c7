"""The recipes that ship: their names, what each is for and needs, and their text."""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("recipes")


import argparse
import difflib
import importlib.metadata
import re
import textwrap
from pathlib import Path

from llava_accel.exceptions import UserError

_WIDTH = 80
_PACKAGE = "llava-accel"


def shipped() -> dict[str, Path]:
    """The recipes by name. A clone has them beside the package, an installation in its `share` folder.

    Raises:
        UserError: there are none.
    """
    files = _beside(Path(__file__).parents[1]) or _installed()
    if not files:
        raise UserError("no recipes are installed. Install llava_accel once more, or use the folder recipes of a clone")
    return {path.stem: path for path in sorted(files)}


def described(name: str, text: str) -> str:
    """A recipe's name, what it is for and what it needs, as its first lines say."""
    comment = [line.removeprefix("#").strip() for line in text.partition("\n[")[0].splitlines()]
    paragraphs = "\n".join(line for line in comment if not line.startswith(":schema")).strip().split("\n\n")
    purpose = re.split(r"(?<=\w[.])\s", " ".join(paragraphs[0].split()), maxsplit=1)[0]
    needs = re.search(r"^# Hardware +(.+)$", text, re.MULTILINE)
    lines = [purpose, f"Needs {needs[1]}" if needs else ""]
    indent = "    "
    wrapped = [textwrap.fill(line, _WIDTH, initial_indent=indent, subsequent_indent=indent) for line in lines if line]
    return "\n".join([name, *wrapped])


def _beside(root: Path) -> list[Path]:
    """The recipes of a clone. Elsewhere a folder of that name is not ours."""
    return [*(root / "recipes").glob("*.toml")] if (root / "pyproject.toml").is_file() else []


def _installed() -> list[Path]:
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.match("llava_accel/recipes/*.toml")]


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel recipes [show NAME]`."""
    known = shipped()
    if not arguments.name:
        print("\n".join(described(name, path.read_text(encoding="utf-8")) for name, path in known.items()))
        print("\nprint one: llava-accel recipes show NAME > mine.toml")
        return
    name = Path(arguments.name).name.removesuffix(".toml")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Name one of {', '.join(known)}"
        raise UserError(f"recipes show {arguments.name}: there is no such recipe. {hint}")
    print(known[name].read_text(encoding="utf-8"), end="")
