"""COCO's caption files: a record a caption, or one an image with all of its captions."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.converted import records
from llava_accel.converters.coco_captions import caption_parts
from llava_accel.converters.faults import Part
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError


def write(folder: Path, name: str = "captions_train2017.json", **changes: Any) -> Path:
    """Three captions of two images, in the official form; the images are in `folder`/images/train2017."""
    for number in (9, 25):
        path = folder / "images/train2017" / f"{number:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    images = [
        {
            "license": 3,
            "file_name": f"{number:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
            "height": 360,
            "width": 640,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": "http://farm9.staticflickr.com/0_z.jpg",
            "id": number,
        }
        for number in (25, 9)
    ]
    captions = [
        {"image_id": 9, "id": 37, "caption": "A bicycle in a square."},
        {"image_id": 25, "id": 49, "caption": "A room with blue walls.\n"},
        {"image_id": 9, "id": 51, "caption": "A clock on a bicycle. "},
    ]
    common = {"info": {"year": 2017}, "licenses": [{"id": 3, "name": "Attribution"}]}
    content = common | {"images": images, "annotations": captions} | changes
    (folder / name).write_text(json.dumps(content))
    return folder / name


def part_of(file: Path, an_image: bool = False) -> Part:
    (part,) = caption_parts([file], [], file.parent / "images", "Describe it.", an_image, file.parent)
    return part


def test_every_caption_is_a_record(tmp_path: Path) -> None:
    part = part_of(write(tmp_path))
    rows = records(part)
    assert part.out == tmp_path / "train.jsonl"
    assert rows[0] == {
        "id": "37",
        "image": "train2017/000000000009.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": "A bicycle in a square."},
        ],
        "question": "Describe it.",
        "answers": {"A bicycle in a square.": 1},
    }
    assert [row["id"] for row in rows] == ["37", "51", "49"]  # of one image one after the other
    assert [row["conversations"][1]["value"] for row in rows[1:]] == [
        "A clock on a bicycle.",
        "A room with blue walls.",
    ]


def test_every_image_may_be_a_record_with_all_its_captions(tmp_path: Path) -> None:
    rows = records(part_of(write(tmp_path), an_image=True))
    assert [row["id"] for row in rows] == ["9", "25"]
    assert rows[0]["answers"] == {"A bicycle in a square.": 1, "A clock on a bicycle.": 1}
    assert rows[0]["conversations"][1]["value"] == "A bicycle in a square."


def test_a_flaw_of_a_caption_is_told_with_its_id(tmp_path: Path) -> None:
    captions = [
        {"image_id": 9, "id": 1, "caption": " "},
        {"image_id": 9, "id": 2},
        {"image_id": 26, "id": 3, "caption": "c"},
        {"image_id": [9], "id": 4, "caption": "c"},
    ]
    faults = [str(row) for row in part_of(write(tmp_path, annotations=captions)).rows]
    told = [
        "every answer is blank",
        "needs a text 'caption'",
        "'images' has no image '26'",
        "'images' has no image '[9]'",
    ]
    for number, (fault, problem) in enumerate(zip(faults, told, strict=True), start=1):
        assert f"captions_train2017.json (id '{number}'): " in fault and problem in fault


def test_missing_images_are_told_with_where_they_are(tmp_path: Path) -> None:
    file = write(tmp_path, "captions_val2014.json")
    (tmp_path / "images/train2017/000000000025.jpg").unlink()
    part = part_of(file)
    assert len(records(part)) == 2 and part.images is not None
    assert "1 of 2 images" in part.images.shortage()[0] and "zips/val2014.zip" in part.images.shortage()[1]


def test_test_images_have_no_captions_and_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "image_info_test2017.json")
    content = json.loads(file.read_text())
    del content["annotations"]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"test images have no captions\. Leave it out"):
        part_of(file)
    file.write_text("{}")
    with pytest.raises(DataError, match=r"no list 'annotations'\. Give the official file"):
        part_of(file)


def test_two_files_of_one_split_need_names(tmp_path: Path) -> None:
    files = [write(tmp_path), write(tmp_path, "captions_train2014.json")]
    with pytest.raises(UserError, match=r"a second split 'train'\. Give --split-name"):
        list(caption_parts(files, [], tmp_path / "images", "q", False, tmp_path))
    named = caption_parts(files, ["a", "b"], tmp_path / "images", "q", False, tmp_path)
    assert [part.out.name for part in named] == ["a.jsonl", "b.jsonl"]
