"""Finds the images of a data file where the user does not name their folder."""

import os
import shlex
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from llava_accel.data.corpus import Corpus
from llava_accel.data.images import find_image
from llava_accel.data.survey import Survey
from llava_accel.sources.problems import DataError

_USUAL = ("images", "image", "imgs", "img", "pictures", "photos", "train", "coco", "data")
_MOST = 50  # folders that are tried


def find_folder(names: Sequence[str], own: Path) -> Path | None:
    """The folder near `own` in which most of the images are; None if that is `own` itself, or none has any.

    Args:
        names: Names of some images, as records have them.
        own: The folder of the data file.
    """
    folders = (own, *islice(_near(names, own), _MOST))
    counts = {folder: sum(_is_there(folder, name) for name in names) for folder in folders}
    best = max(counts, key=lambda folder: counts[folder])  # the first of equals
    return best if counts[best] > counts[own] else None


def folder_remarks(corpus: Corpus, survey: Survey) -> list[str]:
    """A line that says where missing images are, if they were found near the data; else none."""
    rows = [row for row, error in survey.errors.items() if error.kind == "missing_image"][:_MOST]
    names = [name for row in rows for name in corpus.record(row).images]
    folder = find_folder(names, corpus.root(rows[0])) if names else None
    return [f"images that are missing are in {folder}: set data.images={shlex.quote(str(folder))}"] if folder else []


def _near(names: Sequence[str], own: Path) -> Iterator[Path]:
    absolute = [os.path.dirname(name) for name in names if os.path.isabs(name)]
    if absolute and len(absolute) == len(names):
        yield Path(os.path.commonpath(absolute))
    for folder in (own, own / os.pardir):
        inner = [path for path in _sorted(folder) if path.name.lower() in _USUAL]
        yield from sorted(inner, key=lambda path: _USUAL.index(path.name.lower()))
    yield Path(os.path.normpath(own / os.pardir))
    yield from _sorted(own)


def _sorted(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, 10_000) if entry.is_dir())
    except OSError:
        return []
    return [Path(os.path.normpath(folder / name)) for name in names]


def _is_there(folder: Path, name: str) -> bool:
    try:
        return bool(find_image(folder, name))
    except DataError:
        return False
