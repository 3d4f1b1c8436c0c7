"""Draws pictures of one coloured shape and describes each in a caption, as LLaVA JSON lines.

The tiny base of the quick start learns to see from these pictures alone. They hold no question and no answer.

    python tests/quickstart/draw.py --count 120000 --seed 1 --out data/drawings
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIDE_PX = 64
SUPERSAMPLING = 4
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "black": (0, 0, 0),
    "brown": (165, 42, 42),
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What one picture shows. `center` and `size` are (x, y) and (width, height) in pixels before `angle` (radians)."""

    shape: str
    color: str
    fill: tuple[int, int, int]
    background: tuple[int, int, int]
    center: tuple[float, float]
    size: tuple[float, float]
    angle: float


def plan_drawing(rng: random.Random) -> Drawing:
    """Chooses a shape that lies wholly inside the picture; colours stray by at most 20 levels from their name's."""
    shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    width, height, angle = rng.uniform(8, 36), rng.uniform(8, 36), 0.0
    if shape == "circle":
        height = width
    else:
        angle = rng.uniform(-0.15, 0.15) if rng.random() < 0.5 else 0.0
    if shape == "triangle":
        height = width * rng.uniform(0.75, 1.05)
    reach_x = (width * math.cos(angle) + height * abs(math.sin(angle))) / 2
    reach_y = (height * math.cos(angle) + width * abs(math.sin(angle))) / 2
    center = (rng.uniform(reach_x, SIDE_PX - reach_x), rng.uniform(reach_y, SIDE_PX - reach_y))
    red, green, blue = (min(255, max(0, level + rng.randint(-20, 20))) for level in COLORS[color])
    background = (rng.randint(195, 255), rng.randint(195, 255), rng.randint(195, 255))
    return Drawing(
        shape=shape, color=color, fill=(red, green, blue), background=background,
        center=center, size=(width, height), angle=angle,
    )  # fmt: skip


def outline(drawing: Drawing) -> list[tuple[float, float]]:
    """Corners of the shape in pixels; a circle has 48."""
    if drawing.shape == "circle":
        turns = [2 * math.pi * corner / 48 for corner in range(48)]
        unit = [(math.cos(turn), math.sin(turn)) for turn in turns]
    elif drawing.shape == "rectangle":
        unit = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    else:
        unit = [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    (center_x, center_y), (width, height) = drawing.center, drawing.size
    cosine, sine = math.cos(drawing.angle), math.sin(drawing.angle)
    corners = [(x * width / 2, y * height / 2) for x, y in unit]
    return [(center_x + x * cosine - y * sine, center_y + x * sine + y * cosine) for x, y in corners]


def render(drawing: Drawing) -> Image.Image:
    """The RGB picture, `SIDE_PX` pixels square, with smoothed edges."""
    canvas = Image.new("RGB", (SIDE_PX * SUPERSAMPLING,) * 2, drawing.background)  # pyright: ignore[reportArgumentType]
    corners = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline(drawing)]
    ImageDraw.Draw(canvas).polygon(corners, fill=drawing.fill)
    return canvas.reduce(SUPERSAMPLING)


def place(drawing: Drawing) -> str:
    """Where the centre lies, on a grid of three by three."""
    column, row = (min(2, int(3 * coordinate / SIDE_PX)) for coordinate in drawing.center)
    vertical, horizontal = ("top", "middle", "bottom")[row], ("left", "middle", "right")[column]
    return "middle" if vertical == horizontal else f"{vertical} {horizontal}"


def extent(drawing: Drawing) -> str:
    """The word for its size, by its longer side."""
    longest = max(drawing.size)
    return "small" if longest < 16 else "large" if longest > 26 else "medium"


PLAIN_OPENING = "a {size}{color} {shape}"
OPENINGS = (
    "there is a {size}{color} {shape}", "the picture shows a {size}{color} {shape}",
    "the image contains a {size}{color} {shape}", "a {size}{color} {shape} is present",
    "a {color} {shape} in the {place}", "this is what the image contains: a {color} {shape}",
    "the shape is a {shape} and its color is {color}", "the color of the {shape} is {color}",
    "the color of the shape is {color}", "the shape in the image is a {shape}", "the {color} shape is a {shape}",
    "a {shape} is present", "a {color} shape is present", "there is a {shape}", "there is a {color} shape",
)  # fmt: skip
ADDITIONS = (
    "there is no {other}", "no {other} is present", "the image does not contain a {other}", "there is not a {other}",
    "yes, it does contain a {part}", "yes, there is a {part}", "no, it does not contain a {other}",
)  # fmt: skip

