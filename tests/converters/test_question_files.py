"""A-OKVQA, GQA, VizWiz, TextVQA, DocVQA and ChartQA: a small file of each official form, and what is made of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.converted import records
from llava_accel.converters.faults import Part
from llava_accel.converters.question_files import FORMS, question_parts
from llava_accel.data.records import parse_record
from llava_accel.sources.problems import DataError

AOKVQA: list[dict[str, Any]] = [
    {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man waiting for?",
        "choices": ["a skateboard", "a train", "a parcel", "a cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"],
        "difficult_direct_answer": False,
        "rationales": ["He has luggage.", "There is a road.", "He looks at the road."],
    },
    {
        "split": "train",
        "image_id": 25,
        "question_id": "2gCYdsHwQrVXJsVoD5cA3L",
        "question": "How many?",
        "choices": ["one", "two", "three", "four"],
        "correct_choice_idx": 1,
        "direct_answers": ["2"] * 10,
        "difficult_direct_answer": True,
        "rationales": ["", "", ""],
    },
]
GQA: dict[str, Any] = {
    "02930152": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    },
    "07333408": {
        "question": "What is on the wall?",
        "imageId": "n171",
        "answer": "pipe",
        "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
    },
}
VIZWIZ: list[dict[str, Any]] = [
    {
        "image": "VizWiz_train_00000000.jpg",
        "question": "What's the name of this product?",
        "answers": [{"answer_confidence": "yes", "answer": "basil leaves"}] * 6
        + [{"answer_confidence": "maybe", "answer": "basil"}] * 4,
        "answer_type": "other",
        "answerable": 1,
    },
    {
        "image": "VizWiz_train_00000001.jpg",
        "question": "Can you read it?",
        "answers": [{"answer_confidence": "no", "answer": "unanswerable"}] * 10,
        "answer_type": "unanswerable",
        "answerable": 0,
    },
]
TEXTVQA: dict[str, Any] = {
    "dataset_type": "train",
    "dataset_name": "textvqa",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand of phone?",
            "image_id": "0054c91397f2fe05",
            "image_classes": ["Belt", "Mobile phone"],
            "flickr_original_url": "https://farm1.staticflickr.com/0_o.jpg",
            "flickr_300k_url": "https://c5.staticflickr.com/0_z.jpg",
            "image_width": 1024,
            "image_height": 730,
            "answers": ["nokia"] * 8 + ["toshiba", "nokia "],
            "question_tokens": ["what", "is", "the", "brand", "of", "phone"],
            "question_id": 0,
            "set_name": "train",
        }
    ],
}
DOCVQA: dict[str, Any] = {
    "dataset_name": "docvqa",
    "dataset_split": "train",
    "dataset_version": "1.0",
    "data": [
        {
            "questionId": 337,
            "question": "what is the date mentioned in this letter?",
            "question_types": ["handwritten", "form"],
            "image": "documents/xnbl0037_1.png",
            "docId": 279,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": ["1/8/93", "Jan 8"],
            "data_split": "train",
        }
    ],
}
CHARTQA: list[dict[str, Any]] = [
    {"imgname": "41699051005347.png", "query": "How many bars are shown?", "label": "14"},
    {"imgname": "41699051005347.png", "query": "Which is the longest?", "label": "Lamb"},
]
CONTENTS: dict[str, Any] = {
    "aokvqa": AOKVQA, "gqa": GQA, "vizwiz": VIZWIZ, "textvqa": TEXTVQA, "docvqa": DOCVQA, "chartqa": CHARTQA
}  # fmt: skip
NAMES = {
    "aokvqa": "aokvqa_v1p0_train.json", "gqa": "train_balanced_questions.json", "vizwiz": "train.json",
    "textvqa": "TextVQA_0.5.1_train.json", "docvqa": "train_v1.0_withQT.json", "chartqa": "train_human.json",
}  # fmt: skip
"""As the data sets call their files of this split."""
IMAGES = {
    "aokvqa": ["train2017/000000299207.jpg", "train2017/000000000025.jpg"],
    "gqa": ["images/2354786.jpg", "images/n171.jpg"],
    "vizwiz": ["train/VizWiz_train_00000000.jpg", "train/VizWiz_train_00000001.jpg"],
    "textvqa": ["train_images/0054c91397f2fe05.jpg"],
    "docvqa": ["train/documents/xnbl0037_1.png"],
    "chartqa": ["train/png/41699051005347.png"],
}
"""Where the data sets keep their images."""


def write(folder: Path, source: str) -> Path:
    """The file of a data set, and its images in `folder`/images, where it keeps them."""
    for name in IMAGES[source]:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / NAMES[source]).write_text(json.dumps(CONTENTS[source]))
    return folder / NAMES[source]


def parts(source: str, *files: Path, names: Sequence[str] = (), suffix: str = "") -> list[Part]:
    folder = files[0].parent
    return list(question_parts(FORMS[source], files, names, folder / "images", suffix, folder))


def made(folder: Path, source: str, suffix: str = "") -> list[dict[str, Any]]:
    """What is made of a data set's file."""
    (part,) = parts(source, write(folder, source.partition(" ")[0]), suffix=suffix)
    assert part.out == folder / "train.jsonl"
    return records(part)


