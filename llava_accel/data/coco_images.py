"""COCO picture ids -> the files that a user has, however the folders were unpacked."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_accel.data.images import find_image
from llava_accel.data.problems import DataError


def image_names(image_ids: Iterable[int], subtype: str, images: Path) -> dict[int, str]:
    """Picture id -> name relative to `images`: COCO_train2014_000000000009.jpg, else 000000000009.jpg.

    Args:
        subtype: COCO's name of the picture set, such as "train2014"; may be empty.
        images: The folder that holds the pictures, or the one above.

    Raises:
        DataError: without its place. Missing pictures are counted, not only the first one told.
    """
    present = _listing(images)
    names: dict[int, str] = {}
    missing: list[str] = []
    for image_id in dict.fromkeys(image_ids):
        plain = f"{image_id:012d}.jpg"
        official = f"COCO_{subtype}_{plain}" if subtype else plain
        name = present.get(official) or present.get(plain)
        if name is None:
            missing.append(official)
        else:
            find_image(images, name)
            names[image_id] = name
    if missing:
        source = f"http://images.cocodataset.org/zips/{subtype or 'train2014'}.zip"
        raise DataError(
            "missing_image",
            f"{len(missing)} of {len(missing) + len(names)} pictures are not in {images}: {some(missing)}",
            f"Give the folder that holds them, or the one above it, with --images; they are in {source}",
        )
    return names


def _listing(folder: Path) -> dict[str, str]:
    """File name -> path relative to `folder`, of its files and those one folder down; the upper file wins."""
    if not folder.is_dir():
        raise DataError("missing_image", f"there is no folder {folder}", "Check --images")
    found: dict[str, str] = {}
    for place in ("", *sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())):
        for name in os.listdir(folder / place):
            found.setdefault(name, f"{place}/{name}" if place else name)
    return found


def some(items: Sequence[object], limit: int = 5) -> str:
    """The first few of many, for an error message."""
    return ", ".join(map(str, items[:limit])) + (", ..." if len(items) > limit else "")