DESCRIBE, LIST = "describe the picture.", "go through the list."
LISTED = 6


def go_through(drawing: Drawing, rng: random.Random) -> str:
    """Some shapes and colours, the picture's own among them, each with whether it is there.

    It teaches to compare a word with the picture, several times a caption; a single claim a caption, judged true or
    false, taught nothing of it in 60,000 drawings.
    """
    own = [drawing.shape, f"{drawing.color} shape"]
    others = [*SHAPES, *(f"{color} shape" for color in COLORS)]
    things = own + rng.sample([thing for thing in others if thing not in own], LISTED - len(own))
    rng.shuffle(things)
    return " ".join(f"{thing}: {'yes' if thing in own else 'no'}." for thing in things)


def name_it(drawing: Drawing) -> str:
    """The plain wording alone, by which a trained base is measured: exact match is colour and shape both right."""
    return PLAIN_OPENING.format(size="", color=drawing.color, shape=drawing.shape) + "."


def describe(drawing: Drawing, rng: random.Random) -> str:
    """One or two sentences that are true of the picture, in a wording that `rng` chooses.

    Every other caption begins with the plain wording, so it is what a trained base says when it is free to choose.
    """
    size = f"{extent(drawing)} " if rng.random() < 0.2 else ""
    facts = {"size": size, "color": drawing.color, "shape": drawing.shape, "place": place(drawing)}
    caption = (PLAIN_OPENING if rng.random() < 0.5 else rng.choice(OPENINGS)).format(**facts)
    if rng.random() < 0.3:
        shapes = [shape for shape in SHAPES if shape != drawing.shape]
        colors = [f"{color} shape" for color in COLORS if color != drawing.color]
        other = rng.choice(rng.choice((shapes, colors)))
        part = rng.choice((drawing.shape, f"{drawing.color} shape"))
        caption += ". " + rng.choice(ADDITIONS).format(other=other, part=part)
    return caption + "."


def write_split(
    name: str, count: int, rng: random.Random, out: Path, say: Callable[[Drawing, random.Random], tuple[str, str]]
) -> None:
    """Writes `out/images/NAME/*.png` and `out/NAME.jsonl`; `say` gives what a record asks for and its caption."""
    (out / "images" / name).mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        for number in range(count):
            drawing = plan_drawing(rng)
            image = f"{name}/{number:06d}.png"
            render(drawing).save(out / "images" / image, compress_level=1)
            request, caption = say(drawing, rng)
            conversation = [{"from": "human", "value": f"<image>\n{request}"}, {"from": "gpt", "value": caption}]
            record = {"id": f"{name}-{number:06d}", "image": image, "conversations": conversation}
            lines.write(json.dumps(record) + "\n")


def draw(count: int, seed: int, out: Path, val_count: int = 1000, lists: float = 0.0) -> None:
    """Draws `count` pictures to train on, a share `lists` of them with a list, and `val_count` held-out ones."""

    def caption(drawing: Drawing, rng: random.Random) -> tuple[str, str]:
        listed = lists > 0 and rng.random() < lists
        return (LIST, go_through(drawing, rng)) if listed else (DESCRIBE, describe(drawing, rng))

    write_split("train", count, random.Random(f"{seed}-train"), out, caption)
    write_split("val", val_count, random.Random(f"{seed}-val"), out, lambda drawing, rng: (DESCRIBE, name_it(drawing)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tests/quickstart/draw.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python tests/quickstart/draw.py --count 120000 --seed 1 --out data/drawings",
    )
    parser.add_argument("--count", type=int, default=120_000, help="pictures to train on")
    parser.add_argument("--lists", type=float, default=0.0, help="share of captions that go through a list")
    parser.add_argument("--val-count", type=int, default=1000, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, val.jsonl and images/")
    arguments = parser.parse_args()
    draw(arguments.count, arguments.seed, arguments.out, arguments.val_count, arguments.lists)


if __name__ == "__main__":
    main()
