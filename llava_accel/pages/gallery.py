"""Which held-out answers a page shows, and their images, small enough to stand in the page itself."""

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava_accel.data.images import decode, find_image
from llava_accel.data.problems import DataError
from llava_accel.pages.history import Prediction
from llava_accel.recipe import DataTable

MOST_CARDS = 60
_MOST_HARD = 12
_MOST_IMAGES = 4  # of one question
_SIDE_PX = 320
_RIGHT = 0.9  # VQA accuracy of an answer that three annotators gave, the fewest for full marks


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """A thumbnail as a data URI; empty where the file could not be shown, and then `problem` says why."""

    name: str
    uri: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One question with what was answered."""

    id: str
    question: str
    answers: list[tuple[str, float]]
    """Annotators' answers with the number of annotators, the most frequent first."""
    prediction: str
    score: float
    verdict: str
    """right, partly or wrong."""
    before: str | None
    """What the base answered; None where it was not asked."""
    change: str
    """gained or lost against the base; empty where neither."""
    types: dict[str, str]
    """question_type and answer_type, where the annotations have them."""
    loss: float | None
    is_hard: bool
    """Whether its loss is among the highest of the held-out data."""
    images: list[GalleryImage]
    tags: list[str] = field(default_factory=list)
    """What filters ask for: "verdict:right", "answer_type:yes/no", and so on."""


def verdict(score: float) -> str:
    """right, where at least three annotators agree; wrong, where none does; else partly."""
    return "right" if score >= _RIGHT else "partly" if score > 0 else "wrong"


def cards(predictions: Sequence[Prediction], before: Sequence[Prediction], data: DataTable, metric: str) -> list[Card]:
    """At most `MOST_CARDS` cards, right and wrong mixed, in the order of the data."""
    base = {question_key(row): row for row in before}
    hard = hardest(predictions)
    shown = choose(predictions, metric) | hard
    roots = image_roots(data)
    return [
        _card(row, base.get(question_key(row)), number in hard, roots, metric)
        for number, row in enumerate(predictions)
        if number in shown
    ]


def training_cards(predictions: Sequence[Prediction], data: DataTable, metric: str) -> list[Card]:
    """The training examples with the highest loss, the highest first."""
    roots = training_roots(data)
    ranked = sorted(hardest(predictions), key=lambda number: -predictions[number]["loss"])
    return [_card(predictions[number], None, True, roots, metric) for number in ranked]


def choose(predictions: Sequence[Prediction], metric: str) -> set[int]:
    """Numbers of the answers to show: half of them right as far as there are, each image once as far as there are.

    The draw is by a hash of the id, so that the same questions stay from one evaluation to the next.
    """
    order = sorted(range(len(predictions)), key=lambda number: _draw(predictions[number]))
    seen: set[str] = set()
    fresh: list[int] = []
    again: list[int] = []
    for number in order:
        name = str(predictions[number]["image"])
        (again if name in seen else fresh).append(number)
        seen.add(name)
    ordered, room = [*fresh, *again], MOST_CARDS - len(hardest(predictions))
    right = [number for number in ordered if verdict(float(predictions[number][metric])) == "right"]
    other = [number for number in ordered if verdict(float(predictions[number][metric])) != "right"]
    num_right = min(len(right), max(room // 2, room - len(other)))
    return {*right[:num_right], *other[: room - num_right]}


def hardest(predictions: Sequence[Prediction]) -> set[int]:
    """Numbers of the answers with the highest loss; none where the evaluation left no loss of each."""
    found = [number for number, row in enumerate(predictions) if row.get("loss") is not None]
    return set(sorted(found, key=lambda number: -predictions[number]["loss"])[:_MOST_HARD])


def image_roots(data: DataTable) -> list[Path]:
    """The folders that names of held-out images are relative to."""
    return _roots([(data.eval, data.images)]) if data.eval else training_roots(data)


def training_roots(data: DataTable) -> list[Path]:
    """The folders that names of training images are relative to."""
    if isinstance(data.train, str):
        return _roots([(data.train, data.images)])
    return _roots([(source.path, source.images or data.images) for source in data.train])


def _roots(named: Sequence[tuple[str, str]]) -> list[Path]:
    roots = [Path(images or (path if Path(path).is_dir() else Path(path).parent)) for path, images in named]
    return list(dict.fromkeys(roots))


def show(name: str, roots: Iterable[Path]) -> GalleryImage:
    """The thumbnail of an image, or why there is none."""
    problems: list[str] = []
    found: list[Path] = []
    for root in roots:
        try:
            found.append(find_image(root, name))
        except DataError as error:
            problems.append(error.problem)
    if len(found) > 1:
        return GalleryImage(name=name, problem=f"{len(found)} folders of the data have an image {name}")
    if not found:
        return GalleryImage(name=name, problem=" and ".join(problems))
    try:
        return GalleryImage(name=name, uri=thumbnail(found[0]))
    except DataError as error:
        return GalleryImage(name=name, problem=error.problem)


@functools.lru_cache(maxsize=4 * MOST_CARDS)
def thumbnail(path: Path) -> str:
    """An image file as a small JPEG data URI. Kept, since evaluation after evaluation shows nearly the same.

    Raises:
        DataError: the file is no image that can be read.
    """
    image = decode(path)
    image.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw(row: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(question_key(row).encode("utf-8", "replace")).digest()


def ranked_answers(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The annotators' answers with their number, the most frequent first."""
    return sorted(((text, float(number)) for text, number in row["answers"].items()), key=lambda pair: -pair[1])


def question_key(row: Mapping[str, Any]) -> str:
    """What one question is known by in every evaluation: ids alone may repeat."""
    return f"{row['id']} {row['image']} {row['question']}"


def _card(row: Prediction, base: Prediction | None, is_hard: bool, roots: list[Path], metric: str) -> Card:
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    result = verdict(float(row[metric]))
    earlier = verdict(float(base[metric])) if base else result
    change = "gained" if result == "right" != earlier else "lost" if earlier == "right" != result else ""
    types = {key: str(row[key]) for key in ("answer_type", "question_type") if row.get(key)}
    tags = [f"verdict:{result}", *(f"{key}:{value}" for key, value in types.items())]
    tags += [f"change:{change}"] * bool(change) + ["hard"] * is_hard
    return Card(
        id=str(row["id"]),
        question=row["question"],
        answers=ranked_answers(row),
        prediction=row["prediction"],
        score=float(row[metric]),
        verdict=result,
        before=base["prediction"] if base else None,
        change=change,
        types=types,
        loss=row.get("loss"),
        is_hard=is_hard,
        images=[show(name, roots) for name in names[:_MOST_IMAGES]],
        tags=tags,
    )
