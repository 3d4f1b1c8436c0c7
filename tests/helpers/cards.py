"""The table of recipes/README.md that says what cards of usual sizes take: `python tests/helpers/cards.py` prints it.

Each row is the line of `llava-accel plan RECIPE --cards` for the launch profile that the recipe's own command names.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from llava_accel.advice.cards import CARDS, largest_batches
from llava_accel.advice.known_sizes import published_config, whole_name
from llava_accel.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
RANKS = 8
HEAD = ["recipe", "profile", "tokens a row", *(f"{card} GB" for card in CARDS)]


def planned_recipes() -> Iterator[Path]:
    """Those of a base whose sizes are published."""
    for path in sorted(RECIPES.glob("*.toml")):
        model = load_recipe(path, []).model
        if published_config(whole_name(model.base, model.language_model, model.vision_tower)):
            yield path


def profile(path: Path) -> str:
    """The layout that the recipe's own command launches."""
    found = re.search(r"^# Command .*--profile launch/(\w+)\.yaml", path.read_text(), re.MULTILINE)
    return found[1] if found else "one GPU"


def row(path: Path) -> str:
    """A line of the table."""
    found, layout = largest_batches(load_recipe(path, []), RANKS), profile(path)
    numbers = [f"{number:,}" if number else "-" for number in found.batches[layout]]
    name = layout if layout == "one GPU" else f"{layout}, {RANKS} GPUs"
    return line([f"[{path.name}]({path.name})", name, f"{found.num_tokens:,}", *numbers])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n")
    for path in planned_recipes():
        print(row(path), flush=True)
