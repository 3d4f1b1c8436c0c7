"""What a person chooses on the page of `chat --web` is data that check accepts and train learns from, as it is."""

import os
from pathlib import Path

import pytest

from helpers.runs import PARITY, losses, recipe
from helpers.verbs import start, write_recipe
from llava_accel.data.images import check_images
from llava_accel.exceptions import UserError
from llava_accel.inference.collected import Collection
from llava_accel.storage.jsonl import read_json_lines
from llava_accel.train import train

ONE, TWO = PARITY / "images" / "t0.png", PARITY / "images" / "t3.png"


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return Collection(tmp_path / "new" / "mine.jsonl", None)


def filled(collection: Collection) -> Collection:
    collection.add("What is it?", str(ONE), "A cat.", "A dog.")
    collection.add("And this?", str(TWO), "Two <b>cats</b>.\u2028", " Two <b>cats</b>.\u2028\n")
    collection.add("Hello", "", "Hello to you.", "")
    return collection


def test_an_answer_is_a_record_and_with_a_worse_one_a_pair_too(collection: Collection) -> None:
    said = collection.add("What is it?", str(ONE), "A cat.", "A dog.")
    assert said == f"Saved in {collection.file} and, as a preference, in {collection.pairs}"
    (record,), (pair,) = read_json_lines(collection.file), read_json_lines(collection.pairs)
    image = collection.file.parent / record["image"]
    assert image.read_bytes() == ONE.read_bytes() and image.suffix == ".png"
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    assert record == {"id": record["id"], "image": record["image"], "conversations": turns}
    same = {"id": record["id"], "image": record["image"], "question": "What is it?"}
    assert pair == {**same, "chosen": "A cat.", "rejected": "A dog."}


@pytest.mark.parametrize("rejected", ["", "  ", "A cat.", " A cat.\n"])
def test_without_a_worse_answer_there_is_no_pair(rejected: str, collection: Collection) -> None:
    assert collection.add("What is it?", "", "A cat.", rejected) == f"Saved in {collection.file}"
    assert not collection.pairs.exists()


def test_the_system_prompt_is_part_of_both(tmp_path: Path) -> None:
    collection = Collection(tmp_path / "mine.jsonl", "Be brief.")
    collection.add("What is it?", "", "A cat.", "A dog.")
    assert read_json_lines(collection.file)[0]["conversations"][0] == {"from": "system", "value": "Be brief."}
    assert read_json_lines(collection.pairs)[0]["system"] == "Be brief."


def test_a_picture_is_kept_once_whatever_it_is_called(collection: Collection, tmp_path: Path) -> None:
    for name in ("a.png", "../b.png", "<img src=x onerror=alert(1)>.png", "c.svg", "\u202egpj.exe"):
        copy = tmp_path / "dropped" / name.replace("/", "_")
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(ONE.read_bytes())
        collection.add("What is it?", str(copy), "A cat.", "")
    assert [path.suffix for path in (collection.file.parent / "mine_images").iterdir()] == [".png"]
    assert len({record["image"] for record in read_json_lines(collection.file)}) == 1


def test_lines_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "old"}')  # an editor has left out the last line feed
    Collection(file, None).add("Hello", "", "Hello to you.", "")
    assert [row["id"] == "old" for row in read_json_lines(file)] == [True, False]


@pytest.mark.parametrize(
    ("answer", "says"),
    [("", "blank"), (" \u200b\n", "blank"), ("an <image> of it", "<image> in an answer"), ("\ud83d", "half of")],
)
def test_what_no_record_can_hold_is_refused_and_not_written(answer: str, says: str, collection: Collection) -> None:
    with pytest.raises(UserError, match=says):
        collection.add("What is it?", str(ONE), answer, "A dog.")
    assert not collection.file.exists() and not collection.pairs.exists()


def test_a_full_disk_is_said_and_leaves_no_half_line(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(collection)
    before = collection.file.read_bytes()
    collection.file.chmod(0o400)
    if os.access(collection.file, os.W_OK):  # root may write everywhere
        collection.file.unlink()
        collection.file.mkdir()
    with pytest.raises(UserError, match=r"cannot be written .*\. Make room, and save again"):
        collection.add("What is it?", "", "A cat.", "")
    assert collection.file.is_dir() or collection.file.read_bytes() == before


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--collect .* is a folder"):
        Collection(tmp_path, None)


@pytest.mark.parametrize(("which", "objective"), [("file", "answers"), ("pairs", "answers"), ("pairs", "dpo")])
def test_one_can_train_on_it_as_it_is(which: str, objective: str, collection: Collection, tmp_path: Path) -> None:
    file, changes = getattr(filled(collection), which), {"objective": objective, "max_steps": 1}
    checked = start("check", str(write_recipe(tmp_path, file, data={"images": ""}, train=changes)))
    assert checked.code == 0, checked.err
    train(recipe(tmp_path, file, data={"images": ""}, train=changes))
    assert len(losses(tmp_path / "run")) == 1
    shown = [row for row in read_json_lines(file) if "image" in row]
    assert shown
    check_images([file.parent / row["image"] for row in shown], whole=True)