def test_a_okvqa_gives_its_direct_answers_and_leaves_out_what_has_none_to_score(tmp_path: Path) -> None:
    (record,) = made(tmp_path, "aokvqa", "Briefly.")
    assert record == {
        "id": "22MexNkBPpdZGX6sxbxVBH",
        "image": "train2017/000000299207.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is the man waiting for?\nBriefly."},
            {"from": "gpt", "value": "ride"},
        ],
        "question": "What is the man waiting for?",
        "answers": {"ride": 2, "bus": 1, "taxi": 2, "travelling": 1, "traffic": 1, "cab": 2, "his ride": 1},
    }
    (part,) = parts("aokvqa", tmp_path / NAMES["aokvqa"])
    assert len(list(part.rows)) == 1
    assert part.notes[0].startswith("left out 1 questions that are marked difficult_direct_answer")


def test_a_okvqa_gives_its_options_and_the_letter_of_the_right_one(tmp_path: Path) -> None:
    first, second = made(tmp_path, "aokvqa choice", "Which?")
    options = "A. a skateboard\nB. a train\nC. a parcel\nD. a cab"
    assert first["conversations"] == [
        {"from": "human", "value": f"<image>\nWhat is the man waiting for?\n{options}\nWhich?"},
        {"from": "gpt", "value": "D"},
    ]
    assert first["choices"] == ["a skateboard", "a train", "a parcel", "a cab"] and first["answers"] == {"D": 1}
    assert second["answers"] == {"B": 1}  # the options are asked of difficult questions, too


@pytest.mark.parametrize("name", ["COCO_val2014_000000299207.jpg", "train2014/COCO_train2014_000000299207.jpg"])
def test_a_okvqa_takes_the_images_of_cocos_other_year(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, "aokvqa")
    (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "images/train2017/000000299207.jpg").rename(tmp_path / "images" / name)
    (part,) = parts("aokvqa", file)
    assert [row["image"] for row in records(part)] == [name]


def test_gqa_gives_the_short_answer_and_the_types_of_its_evaluation(tmp_path: Path) -> None:
    verify, query = made(tmp_path, "gqa")
    assert (verify["id"], verify["image"]) == ("02930152", "images/2354786.jpg")
    assert verify["answers"] == {"yes": 1} and verify["conversations"][1]["value"] == "yes"
    assert (verify["question_type"], verify["answer_type"]) == ("verify", "binary")
    assert (query["image"], query["question_type"], query["answer_type"]) == ("images/n171.jpg", "query", "open")


def test_vizwiz_gives_ten_answers_and_those_that_say_unanswerable(tmp_path: Path) -> None:
    first, second = made(tmp_path, "vizwiz")
    assert (first["id"], first["image"]) == ("VizWiz_train_00000000.jpg", "train/VizWiz_train_00000000.jpg")
    assert first["answers"] == {"basil leaves": 6, "basil": 4} and first["answer_type"] == "other"
    assert second["answers"] == {"unanswerable": 10} and second["conversations"][1]["value"] == "unanswerable"


def test_textvqa_gives_ten_answers_as_they_are_spelt(tmp_path: Path) -> None:
    (record,) = made(tmp_path, "textvqa")
    assert (record["id"], record["image"]) == ("0", "train_images/0054c91397f2fe05.jpg")
    assert record["answers"] == {"nokia": 8, "toshiba": 1, "nokia ": 1}
    assert record["conversations"][1]["value"] == "nokia"


@pytest.mark.parametrize("place", ["train/documents", "documents", "", "spdocvqa_images"])
def test_docvqa_is_found_in_each_of_its_layouts_and_trains_on_the_first_spelling(place: str, tmp_path: Path) -> None:
    write(tmp_path, "docvqa")
    name = f"{place}/xnbl0037_1.png".lstrip("/")
    (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "images/train/documents/xnbl0037_1.png").rename(tmp_path / "images" / name)
    (part,) = parts("docvqa", tmp_path / NAMES["docvqa"])
    (record,) = records(part)
    assert (record["id"], record["image"]) == ("337", name)
    assert record["answers"] == {"1/8/93": 1, "Jan 8": 1} and record["question_type"] == "handwritten, form"
    assert parse_record(json.dumps(record).encode(), 1).turns[-1].text == "1/8/93"


