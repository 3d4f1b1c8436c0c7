"""Other people's data -> records: what all converters share, tables (CSV), and the data set easy-VQA.

The question and annotation files of VQA and OK-VQA are in `vqa_challenge.py`.
"""

import csv
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from llava_accel.data.conversation import IMAGE
from llava_accel.data.images import find_image
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted
from llava_accel.storage.jsonl import write_json_lines

_YES_NO = frozenset({"yes", "no"})
_SHAPES = frozenset({"circle", "rectangle", "triangle"})


def vqa_record(
    *,
    record_id: str,
    image: str,
    question: str,
    answers: Mapping[str, int],
    suffix: str = "",
    question_type: str = "",
    answer_type: str = "",
) -> dict[str, object]:
    """One question on one image, as `records.py` reads it.

    Args:
        image: Image name relative to the recipe's data.images.
        answers: Answer -> number of annotators, in the order of the file. The most frequent one is trained
            on, the first of equals; blank ones are kept for scoring, but never trained on.
        suffix: A line put below the question, such as how to answer.

    Raises:
        DataError: without its place, for a blank question or answer, or one that holds `<image>`.
    """
    if not question.strip():
        raise DataError("empty", "the question is blank", "Fill it in, or remove it from the file")
    candidates = [answer for answer in answers if answer.strip()]
    if not candidates:
        raise DataError("empty", "every answer is blank", "Fill one in, or remove the question from the file")
    target = max(candidates, key=answers.__getitem__)
    for text in (question, target):
        if IMAGE in text:
            remedy = f"Take it out: every question gets one {IMAGE}"
            raise DataError("image_count", f"{quoted(text)} holds {IMAGE}", remedy)
    prompt = "\n".join(filter(None, [IMAGE, question, suffix]))
    record: dict[str, object] = {
        "id": record_id,
        "image": image,
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": target}],
        "question": question,
        "answers": dict(answers),
    }
    types = {"question_type": question_type, "answer_type": answer_type}
    return record | {name: value for name, value in types.items() if value}


def csv_records(
    file: Path,
    images: Path,
    *,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    delimiter: str = ",",
    suffix: str = "",
) -> Iterator[dict[str, object]]:
    """The rows of a table with a header, in UTF-8 (a byte order mark is fine), one question and answer each.

    Raises:
        DataError: with file, line and remedy.
    """
    columns = (image_column, question_column, answer_column)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, delimiter=delimiter, strict=True)
            if missing := [name for name in columns if name not in (table.fieldnames or [])]:
                raise DataError(
                    "fields",
                    f"there is no column {', '.join(map(repr, missing))} among {quoted(table.fieldnames)}",
                    "Name the columns with --image-column, --question-column and --answer-column, "
                    "and what separates them with --delimiter",
                    file=str(file),
                    row=1,
                )
            for number, row in enumerate(table, start=1):
                try:
                    image, question, answer = _cells(row, columns)
                    find_image(images, image)
                    yield vqa_record(
                        record_id=f"{file.stem}-{number}",
                        image=image,
                        question=question,
                        answers={answer: 1},
                        suffix=suffix,
                    )
                except DataError as error:
                    raise error.at(str(file), table.line_num, None) from None
    except FileNotFoundError:
        raise DataError("json", "there is no such file", "Check --file", file=str(file)) from None
    except UnicodeDecodeError as error:
        raise DataError("json", f"not UTF-8 ({error})", "Save it as CSV UTF-8", file=str(file)) from None
    except csv.Error as error:
        raise DataError("json", f"not well-formed CSV ({error})", "Check its quotes", file=str(file)) from None


def _cells(row: Mapping[str | None, str | None], columns: tuple[str, str, str]) -> list[str]:
    if None in row:
        raise DataError("fields", "the row has more cells than the header", "Put text with commas in quotes")
    cells: list[str] = []
    for name in columns:
        cell = (row[name] or "").strip()
        if not cell:
            raise DataError("empty", f"the column {name!r} is blank", "Fill it in, or remove the row")
        cells.append(cell)
    return cells


def easy_vqa_folder() -> Path:
    """Where the installed package `easy_vqa` keeps its data; UserError if it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The package easy-vqa is not installed. Run: python -m pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def convert_easy_vqa(source: Path, out: Path) -> dict[str, int]:
    """Write train.jsonl, test.jsonl and a copy of the images into `out`, so that the folder needs no other.

    Args:
        source: Folder with {train,test}/questions.json, rows of [question, answer, image id], and
            {train,test}/images/{id}.png.

    Returns:
        Questions by split.

    Raises:
        DataError: with file, row and remedy.
    """
    counts: dict[str, int] = {}
    for split in ("train", "test"):
        questions = source / split / "questions.json"
        try:
            rows = json.loads(questions.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            remedy = "Install it again: python -m pip install --force-reinstall easy-vqa"
            raise DataError("json", f"cannot be read ({error})", remedy, file=str(questions)) from None
        images = out / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        for name in sorted({f"{image_id}.png" for _, _, image_id in rows}):
            shutil.copyfile(find_image(source / split / "images", name), images / name)
        counts[split] = write_json_lines(
            (
                vqa_record(
                    record_id=f"easy-vqa-{split}-{number}",
                    image=f"{split}/{image_id}.png",
                    question=question,
                    answers={answer: 1},
                    question_type="yes-no" if answer in _YES_NO else "shape" if answer in _SHAPES else "color",
                )
                for number, (question, answer, image_id) in enumerate(rows)
            ),
            out / f"{split}.jsonl",
        )
    return counts
