"""Chooses the held-out answers that a page shows, and makes their images small enough to be part of the page."""

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_accel.data.images import Exif, decode, find_image
from llava_accel.pages.history import Prediction
from llava_accel.recipe import DataTable
from llava_accel.scoring.harmful import WRONG, facts
from llava_accel.scoring.metrics import hardness
from llava_accel.setup.datasets import entries
from llava_accel.sources.downloads import DOWNLOADS, is_remote, place_of
from llava_accel.sources.image_parts import part_of
from llava_accel.sources.problems import DataError
from llava_accel.storage.kept_files import cache_folder

MOST_CARDS = 60
_MOST_HARD = 12
_MOST_IMAGES = 4  # of one question
_SIDE_PX = 640  # enough for an image that is enlarged, and a page of few megabytes
_RIGHT = 0.9  # VQA accuracy of an answer that three annotators gave, the fewest for full marks


@dataclass(frozen=True, kw_only=True)
class GalleryImage:
    """A thumbnail as a data URI; empty where the file could not be shown, and then `problem` says why."""

    name: str
    uri: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of the held-out data."""

    id: str
    question: str
    answers: list[tuple[str, float]]
    """Annotators' answers with the number of annotators, the most frequent first."""
    types: dict[str, str]
    """question_type and answer_type, where the annotations have them."""
    rejected: str
    """The rejected answer of a pair; else empty."""
    images: list[GalleryImage]
    tags: list[str]
    """The values that filters look for: "verdict:right", "answer_type:yes/no", and so on."""


@dataclass(frozen=True, kw_only=True)
class Card(Question):
    """One question with what was answered."""

    prediction: str
    score: float
    verdict: str
    """right, partly or wrong."""
    before: str | None
    """The base's answer; None where it was not asked."""
    change: str
    """gained or lost against the base; empty where neither."""
    loss: float | None
    is_hard: bool
    """Whether its loss is among the highest of the held-out data."""


def cards(predictions: Sequence[Prediction], before: Sequence[Prediction], data: DataTable, metric: str) -> list[Card]:
    """At most `MOST_CARDS` cards, right and wrong mixed, in the order of the data."""
    base = {facts(row): row for row in before}
    hard = hardest(predictions)
    shown = choose(predictions, metric) | {*hard}
    roots = image_roots(data)
    return [
        _card(row, base.get(facts(row)), number in hard, roots, metric, data.exif)
        for number, row in enumerate(predictions)
        if number in shown
    ]


