"""Held-out pictures with question and answer under them, as single pictures of one size: what trackers can show."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llava_accel.data.images import decode, find_image
from llava_accel.data.problems import DataError
from llava_accel.recipe import DataTable
from llava_accel.run.console import printable
from llava_accel.run.report.gallery import choose, picture_roots, verdict
from llava_accel.run.report.history import Prediction

_MOST = 12
_SIDE, _LINE, _LINES, _COLUMNS = 224, 15, 5, 36  # px, px, lines of text, characters a line
_COLORS = {"right": (27, 122, 67), "partly": (138, 97, 0), "wrong": (179, 55, 43)}


def tracker_pictures(predictions: Sequence[Prediction], data: DataTable, metric: str) -> list[Image.Image]:
    """At most twelve pictures, right and wrong mixed; those that cannot be read are left out."""
    roots = picture_roots(data)
    found: list[Image.Image] = []
    for number in sorted(choose(predictions, metric)):
        row = predictions[number]
        name = row["image"] if isinstance(row["image"], str) else next(iter(row["image"]), "")
        try:
            found.append(_tile(decode(find_image(roots[0], name)), row, metric))
        except DataError:  # the report says of each what is wrong with it
            continue
    return found[:: max(1, len(found) // _MOST)][:_MOST]


def _tile(image: Image.Image, row: Prediction, metric: str) -> Image.Image:
    tile = Image.new("RGB", (_SIDE, _SIDE + _LINES * _LINE + 8), "white")
    image = ImageOps.contain(image, (_SIDE, _SIDE))
    tile.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    result = verdict(float(row[metric]))
    answer = max(row["answers"], key=row["answers"].get)
    question = _wrapped(row["question"])[:3]
    lines = [(text, (29, 31, 33)) for text in question]
    lines += [
        (_wrapped(f"{result}: {row['prediction']}")[0], _COLORS[result]),
        (_wrapped(f"expected: {answer}")[0], (98, 102, 107)),
    ]
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    for number, (text, color) in enumerate(lines[-_LINES:]):
        draw.text((6, _SIDE + 4 + number * _LINE), text, fill=color, font=font)
    return tile


def _wrapped(text: str) -> list[str]:
    """Lines of at most `_COLUMNS` characters, at least one."""
    lines = [""]
    for word in printable(text).split():
        word = word[:_COLUMNS]
        if len(lines[-1]) + len(word) + 1 > _COLUMNS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
