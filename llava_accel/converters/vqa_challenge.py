"""The question and annotation files of VQA v1, VQA v2 and OK-VQA -> records."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llava_accel.converters.formats import vqa_record
from llava_accel.data.images import find_image
from llava_accel.sources.problems import DataError, quoted, some


@dataclass(frozen=True, slots=True)
class _Question:
    image_id: int
    text: str


@dataclass(frozen=True, slots=True)
class _Annotation:
    answers: Mapping[str, int]
    question_type: str
    answer_type: str


@dataclass(frozen=True, kw_only=True)
class VqaPair:
    """A questions file and its annotations file, checked against each other."""

    path: Path
    """The questions file."""
    subtype: str
    """COCO's name of the image set, such as "train2014"; empty if neither the file nor its name tells."""
    questions: Mapping[int | str, _Question]
    """By question id, in the order of the file."""
    annotations: Mapping[int | str, _Annotation]

    @property
    def split(self) -> str:
        """The output file's name, "train" for "train2014": from the file's data_subtype, else from its name.

        Raises:
            DataError: neither tells.
        """
        for text in (self.subtype, self.path.name):
            if split := re.search(r"train|minival|val|test-?dev|test", text):
                return split.group()
        problem = "neither 'data_subtype' nor the file's name tells the split"
        raise DataError("fields", problem, "Give its name with --split-name", file=str(self.path))


def read_vqa_pair(questions: Path, annotations: Path) -> VqaPair:
    """Read two official JSON files about the same questions; DataError with file, id and remedy if they are not."""
    content, rows = _read(questions, "questions")
    asked: dict[int | str, _Question] = {}
    for question_id, row in rows.items():
        text, image_id = row.get("question"), row.get("image_id")
        if not isinstance(text, str) or not isinstance(image_id, int):
            problem = f"it needs a text 'question' and a number 'image_id', but is {quoted(row)}"
            raise _misfit(questions, question_id, problem)
        asked[question_id] = _Question(image_id, text)
    noted, answered = _read(annotations, "annotations")
    _check_ids(questions, asked, annotations, answered, "annotation")
    _check_ids(annotations, answered, questions, asked, "question")
    names = noted.get("question_types")  # OK-VQA says there what "one", "two", ... mean
    type_names = names if isinstance(names, dict) else {}
    image_set = re.search(r"(?:train|val|test)\d{4}", questions.name)
    subtype = content.get("data_subtype")
    return VqaPair(
        path=questions,
        subtype=subtype if isinstance(subtype, str) else image_set.group() if image_set else "",
        questions=asked,
        annotations={
            question_id: _annotation(annotations, question_id, row, asked[question_id], type_names)
            for question_id, row in answered.items()
        },
    )


def vqa_records(pair: VqaPair, images: Path, suffix: str) -> Iterator[dict[str, object]]:
    """One record a question, in the order of the questions file.

    Args:
        images: The folder of the images, or the folder above: COCO_train2014_000000000009.jpg or
            000000000009.jpg.
        suffix: The line below each question; empty: none.

    Raises:
        DataError: with file, id and remedy. Missing images are counted over the whole file.
    """
    try:
        names = image_names((question.image_id for question in pair.questions.values()), pair.subtype, images)
    except DataError as error:
        raise replace(error, file=str(pair.path)) from None
    for question_id, question in pair.questions.items():
        annotation = pair.annotations[question_id]
        try:
            yield vqa_record(
                record_id=str(question_id),
                image=names[question.image_id],
                question=question.text,
                answers=annotation.answers,
                suffix=suffix,
                question_type=annotation.question_type,
                answer_type=annotation.answer_type,
            )
        except DataError as error:
            raise replace(error, file=str(pair.path), id=str(question_id)) from None


def _read(path: Path, kind: str) -> tuple[Mapping[str, object], dict[int | str, Mapping[str, object]]]:
    remedy = f"Give the official {kind} file, unpacked, with --{kind}"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("json", "there is no such file", remedy, file=str(path)) from None
    except ValueError as error:  # both malformed JSON and bytes that are not UTF-8
        raise DataError("json", f"not valid JSON ({error})", remedy, file=str(path)) from None
    rows = content.get(kind) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError("fields", f"the file has no list {kind!r}", remedy, file=str(path))
    entries: dict[int | str, Mapping[str, object]] = {}
    for place, row in enumerate(rows, start=1):
        question_id = row.get("question_id") if isinstance(row, dict) else None
        if not isinstance(question_id, int | str):
            problem = f"entry {place} of {kind!r} has no 'question_id': {quoted(row)}"
            raise DataError("fields", problem, remedy, file=str(path))
        if question_id in entries:
            raise _misfit(path, question_id, "the question occurs twice")
        entries[question_id] = row
    return content, entries


def _annotation(
    path: Path, question_id: int | str, row: Mapping[str, object], question: _Question, type_names: Mapping[str, str]
) -> _Annotation:
    if row.get("image_id", question.image_id) != question.image_id:
        problem = f"the image is {row['image_id']}, but {question.image_id} in the questions file"
        raise _misfit(path, question_id, problem)
    given = row.get("answers")
    counts: dict[str, int] = {}
    for entry in given if isinstance(given, list) else []:
        answer = entry.get("answer") if isinstance(entry, dict) else None
        if not isinstance(answer, str):
            raise _misfit(path, question_id, f"an answer has no text 'answer': {quoted(entry)}")
        counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        raise _misfit(path, question_id, f"there are no 'answers': {quoted(row)}")
    question_type = str(row.get("question_type") or "")
    return _Annotation(counts, type_names.get(question_type, question_type), str(row.get("answer_type") or ""))


def _misfit(path: Path, question_id: int | str, problem: str) -> DataError:
    remedy = "Download the official file again, or correct this entry"
    return DataError("fields", problem, remedy, file=str(path), id=str(question_id))


def _check_ids(
    path: Path, ids: Iterable[int | str], other: Path, others: Mapping[int | str, object], wanted: str
) -> None:
    lone = [question_id for question_id in ids if question_id not in others]
    if lone:
        raise DataError(
            "fields",
            f"{len(lone)} question(s) have no {wanted} in {other}: {some(lone)}",
            "Give --questions and --annotations of the same splits, in the same order",
            file=str(path),
        )


def image_names(image_ids: Iterable[int], subtype: str, images: Path) -> dict[int, str]:
    """Image id -> name relative to `images`: COCO_train2014_000000000009.jpg, else 000000000009.jpg.

    Args:
        subtype: COCO's name of the image set, such as "train2014"; may be empty.
        images: The folder that holds the images, or the one above.

    Raises:
        DataError: without its place. Missing images are counted, and some of them named.
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
            f"{len(missing)} of {len(missing) + len(names)} images are not in {images}: {some(missing)}",
            f"Give the folder that holds them, or the one above it, with --images; they are in {source}",
        )
    return names


def _listing(folder: Path) -> dict[str, str]:
    """File name -> path relative to `folder`, of its files and those one folder down; the upper file comes first."""
    if not folder.is_dir():
        raise DataError("missing_image", f"there is no folder {folder}", "Check --images")
    paths: dict[str, str] = {}
    for place in ("", *sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())):
        for name in os.listdir(folder / place):
            paths.setdefault(name, f"{place}/{name}" if place else name)
    return paths