def training_cards(predictions: Sequence[Prediction], data: DataTable, metric: str) -> list[Card]:
    """The training examples with the highest loss, the highest first."""
    roots = image_roots(data, "data.train")
    return [_card(predictions[number], None, True, roots, metric, data.exif) for number in hardest(predictions)]


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A record that is worth a look: a line of `scoring.harmful`, with images."""

    line: Mapping[str, Any]
    images: list[GalleryImage]
    near: list[tuple[Mapping[str, Any], list[GalleryImage]]]


def doubts(lines: Sequence[Mapping[str, Any]], why: str, data: DataTable) -> list[Doubt]:
    """The first lines of one kind; of two records that contradict each other, only the first."""
    roots, own = image_roots(data, "data.train"), image_roots(data, "data.eval" if why == WRONG else "data.train")

    chosen = [line for line in lines if line["why"] == why and ("other" not in line or _comes_first(line))]
    return [
        Doubt(
            line=line,
            images=_images(line, own, data.exif),
            near=[(near, _images(near, roots, data.exif)) for near in line.get("nearest", ())],
        )
        for line in chosen[:_MOST_HARD]
    ]


def _comes_first(line: Mapping[str, Any]) -> bool:
    one, other = ((each["file"], each["row"]) for each in (line, line["other"]))
    return one < other


def _card(row: Prediction, base: Prediction | None, is_hard: bool, roots: list[Path], metric: str, exif: Exif) -> Card:
    result = verdict(row[metric])
    earlier = verdict(base[metric]) if base else result
    change = "gained" if result == "right" != earlier else "lost" if earlier == "right" != result else ""
    tags = [f"verdict:{result}", *([f"change:{change}"] if change else []), *(["hard"] if is_hard else [])]
    return Card(
        **question_fields(row, roots, tags, exif),
        prediction=row["prediction"],
        score=float(row[metric]),
        verdict=result,
        before=base["prediction"] if base else None,
        change=change,
        loss=row.get("loss"),
        is_hard=is_hard,
    )


def _images(row: Mapping[str, Any], roots: list[Path], exif: Exif) -> list[GalleryImage]:
    """The first images of a question."""
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return [show(name, roots, exif) for name in names[:_MOST_IMAGES]]


def question_fields(row: Prediction, roots: list[Path], tags: list[str], exif: Exif) -> dict[str, Any]:
    """The fields of `Question`, with a tag for each of its types after `tags`."""
    types = {key: str(row[key]) for key in ("answer_type", "question_type") if row.get(key)}
    return {
        "id": str(row["id"]),
        "question": row["question"],
        "answers": sorted(((text, float(count)) for text, count in row["answers"].items()), key=lambda pair: -pair[1]),
        "rejected": str(row.get("rejected", "")),
        "types": types,
        "images": _images(row, roots, exif),
        "tags": [*tags, *(f"{key}:{value}" for key, value in types.items())],
    }


def verdict(score: float) -> str:
    """right, where at least three annotators agree; wrong, where nobody does; else partly."""
    return "right" if score >= _RIGHT else "partly" if score > 0 else "wrong"


def choose(predictions: Sequence[Prediction], metric: str) -> set[int]:
    """Numbers of the answers to show: half of them right, and each image once, as far as there are enough.

    They are drawn by a hash of their `facts`, so that the same questions stay from one evaluation to the next.
    """
    seen: set[str] = set()
    fresh: list[int] = []
    again: list[int] = []
    for number in sorted(range(len(predictions)), key=lambda number: _draw(predictions[number])):
        name = str(predictions[number]["image"])
        (again if name in seen else fresh).append(number)
        seen.add(name)
    right: list[int] = []
    other: list[int] = []
    for number in (*fresh, *again):
        (right if verdict(predictions[number][metric]) == "right" else other).append(number)
    room = MOST_CARDS - len(hardest(predictions))
    num_right = min(len(right), max(room // 2, room - len(other)))
    return {*right[:num_right], *other[: room - num_right]}


def _draw(row: Prediction) -> bytes:
    return hashlib.sha256(" ".join(facts(row)).encode("utf-8", "replace")).digest()


def hardest(predictions: Sequence[Prediction]) -> list[int]:
    """Numbers of the answers with the highest loss, the highest first; empty where the evaluation stored no losses."""
    known = {number: value for number, row in enumerate(predictions) if (value := hardness(row)) is not None}
    return sorted(known, key=known.__getitem__, reverse=True)[:_MOST_HARD]


def image_roots(data: DataTable, key: str = "data.eval") -> list[Path]:
    """The folders that image names of `data.eval` or `data.train` are relative to. Without data.eval, data.train's."""
    sources = entries(data)
    named = sources.get(key, sources["data.train"])
    roots = [each.images or (each.path if Path(each.path).is_dir() else Path(each.path).parent) for each in named]
    return list(dict.fromkeys(map(Path, [*roots, cache_folder(data.cache_dir) / DOWNLOADS])))


def show(name: str, roots: Iterable[Path], exif: Exif = "ignore") -> GalleryImage:
    """The thumbnail of an image as the model sees it, or why there is none."""
    try:
        return show_file(image_file(name, roots), name, exif)
    except DataError as error:
        return GalleryImage(name=name, problem=error.problem)


def image_file(name: str, roots: Iterable[Path]) -> str:
    """The file of an image, wherever it is; DataError unless exactly one of the folders has it."""
    if part_of(name):
        return name
    kept = place_of(name, Path()).name if is_remote(name) else name
    files: list[str] = []
    problems: list[str] = []
    for root in roots:
        try:
            files.append(str(find_image(root, kept)))
        except DataError as error:
            problems.append(error.problem)
    if len(files) == 1:
        return files[0]
    problem = f"{len(files)} folders of the data have an image {name}" if files else " and ".join(problems)
    raise DataError("missing_image", problem, "Let one folder have it")


def show_file(file: str, name: str, exif: Exif) -> GalleryImage:
    """The thumbnail of a file, under a name, or why there is none."""
    try:
        return GalleryImage(name=name, uri=_thumbnail(file, exif))
    except DataError as error:
        return GalleryImage(name=name, problem=error.problem)


@functools.lru_cache(maxsize=4 * MOST_CARDS)
def _thumbnail(path: str, exif: Exif) -> str:
    """An image file as a small JPEG data URI. Kept, since evaluation after evaluation shows nearly the same.

    Raises:
        DataError: the file is not an image that can be read.
    """
    image = decode(path, exif)
    image.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
