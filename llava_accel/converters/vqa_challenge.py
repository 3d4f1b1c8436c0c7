"""The question and annotation files of VQA v1, VQA v2 and OK-VQA -> records."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_accel.converters.entry import AGAIN, Rows, make_record, placed, read_json, text_of, texts_of
from llava_accel.converters.faults import Part
from llava_accel.converters.image_lookup import ImageLookup
from llava_accel.converters.question_files import split_of
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted, some

_Entries = Mapping[int | str, Mapping[str, Any]]
"""Question id -> question or annotation, in the order of the file."""


class _Pair(NamedTuple):
    asked_in: Path
    asked: _Entries
    answered_in: Path
    answered: _Entries
    subtype: str
    types: Mapping[str, str]


def vqa_parts(
    questions: Sequence[Path], annotations: Sequence[Path], names: Sequence[str], images: Path, suffix: str, out: Path
) -> Iterator[Part]:
    """One part per pair of files, which are checked against each other.

    Args:
        names: Split names, one per pair; empty: taken from the files.
        images: The folder of the images, or the one above: COCO_train2014_000000000009.jpg or 000000000009.jpg.
        suffix: The line below each question; empty: none.

    Raises:
        UserError: with file, id and remedy.
    """
    if len(questions) != len(annotations):
        raise UserError(
            f"--questions names {len(questions)} file(s), --annotations {len(annotations)}. Give one annotations file "
            "for each questions file, in the same order; test questions, which have none, cannot be used."
        )
    written: set[str] = set()
    for number, (asked_in, answered_in) in enumerate(zip(questions, annotations, strict=True)):
        content, asked = _read(asked_in, "questions")
        noted, answered = _read(answered_in, "annotations")
        _check_ids(asked_in, asked, answered_in, answered, "annotation")
        _check_ids(answered_in, answered, asked_in, asked, "question")
        subtype = _subtype(content, asked_in)
        split = names[number] if names else split_of(asked_in, subtype)
        if split in written:
            raise UserError(f"{asked_in}: a second split {split!r}. Give --split-name, one name per pair.")
        written.add(split)
        lookup = ImageLookup(images, f"http://images.cocodataset.org/zips/{subtype or 'train2014'}.zip")
        types = noted.get("question_types")  # OK-VQA says there what "one", "two", ... mean
        pair = _Pair(asked_in, asked, answered_in, answered, subtype, types if isinstance(types, dict) else {})
        rows = _rows(pair, lookup, suffix)
        yield Part(out=out / f"{split}.jsonl", rows=rows, source=str(asked_in), images=lookup)


def _subtype(content: Mapping[str, Any], questions: Path) -> str:
    """COCO's name of the image set, such as "train2014"; empty if neither the file nor its name tells."""
    subtype = content.get("data_subtype")
    image_set = re.search(r"(?:train|val|test)\d{4}", questions.name)
    return subtype if isinstance(subtype, str) else image_set.group() if image_set else ""


def _rows(pair: _Pair, images: ImageLookup, suffix: str) -> Rows:
    for question_id, row in pair.asked.items():
        name, file = str(question_id), pair.asked_in
        try:
            question, image_id = text_of(row, "question"), row.get("image_id")
            if isinstance(image_id, bool) or not isinstance(image_id, int):
                raise DataError("fields", f"it needs a number 'image_id', but has {quoted(image_id)}", AGAIN)
            file, annotation = pair.answered_in, pair.answered[question_id]
            if annotation.get("image_id", image_id) != image_id:
                problem = f"the image is {annotation['image_id']}, but {image_id} in the questions file"
                raise DataError("fields", problem, AGAIN)
            answers, kind = Counter(texts_of(annotation, "answers")), str(annotation.get("question_type") or "")
            file, plain = pair.asked_in, f"{image_id:012d}.jpg"
            yield make_record(
                record_id=name,
                images=[images.find(*([f"COCO_{pair.subtype}_{plain}"] if pair.subtype else []), plain)],
                question=question,
                answers=answers,
                suffix=suffix,
                question_type=pair.types.get(kind, kind),
                answer_type=str(annotation.get("answer_type") or ""),
            )
        except DataError as error:
            yield placed(error, file, name)


def _read(path: Path, kind: str) -> tuple[Mapping[str, Any], _Entries]:
    remedy = f"Give the official {kind} file, unpacked, with --{kind}"
    content = read_json(path, remedy)
    rows = content.get(kind) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError("fields", f"the file has no list {kind!r}", remedy, file=str(path))
    entries: dict[int | str, Mapping[str, Any]] = {}
    for place, row in enumerate(rows, start=1):
        question_id = row.get("question_id") if isinstance(row, dict) else None
        if not isinstance(question_id, int | str):
            problem = f"entry {place} of {kind!r} has no 'question_id': {quoted(row)}"
            raise DataError("fields", problem, remedy, file=str(path))
        if question_id in entries:
            raise DataError("duplicate_id", "the question occurs twice", AGAIN, file=str(path), id=str(question_id))
        entries[question_id] = row
    return content, entries


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
