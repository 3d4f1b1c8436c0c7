"""ScienceQA's two files: LLaVA's own prompts, letters, and `<image>` only where a problem has an image."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.converted import records
from llava_accel.converters.faults import Part
from llava_accel.converters.science_qa import science_parts
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError

PROBLEM: dict[str, Any] = {
    "question": "Which of these states is farthest north?",
    "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
    "answer": 0,
    "hint": "",
    "image": "image.png",
    "task": "closed choice",
    "grade": "grade2",
    "subject": "social science",
    "topic": "geography",
    "category": "Geography",
    "skill": "Read a map: cardinal directions",
    "lecture": "Maps have four directions.\nNorth is up.",
    "solution": "Look at the compass.  West Virginia is up.",
    "split": "train",
}
TEXT_ONLY = PROBLEM | {"image": None, "hint": "A magnet\nis on  the table.", "answer": 1, "split": "val", "lecture": ""}


def write(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """problems.json, the second of whose problems has no image, and pid_splits.json."""
    (folder / "images/train/1").mkdir(parents=True, exist_ok=True)
    (folder / "images/train/1/image.png").touch()
    problems = {"1": PROBLEM | changes, "2": TEXT_ONLY}
    splits = {"train": ["1"], "val": ["2"], "test": ["2"], "minitrain": ["1"], "trainval": ["1", "2"]}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder / "problems.json", folder / "pid_splits.json"


def parts(
    folder: Path, names: Sequence[str], explains: bool = False, images: str = "images", **changes: Any
) -> list[Part]:
    return list(science_parts(*write(folder, **changes), names, folder / images, explains, folder))


def test_llava_1_5_is_asked_for_a_letter_with_the_context_first(tmp_path: Path) -> None:
    train, val = parts(tmp_path, ["train", "val"])
    (record,) = records(train)
    assert (record["id"], record["image"], train.out.name) == ("1", "train/1/image.png", "train.jsonl")
    assert [turn["value"] for turn in record["conversations"]] == [
        "<image>\nContext: N/A\nQuestion: Which of these states is farthest north?\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma\n"
        "Answer with the option's letter from the given choices directly.",
        "A",
    ]
    assert record["choices"] == PROBLEM["choices"] and record["answers"] == {"A": 1}
    assert (record["question_type"], record["answer_type"]) == ("social science", "grade2")
    (text,) = records(val)
    assert "image" not in text and "<image>" not in text["conversations"][0]["value"]
    assert text["conversations"][0]["value"].startswith("Context: A magnet\nis on the table.\nQuestion: ")


def test_explanations_are_in_the_form_that_llava_was_trained_on(tmp_path: Path) -> None:
    (part,) = parts(tmp_path, ["trainval"], explains=True)
    first, second = (record["conversations"] for record in records(part))
    assert [turn["value"] for turn in first] == [
        "<image>\nWhich of these states is farthest north?\nContext: N/A\n"
        "Options: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma",
        "Maps have four directions.\nNorth is up. Look at the compass. West Virginia is up. The answer is A.",
    ]
    assert second[1]["value"] == "Look at the compass. West Virginia is up. The answer is B."


def test_the_images_folder_may_be_that_of_a_split_or_the_one_above(tmp_path: Path) -> None:
    for images, name in (("images/train", "1/image.png"), (".", "images/train/1/image.png")):
        (part,) = parts(tmp_path, ["minitrain"], images=images)
        assert records(part)[0]["image"] == name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"answer": 4}, "the right option is '4'"),
        ({"choices": ["a"]}, "there are 1 choices"),
        ({"question": ""}, "the question is blank"),
        ({"image": "other.png"}, "no image 'train/1/other.png'"),
        ({"hint": 3}, "needs a text 'hint'"),
    ],
)
def test_a_flaw_of_a_problem_is_told_with_its_number(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    (part,) = parts(tmp_path, ["trainval"], **changes)
    fault, record = part.rows
    assert isinstance(fault, DataError) and isinstance(record, dict)
    assert str(fault).startswith(f"{tmp_path / 'problems.json'} (id '1'): ") and told in str(fault)


def test_a_split_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--splits dev: .* has only train, val, test, minitrain, trainval"):
        parts(tmp_path, ["dev"])


def test_files_of_two_versions_are_told(tmp_path: Path) -> None:
    problems, splits = write(tmp_path)
    splits.write_text('{"train": ["7"]}')
    (part,) = science_parts(problems, splits, ["train"], tmp_path / "images", False, tmp_path)
    (fault,) = part.rows
    assert "(id '7')" in str(fault) and "Give both of one version" in str(fault)
    splits.write_text("[]")
    with pytest.raises(DataError, match=r"pid_splits\.json: it is not a JSON object"):
        list(science_parts(problems, splits, ["train"], tmp_path / "images", False, tmp_path))
