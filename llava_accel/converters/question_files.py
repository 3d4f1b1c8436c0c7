"""Data sets whose JSON files hold questions together with answers: A-OKVQA, GQA, VizWiz, TextVQA, DocVQA and ChartQA."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_accel.converters.entry import AGAIN, Rows, lettered, make_record, placed, read_json, text_of, texts_of
from llava_accel.converters.faults import Part
from llava_accel.converters.image_lookup import ImageLookup
from llava_accel.data.annotations import with_options
from llava_accel.sources.problems import DataError, quoted

_Row = Mapping[str, Any]
_Questions = Sequence[tuple[object, Any]]
"""Questions with their ids; "" where the data set gives none."""
_SPLIT = re.compile(r"(?<![a-z])(?:trainval|train|minival|val|test-?dev|test)")
_CHART_QUESTION = "query"


@dataclass(frozen=True)
class Form:
    """How a data set writes its questions.

    Args:
        unpack: Content of a file -> its questions; none for content of another form.
        fields: Question, name of its file -> `question`, `answers` and what else a record gets.
        image: Question, split -> names that its image may have below the folder, the best first.
        answer: The field that files without answers lack.
        file: The names of the data set's files, for messages.
        images_from: Where the images can be downloaded.
        asked: The field that holds the question.
        unwanted: A field that is true for questions that are left out, and the words for these in the note about it.
    """

    unpack: Callable[[Any], _Questions]
    fields: Callable[[_Row, str], dict[str, Any]]
    image: Callable[[_Row, str], Sequence[str]]
    answer: str
    file: str
    images_from: str
    asked: str = "question"
    unwanted: tuple[str, str] = ("", "")


def question_parts(
    form: Form, files: Sequence[Path], names: Sequence[str], images: Path, suffix: str, out: Path
) -> Iterator[Part]:
    """One part per split; files of the same split become one.

    Args:
        names: Split names, one per file; empty: taken from the files.
        images: The folder of the images, or the one above it.
        suffix: The line below each question; empty: none.

    Raises:
        DataError: with file and remedy.
    """
    by_split: dict[str, dict[Path, _Questions]] = defaultdict(dict)
    for number, file in enumerate(files):
        by_split[names[number] if names else split_of(file)][file] = _read(form, file)
    for split, contents in by_split.items():
        lookup, notes = ImageLookup(images, form.images_from), []
        yield Part(
            out=out / f"{split}.jsonl",
            rows=_rows(form, contents, split, suffix, lookup, notes),
            source=" and ".join(map(str, contents)),
            images=lookup,
            notes=notes,
        )


def split_of(file: Path, hint: str = "") -> str:
    """The split of a file, "train" for "TextVQA_0.5.1_train.json".

    Args:
        hint: The split in the file's own words, such as "train2014".

    Raises:
        DataError: neither this nor the file's name tells.
    """
    match = _SPLIT.search(hint.lower()) or _SPLIT.search(file.name.lower())
    if match is None:
        problem = "neither the file's name nor its content tells the split"
        raise DataError("fields", problem, "Give its name with --split-name", file=str(file))
    return match.group()


def _read(form: Form, file: Path) -> _Questions:
    remedy = f"Give the official {form.file}, unpacked, with --file"
    questions = form.unpack(read_json(file, remedy))
    if not any(question_id is not None and form.asked in row for question_id, row in questions):
        raise DataError("fields", "it does not have the form of the official file", remedy, file=str(file))
    if all(row.get(form.answer) is None for _, row in questions):
        problem = f"none of its {len(questions):,} questions has {form.answer!r}, as in a test split without answers"
        raise DataError("fields", problem, "Leave it out: nothing can be learned or scored with it", file=str(file))
    return questions


def _rows(
    form: Form, contents: Mapping[Path, _Questions], split: str, suffix: str, images: ImageLookup, notes: list[str]
) -> Rows:
    num_unwanted = 0
    for file, questions in contents.items():
        for place, (question_id, row) in enumerate(questions, start=1):
            if form.unwanted[0] and row.get(form.unwanted[0]) is True:
                num_unwanted += 1
                continue
            name = f"{file.stem}-{place}" if question_id == "" else str(question_id)
            try:
                if not isinstance(question_id, int | str):
                    raise DataError("fields", f"question {place} of the file has no id", AGAIN)
                image = images.find(*form.image(row, split))
                fields = form.fields(row, file.name)
                yield make_record(record_id=name, images=[image], **{"suffix": suffix, **fields})
            except DataError as error:
                yield placed(error, file, name)
    if num_unwanted:
        notes.append(f"left out {num_unwanted:,} {form.unwanted[1]}")


def _listed(rows: object, id_key: str) -> _Questions:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return []
    return [(row.get(id_key) if id_key else "", row) for row in rows]


def _in_data(content: object, id_key: str) -> _Questions:
    return _listed(content.get("data"), id_key) if isinstance(content, dict) else []


def _by_id(content: object) -> _Questions:
    is_one = isinstance(content, dict) and all(isinstance(row, dict) for row in content.values())
    return list(content.items()) if is_one and isinstance(content, dict) else []


def _direct(row: _Row, _: str) -> dict[str, Any]:
    return {"question": text_of(row, "question"), "answers": Counter(texts_of(row, "direct_answers"))}


def _choice(row: _Row, _: str) -> dict[str, Any]:
    question, choices = text_of(row, "question"), texts_of(row, "choices")
    letter = lettered(choices, row.get("correct_choice_idx"))
    return {"question": question, "prompt": with_options(question, choices), "answers": {letter: 1}, "choices": choices}


def _gqa(row: _Row, _: str) -> dict[str, Any]:
    types = row.get("types")
    structure = str(types.get("structural") or "") if isinstance(types, dict) else ""
    kinds = {"question_type": structure, "answer_type": "open" if structure == "query" else "binary"}
    return {
        "question": text_of(row, "question"),
        "answers": {text_of(row, "answer"): 1},
        **(kinds if structure else {}),
    }


def _answered(row: _Row, _: str) -> dict[str, Any]:
    types = row.get("question_types")
    return {
        "question": text_of(row, "question"),
        "answers": Counter(texts_of(row, "answers")),
        "question_type": ", ".join(map(str, types)) if isinstance(types, list) else "",
        "answer_type": str(row.get("answer_type") or ""),
    }


def _chart(row: _Row, file: str) -> dict[str, Any]:
    kind = re.search("human|augmented", file)
    return {
        "question": text_of(row, _CHART_QUESTION),
        "answers": {text_of(row, "label"): 1},
        "question_type": kind.group() if kind else "",
    }


def _coco_image(row: _Row, _: str) -> Sequence[str]:
    number = row.get("image_id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError("fields", f"it needs a number 'image_id', but has {quoted(number)}", AGAIN)
    # COCO never gives a number twice, whatever the year and the split.
    return [f"{prefix}{number:012d}.jpg" for prefix in ("", "COCO_train2014_", "COCO_val2014_")]


def _document(row: _Row, split: str) -> Sequence[str]:
    name = text_of(row, "image")
    return [name, f"{split}/{name}", name.rpartition("/")[2]]


def _chart_image(row: _Row, split: str) -> Sequence[str]:
    name = text_of(row, "imgname")
    return [f"{split}/png/{name}", f"png/{name}", name]


_AOKVQA = Form(
    unpack=lambda content: _listed(content, "question_id"),
    fields=_direct,
    image=_coco_image,
    answer="direct_answers",
    file="aokvqa_v1p0_train.json or aokvqa_v1p0_val.json",
    images_from="http://images.cocodataset.org/zips/train2017.zip and val2017.zip",
    unwanted=(
        "difficult_direct_answer",
        "questions that are marked difficult_direct_answer: they are only asked with their choices",
    ),
)
FORMS: dict[str, Form] = {
    "aokvqa": _AOKVQA,
    "aokvqa choice": replace(_AOKVQA, fields=_choice, answer="correct_choice_idx", unwanted=("", "")),
    "gqa": Form(
        unpack=_by_id,
        fields=_gqa,
        image=lambda row, _: [f"{text_of(row, 'imageId')}.jpg"],
        answer="answer",
        file="questions file, such as train_balanced_questions.json",
        images_from="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    ),
    "vizwiz": Form(
        unpack=lambda content: _listed(content, "image"),
        fields=_answered,
        image=lambda row, _: [text_of(row, "image")],
        answer="answers",
        file="train.json or val.json of Annotations.zip",
        images_from="https://vizwiz.cs.colorado.edu/VizWiz_final/images/ (train.zip and val.zip)",
    ),
    "textvqa": Form(
        unpack=lambda content: _in_data(content, "question_id"),
        fields=_answered,
        image=lambda row, _: [f"{text_of(row, 'image_id')}.jpg"],
        answer="answers",
        file="TextVQA_0.5.1_train.json or TextVQA_0.5.1_val.json",
        images_from="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    ),
    "docvqa": Form(
        unpack=lambda content: _in_data(content, "questionId"),
        fields=_answered,
        image=_document,
        answer="answers",
        file="train_v1.0_withQT.json or val_v1.0_withQT.json",
        images_from="https://rrc.cvc.uab.es/?ch=17&com=downloads (after signing in)",
    ),
    "chartqa": Form(
        unpack=lambda content: _listed(content, ""),
        fields=_chart,
        image=_chart_image,
        answer="label",
        asked=_CHART_QUESTION,
        file="train_human.json, train_augmented.json or their val and test",
        images_from="https://github.com/vis-nlp/ChartQA (ChartQA Dataset/*/png)",
    ),
}
"""Name of the source -> its form; A-OKVQA has a second form."""
