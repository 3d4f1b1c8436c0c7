"""The drawings of the quick start: the same for a seed, true to their captions, and free of questions and answers."""

import json
import math
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_accel.storage.jsonl import read_json_lines
from quickstart.draw import (
    COLORS,
    DESCRIBE,
    LIST,
    LISTED,
    SHAPES,
    SIDE_PX,
    Drawing,
    describe,
    draw,
    go_through,
    name_it,
    outline,
    plan_drawing,
    render,
)


def drawings(count: int) -> list[Drawing]:
    rng = random.Random(7)
    return [plan_drawing(rng) for _ in range(count)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_draws_the_same_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        draw(8, 3, tmp_path / name, val_count=4)
    draw(8, 4, tmp_path / "other", val_count=4)
    first = files(tmp_path / "first")
    assert len(first) == 8 + 4 + 2
    assert first == files(tmp_path / "second")
    assert first != files(tmp_path / "other")


def test_more_pictures_leave_the_earlier_and_the_held_out_ones_as_they_were(tmp_path: Path) -> None:
    draw(4, 3, tmp_path / "few", val_count=4)
    draw(8, 3, tmp_path / "many", val_count=4)
    few, many = files(tmp_path / "few"), files(tmp_path / "many")
    assert {name: many[name] for name in few if name != "train.jsonl"} == {
        name: few[name] for name in few if name != "train.jsonl"
    }
    assert many["train.jsonl"].startswith(few["train.jsonl"])


def test_held_out_pictures_are_not_among_the_training_pictures(tmp_path: Path) -> None:
    draw(200, 1, tmp_path, val_count=100)
    written = files(tmp_path / "images")
    train = {content for name, content in written.items() if name.startswith("train")}
    assert len(train) == 200
    assert not train & {content for name, content in written.items() if name.startswith("val")}


def test_records_are_llava_captions_of_pictures_that_exist(tmp_path: Path) -> None:
    draw(20, 1, tmp_path, val_count=5)
    for split, count in (("train", 20), ("val", 5)):
        records = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert len(records) == len({record["id"] for record in records}) == count
        for record in records:
            with Image.open(tmp_path / "images" / record["image"]) as picture:
                assert (picture.size, picture.mode) == ((SIDE_PX, SIDE_PX), "RGB")
            human, gpt = record["conversations"]
            assert human in [{"from": "human", "value": f"<image>\n{request}"} for request in (DESCRIBE, LIST)]
            assert gpt["from"] == "gpt" and gpt["value"]


@pytest.mark.parametrize("drawing", drawings(60))
def test_shape_has_the_named_colour_where_it_is_said_to_lie(drawing: Drawing) -> None:
    picture = render(drawing)
    x, y = (int(coordinate) for coordinate in drawing.center)
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)
    assert pixel == drawing.fill
    distances = {name: sum((a - b) ** 2 for a, b in zip(pixel, rgb, strict=True)) for name, rgb in COLORS.items()}
    assert min(distances, key=distances.__getitem__) == drawing.color


@pytest.mark.parametrize("drawing", drawings(60))
def test_filled_part_of_the_box_is_that_of_the_named_shape(drawing: Drawing) -> None:
    picture = render(drawing)

    def is_filled(x: int, y: int) -> bool:
        pixel = picture.getpixel((x, y))
        assert isinstance(pixel, tuple)
        to_fill, to_background = (
            sum((a - b) ** 2 for a, b in zip(pixel, rgb, strict=True)) for rgb in (drawing.fill, drawing.background)
        )
        return to_fill < to_background

    area = sum(is_filled(x, y) for x in range(SIDE_PX) for y in range(SIDE_PX))
    width, height = drawing.size
    share = {"circle": math.pi / 4, "rectangle": 1.0, "triangle": 0.5}[drawing.shape]
    # A pixel counts when half of it is covered: off by at most a quarter of a pixel along the outline.
    assert area == pytest.approx(share * width * height, abs=(width + height) / 2)


def test_shape_lies_wholly_inside_the_picture() -> None:
    for drawing in drawings(500):
        for corner in outline(drawing):
            assert all(-1e-9 <= coordinate <= SIDE_PX + 1e-9 for coordinate in corner)


def test_captions_are_true_of_the_picture() -> None:
    rng = random.Random(5)
    for drawing in drawings(2000):
        shown = {drawing.shape, f"{drawing.color} shape"}
        for sentence in describe(drawing, rng).removesuffix(".").split(". "):
            words = set(re.findall(r"[a-z]+", sentence))
            if words & {"no", "not"}:
                claimed = re.search(r"\b(circle|rectangle|triangle|[a-z]+ shape)$|no (.*?) is present", sentence)
                assert claimed is not None, sentence
                assert (claimed[1] or claimed[2]) not in shown, sentence
            else:
                assert words & set(SHAPES) <= {drawing.shape}, sentence
                assert words & set(COLORS) <= {drawing.color}, sentence


def test_lists_say_yes_to_what_is_there_and_to_nothing_else() -> None:
    rng = random.Random(5)
    for drawing in drawings(700):
        entries = re.findall(r"([a-z ]+): (yes|no)\.", go_through(drawing, rng))
        shown = {drawing.shape, f"{drawing.color} shape"}
        assert len(entries) == len({thing for thing, _ in entries}) == LISTED
        assert {thing.strip() for thing, verdict in entries if verdict == "yes"} == shown


def test_share_of_lists_is_the_one_asked_for_and_held_out_captions_only_name(tmp_path: Path) -> None:
    for lists, low, high in ((0.0, 0, 0), (0.5, 70, 130)):
        draw(200, 1, tmp_path, val_count=20, lists=lists)
        captions = {
            split: [row["conversations"][1]["value"] for row in read_json_lines(tmp_path / f"{split}.jsonl")]
            for split in ("train", "val")
        }
        assert low <= sum(": yes." in caption for caption in captions["train"]) <= high
        assert all(re.fullmatch(r"a [a-z]+ (circle|rectangle|triangle)\.", caption) for caption in captions["val"])


def test_captions_ask_nothing_and_never_answer_in_one_word() -> None:
    rng = random.Random(5)
    captions = [text for one in drawings(700) for text in (describe(one, rng), name_it(one), go_through(one, rng))]
    assert not [caption for caption in captions if "?" in caption]
    assert min(len(caption.split()) for caption in captions) >= 3