def test_chartqa_makes_one_split_of_human_and_augmented_questions(tmp_path: Path) -> None:
    human = write(tmp_path, "chartqa")
    augmented = tmp_path / "train_augmented.json"
    augmented.write_text(human.read_text())
    (tmp_path / "images/val/png").mkdir(parents=True)
    (tmp_path / "images/val/png/41699051005347.png").touch()
    (tmp_path / "val_human.json").write_text(human.read_text())
    train, val = parts("chartqa", human, tmp_path / "val_human.json", augmented)
    rows = records(train)
    assert [row["id"] for row in rows] == [f"train_{kind}-{n}" for kind in ("human", "augmented") for n in (1, 2)]
    assert [row["question_type"] for row in rows] == ["human", "human", "augmented", "augmented"]
    assert {row["image"] for row in rows} == {"train/png/41699051005347.png"}
    assert [row["answers"] for row in rows[:2]] == [{"14": 1}, {"Lamb": 1}]
    assert train.source == f"{human} and {augmented}"
    assert [row["image"] for row in records(val)] == ["val/png/41699051005347.png"] * 2


@pytest.mark.parametrize("source", CONTENTS)
def test_a_split_without_answers_is_refused_and_never_given_any(source: str, tmp_path: Path) -> None:
    content = json.loads(write(tmp_path, source).read_text())
    rows = content["data"] if "data" in content else list(content.values()) if source == "gqa" else content
    for row in rows:
        for key in ("answer", "answers", "direct_answers", "correct_choice_idx", "label", "rationales"):
            row.pop(key, None)
    (tmp_path / "test.json").write_text(json.dumps(content))
    for name in [source, *(["aokvqa choice"] if source == "aokvqa" else [])]:
        with pytest.raises(DataError, match=r"test\.json: none of its \d questions has .* Leave it out"):
            parts(name, tmp_path / "test.json")


@pytest.mark.parametrize("source", CONTENTS)
def test_a_file_of_another_form_or_data_set_is_refused_with_the_name_of_the_right_one(
    source: str, tmp_path: Path
) -> None:
    write(tmp_path, source)
    others = ["{}", "[]", "3", '[["x"]]', '{"data": {}}', '{"data": [4]}', '{"questions": [{}]}']
    for content in [*others, *(json.dumps(CONTENTS[other]) for other in CONTENTS.keys() - {source})]:
        (tmp_path / "train.json").write_text(content)
        with pytest.raises(
            DataError, match=r"train\.json: it does not have the form of the official file\. Give the official "
        ):
            parts(source, tmp_path / "train.json")


@pytest.mark.parametrize(
    ("source", "changes", "told"),
    [
        ("aokvqa", {"direct_answers": []}, "needs a list 'direct_answers'"),
        ("aokvqa", {"image_id": "x"}, "needs a number 'image_id'"),
        ("aokvqa", {"question_id": None}, "question 1 of the file has no id"),
        ("aokvqa choice", {"correct_choice_idx": 4}, "the right option is '4', not a number below 4"),
        ("aokvqa choice", {"correct_choice_idx": True}, "the right option is 'True'"),
        ("aokvqa choice", {"choices": ["one"]}, "there are 1 choices"),
        ("vizwiz", {"answers": [{"answer": ""}]}, "every answer is blank"),
        ("vizwiz", {"question": " "}, "the question is blank"),
        ("vizwiz", {"image": "absent.jpg"}, "no image 'absent.jpg'"),
        ("chartqa", {"label": 14}, "needs a text 'label'"),
        ("chartqa", {"query": "<image>"}, "holds <image>"),
    ],
)
def test_a_flaw_of_a_question_spares_the_others(
    source: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    file = write(tmp_path, source.partition(" ")[0])
    content = json.loads(file.read_text())
    content[1]["difficult_direct_answer"] = False
    content[0].update(changes)
    file.write_text(json.dumps(content))
    (part,) = parts(source, file)
    fault, record = part.rows
    assert isinstance(fault, DataError) and str(fault).startswith(f"{file} (id ") and told in str(fault)
    assert isinstance(record, dict)


def test_names_of_splits_may_be_given_and_are_asked_for_where_nothing_tells(tmp_path: Path) -> None:
    file = write(tmp_path, "gqa").rename(tmp_path / "questions.json")
    with pytest.raises(DataError, match="--split-name"):
        parts("gqa", file)
    assert [part.out.name for part in parts("gqa", file, names=["mine"])] == ["mine.jsonl"]
