"""COCO's captions_train2017.json and the like -> records."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_accel.converters.entry import AGAIN, Rows, make_record, placed, read_json, text_of
from llava_accel.converters.faults import Part
from llava_accel.converters.image_lookup import ImageLookup
from llava_accel.converters.question_files import split_of
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted

_REMEDY = "Give the official file, such as captions_train2017.json, unpacked, with --file"


def caption_parts(
    files: Sequence[Path], names: Sequence[str], images: Path, question: str, per_image: bool, out: Path
) -> Iterator[Part]:
    """One part per file.

    Args:
        names: Split names, one per file; empty: taken from the files.
        images: The folder of the images, or the one above it.
        question: Asks for a caption, in every record.
        per_image: One record per image, with all its captions as answers; else one per caption.

    Raises:
        UserError: with file and remedy.
    """
    written: set[str] = set()
    for number, file in enumerate(files):
        split = names[number] if names else split_of(file)
        if split in written:
            raise UserError(f"{file}: a second split {split!r}. Give --split-name, one name per file.")
        written.add(split)
        content = read_json(file, _REMEDY)
        captions, known = (_list(content, key, file) for key in ("annotations", "images"))
        image_set = re.search(r"(?:train|val)\d{4}", file.name)
        source = f"http://images.cocodataset.org/zips/{image_set.group() if image_set else 'train2017'}.zip"
        lookup = ImageLookup(images, source)
        file_names = {str(image.get("id")): image for image in known}
        rows = _rows(file, captions, file_names, lookup, question, per_image)
        yield Part(out=out / f"{split}.jsonl", rows=rows, source=str(file), images=lookup)


def _list(content: object, key: str, file: Path) -> list[dict[str, Any]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        problem = f"it has no list {key!r}"
        if key == "annotations" and isinstance(content, dict) and content.get("images"):
            raise DataError("fields", f"{problem}: COCO's test images have no captions", "Leave it out", file=str(file))
        raise DataError("fields", problem, _REMEDY, file=str(file))
    return rows


def _rows(
    file: Path,
    captions: Sequence[Mapping[str, Any]],
    file_names: Mapping[str, Mapping[str, Any]],
    images: ImageLookup,
    question: str,
    per_image: bool,
) -> Rows:
    of_image: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for caption in captions:
        of_image[str(caption.get("image_id"))].append(caption)
    for image_id, group in of_image.items():
        texts = [str(caption.get("caption") or "").strip() for caption in group]
        for caption, text in zip(group, texts, strict=True):
            name = image_id if per_image else str(caption.get("id"))
            try:
                if image_id not in file_names:
                    raise DataError("fields", f"'images' has no image {quoted(image_id)}", AGAIN)
                image = images.find(text_of(file_names[image_id], "file_name"))
                if not per_image:
                    text_of(caption, "caption")
                answers = Counter(texts) if per_image else {text: 1}
                yield make_record(record_id=name, images=[image], question=question, answers=answers)
            except DataError as error:
                yield placed(error, file, name)
            if per_image:
                break
