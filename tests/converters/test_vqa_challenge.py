"""VQA's official files: what a record gets from them, and file, id and remedy of each flaw in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.converted import faults, records
from llava_accel.converters.faults import Part
from llava_accel.converters.vqa_challenge import vqa_parts
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError

Change = Callable[[dict[str, Any]], object]


def _answers(*texts: str) -> list[dict[str, object]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": place} for place, text in enumerate(texts, 1)]


def _write(folder: Path, change_questions: Change = id, change_annotations: Change = id) -> tuple[Path, Path]:
    """Two questions in OK-VQA's form, each file changed as told."""
    questions: dict[str, Any] = {
        "data_subtype": "val2014",
        "questions": [
            {"image_id": 9, "question": "What sport is this?", "question_id": 91},
            {"image_id": 25, "question": "How many?", "question_id": 250},
        ],
    }
    annotations: dict[str, Any] = {
        "question_types": {"four": "Sports and Recreation"},
        "annotations": [
            {
                "image_id": 25,
                "question_id": 250,
                "question_type": "count",
                "answer_type": "number",
                "answers": _answers("2"),
            },
            {
                "image_id": 9,
                "question_id": 91,
                "question_type": "four",
                "answer_type": "other",
                "answers": _answers("ride", "race", "race", "ride", "polo"),
            },
        ],
    }
    change_questions(questions)
    change_annotations(annotations)
    (folder / "q.json").write_text(json.dumps(questions))
    (folder / "a.json").write_text(json.dumps(annotations))
    return folder / "q.json", folder / "a.json"


def _part(folder: Path, files: tuple[Path, Path], suffix: str = "") -> Part:
    """What is made of a pair of files, with the images in `folder`/images."""
    (folder / "images").mkdir(exist_ok=True)
    (part,) = vqa_parts(files[:1], files[1:], [], folder / "images", suffix, folder)
    return part


def _images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    return folder / "images"


OFFICIAL = ("COCO_val2014_000000000009.jpg", "COCO_val2014_000000000025.jpg")


def test_a_record_holds_question_majority_answer_and_all_counts(tmp_path: Path) -> None:
    _images(tmp_path, *OFFICIAL)
    made = records(_part(tmp_path, _write(tmp_path), "Briefly."))
    assert made[0] == {
        "id": "91",
        "image": "COCO_val2014_000000000009.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat sport is this?\nBriefly."},
            {"from": "gpt", "value": "ride"},  # as frequent as "race", and first in the file
        ],
        "question": "What sport is this?",
        "answers": {"ride": 2, "race": 2, "polo": 1},
        "question_type": "Sports and Recreation",
        "answer_type": "other",
    }
    assert list(made[0]["answers"]) == ["ride", "race", "polo"]
    assert [record["id"] for record in made] == ["91", "250"]
    assert made[1]["question_type"] == "count"


def test_a_blank_answer_is_kept_for_scoring_but_never_trained_on(tmp_path: Path) -> None:
    def blank(annotations: dict[str, Any]) -> None:
        annotations["annotations"][1]["answers"] = _answers(" ", "polo", " ")

    _images(tmp_path, *OFFICIAL)
    record = records(_part(tmp_path, _write(tmp_path, change_annotations=blank)))[0]
    assert record["conversations"] == [
        {"from": "human", "value": "<image>\nWhat sport is this?"},
        {"from": "gpt", "value": "polo"},
    ]
    assert record["answers"] == {" ": 2, "polo": 1}


def test_images_are_found_under_either_name_and_one_folder_down(tmp_path: Path) -> None:
    _images(tmp_path, "val2014/COCO_val2014_000000000009.jpg", "train2017/000000000025.jpg")
    assert [record["image"] for record in records(_part(tmp_path, _write(tmp_path)))] == [
        "val2014/COCO_val2014_000000000009.jpg",
        "train2017/000000000025.jpg",
    ]


def test_missing_images_are_named_as_coco_does_with_where_they_are(tmp_path: Path) -> None:
    part = _part(tmp_path, _write(tmp_path))
    assert len(faults(part)) == 2 and part.images is not None
    problem, remedy = part.images.shortage()
    assert problem == f"2 of 2 images are not in {tmp_path / 'images'}: {', '.join(OFFICIAL)}"
    assert "--images" in remedy and "val2014.zip" in remedy


