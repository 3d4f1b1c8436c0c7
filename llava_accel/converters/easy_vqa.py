"""The data set easy-VQA, from its installed package -> records and a copy of the images."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from llava_accel.converters.entry import make_record, read_json
from llava_accel.converters.faults import Part
from llava_accel.data.images import find_image
from llava_accel.exceptions import UserError

_YES_NO = frozenset({"yes", "no"})
_SHAPES = frozenset({"circle", "rectangle", "triangle"})


def easy_vqa_folder() -> Path:
    """The folder in which the installed package `easy_vqa` keeps its data; UserError if it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The package easy-vqa is not installed. Run: python -m pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def easy_vqa_parts(source: Path, out: Path) -> Iterator[Part]:
    """Copy the images into `out`, so that the folder needs no other, and give the parts train and test.

    Args:
        source: Folder with {train,test}/questions.json, rows of [question, answer, image id], and
            {train,test}/images/{id}.png.

    Raises:
        DataError: with file and remedy.
    """
    for split in ("train", "test"):
        file = source / split / "questions.json"
        questions = read_json(file, "Install it again: python -m pip install --force-reinstall easy-vqa")
        images = out / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        for name in sorted({f"{image_id}.png" for _, _, image_id in questions}):
            shutil.copyfile(find_image(source / split / "images", name), images / name)
        rows = (
            make_record(
                record_id=f"easy-vqa-{split}-{number}",
                images=[f"{split}/{image_id}.png"],
                question=question,
                answers={answer: 1},
                question_type="yes-no" if answer in _YES_NO else "shape" if answer in _SHAPES else "color",
            )
            for number, (question, answer, image_id) in enumerate(questions)
        )
        yield Part(out=out / f"{split}.jsonl", rows=rows, source=str(file))