def test_an_image_folder_that_leads_outside_is_refused(tmp_path: Path) -> None:
    outside = _images(tmp_path / "elsewhere", *OFFICIAL)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val2014").symlink_to(outside)
    assert all("lies outside" in fault for fault in faults(_part(tmp_path, _write(tmp_path))))


@pytest.mark.parametrize(
    ("subtype", "name", "split"),
    [
        ("train2014", "q.json", "train"),
        (None, "my_val_questions.json", "val"),
        (None, "the_latest_val.json", "val"),
        ("test-dev2015", "q.json", "test-dev"),
    ],
)
def test_the_split_is_the_files_own(subtype: str | None, name: str, split: str, tmp_path: Path) -> None:
    questions, annotations = _write(tmp_path, lambda content: content.update(data_subtype=subtype))
    assert _part(tmp_path, (questions.rename(tmp_path / name), annotations)).out == tmp_path / f"{split}.jsonl"


def test_a_split_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--split-name"):
        _part(tmp_path, _write(tmp_path, lambda questions: questions.pop("data_subtype")))


def test_test_questions_have_no_annotations_and_are_refused(tmp_path: Path) -> None:
    questions, _ = _write(tmp_path)
    with pytest.raises(UserError, match="test questions, which have none, cannot be used"):
        list(vqa_parts([questions], [], [], tmp_path, "", tmp_path))


def _first(kind: str, **changes: object) -> Change:
    return lambda content: content[kind][0].update(changes)


@pytest.mark.parametrize(
    ("in_questions", "in_annotations", "file", "told"),
    [
        (lambda q: q.pop("questions"), id, "q.json", "has no list 'questions'"),
        (id, lambda a: a["annotations"].clear(), "a.json", "has no list 'annotations'"),
        (_first("questions", question_id=None), id, "q.json", "entry 1 of 'questions' has no 'question_id'"),
        (_first("questions", question_id=250), id, "q.json (id '250')", "occurs twice"),
        (_first("questions", question_id=7), id, "q.json", "1 question(s) have no annotation in"),
        (lambda q: q["questions"].pop(), id, "a.json", "1 question(s) have no question in"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    in_questions: Change, in_annotations: Change, file: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        _part(tmp_path, _write(tmp_path, in_questions, in_annotations))
    assert str(raised.value).startswith(f"{tmp_path / file}: ")
    assert told in str(raised.value) and raised.value.remedy


@pytest.mark.parametrize(
    ("in_questions", "in_annotations", "file", "told"),
    [
        (_first("questions", question=None), id, "q.json (id '91')", "needs a text 'question'"),
        (_first("questions", image_id="9"), id, "q.json (id '91')", "a number 'image_id'"),
        (id, _first("annotations", image_id=26), "a.json (id '250')", "the image is 26, but 25"),
        (id, _first("annotations", answers=[]), "a.json (id '250')", "needs a list 'answers'"),
        (id, _first("annotations", answers=[2]), "a.json (id '250')", "'answers' holds '2', which is not a text"),
        (id, _first("annotations", answers=_answers(" ")), "q.json (id '250')", "every answer is blank"),
        (_first("questions", question="\n"), id, "q.json (id '91')", "the question is blank"),
        (_first("questions", question="<image>?"), id, "q.json (id '91')", "every image gets one <image>"),
    ],
)
def test_a_flaw_of_a_question_is_told_with_file_and_id_and_spares_the_other(
    in_questions: Change, in_annotations: Change, file: str, told: str, tmp_path: Path
) -> None:
    _images(tmp_path, *OFFICIAL)
    part = _part(tmp_path, _write(tmp_path, in_questions, in_annotations))
    rows = list(part.rows)
    (fault,) = [str(row) for row in rows if isinstance(row, DataError)]
    assert len(rows) == 2 and fault.startswith(f"{tmp_path / file}: ") and told in fault


@pytest.mark.parametrize("content", [b"{oops", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_a_file_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    files = _write(tmp_path)
    files[0].write_bytes(content)
    with pytest.raises(DataError, match=r"q\.json: .*Give the official questions file"):
        _part(tmp_path, files)
    with pytest.raises(DataError, match=r"absent\.json: there is no such file"):
        _part(tmp_path, (tmp_path / "absent.json", files[1]))
    with pytest.raises(DataError, match="this is a folder"):
        _part(tmp_path, (tmp_path, files[1]))
