"""What is said of records that can be used and are odd nevertheless."""

import json
from pathlib import Path

import pytest
from PIL import Image

from helpers.runs import recipe, talk
from helpers.tiled import KIT
from helpers.verbs import assert_refused, start, write_recipe
from llava_accel.model.processing import load_processing
from llava_accel.setup.datasets import list_skipped, survey_key
from llava_accel.setup.run_folder import SKIPPED
from llava_accel.sources.problems import DataError


def write(path: Path, *records: dict[str, object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def notes(folder: Path, *files: Path, **settings: object) -> list[str]:
    """What `check` and `train` note alike of these files."""
    sources = [{"path": str(file), "images": str(folder)} for file in files]
    recipe = str(write_recipe(folder, files[0], data={"train": sources}))
    said = []
    for verb in ("check", "train"):
        ended = start(verb, recipe)
        assert ended.code == 0, ended.out + ended.err
        lines = [
            line.partition("data.train: ")[2] or line for line in ended.out.splitlines() if line.startswith("note: ")
        ]
        said.append([line.removeprefix("note: ") for line in lines])
    assert said[0] == said[1]
    return said[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a.png", (200, 30, 30)), ("b.png", (30, 30, 200))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    return tmp_path


def test_records_that_stand_in_two_files_are_noted_whatever_their_ids(folder: Path) -> None:
    first = write(folder / "1.jsonl", talk(1, "Q", "A", "a.png"), talk(2, "Q", "B", "a.png"))
    second = write(
        folder / "2.jsonl", talk(3, "Q", "A", "b.png"), talk(4, "Q", "B", "a.png"), talk(5, "P", "B", "a.png")
    )
    (note,) = notes(folder, first, second)
    assert note.startswith("1 records equal an earlier one")
    assert f"such as {second}, row 2, which equals {first}, row 2." in note


def test_records_that_share_less_than_all_are_not_noted(folder: Path) -> None:
    rows = [
        talk(1, "Q", "A", "a.png"),
        talk(2, "Q", "A", "b.png"),
        talk(3, "Q", "A"),
        talk(4, "Q", "B"),
        talk(5, "P", "A"),
    ]
    assert notes(folder, write(folder / "1.jsonl", *rows)) == []


@pytest.mark.parametrize(("num_others", "is_noted"), [(1, True), (2, True), (3, False)])
def test_an_answer_that_nearly_all_records_have_is_noted(folder: Path, num_others: int, is_noted: bool) -> None:
    rows = [talk(n, f"Q{n}", "no" if n < num_others else "yes") for n in range(20)]
    said = notes(folder, write(folder / "1.jsonl", *rows))
    assert [note.partition(":")[0] for note in said] == (
        [f"{100 - 5 * num_others}% of the records end in the answer 'yes'"] if is_noted else []
    )


def test_few_records_may_have_one_answer(folder: Path) -> None:
    assert notes(folder, write(folder / "1.jsonl", *(talk(n, f"Q{n}", "yes") for n in range(9)))) == []


def test_turns_without_a_partner_are_noted(folder: Path) -> None:
    turns = [{"from": "human", "value": text} for text in ("Q", "thanks")]
    turns.insert(1, {"from": "gpt", "value": "A"})
    (note,) = notes(folder, write(folder / "1.jsonl", {"conversations": turns}, talk(1, "P", "B")))
    assert note == "1 turns dropped: a leading answer or a trailing question has no partner"


def test_strips_whose_tiles_leave_no_token_are_counted(folder: Path) -> None:
    Image.new("RGB", (1, 40)).save(folder / "strip.png")
    Image.new("RGB", (40, 1)).save(folder / "flat.png")
    rows = [talk(number, f"{number}?", name, name) for number, name in enumerate(("strip.png", "flat.png", "a.png"))]
    model: dict[str, object] = {"base": str(KIT / "next-vicuna"), "vision_tower": str(KIT / "clip"), "adapter": ""}
    file = write(folder / "1.jsonl", *rows, talk(9, "Both?", "B", "strip.png", "flat.png"))
    ended = start("check", str(write_recipe(folder, file, model=model, data={"images": str(folder)})))
    assert ended.code == 0, ended.err
    assert "2 images are strips so thin that their tiles leave no token" in ended.out


def test_train_and_check_read_rows_as_the_recipe_says(folder: Path) -> None:
    plain = write_recipe(folder, write(folder / "2.jsonl", talk("x", "Q", "A", "a.png")), data={"images": str(folder)})
    start("check", str(plain), "--labels", str(folder / "same"))
    rows = [{"photo": "a.png", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    settings: dict[str, object] = {
        "columns": {"image": "photo"}, "missing_image_mark": "start", "images": str(folder)
    }  # fmt: skip
    recipe = str(write_recipe(folder, write(folder / "1.jsonl", *rows), data=settings))
    start("check", recipe, "--labels", str(folder / "labels"))
    one, other = (json.loads((folder / name).read_text()) for name in ("labels", "same"))
    assert one["input_ids"] == other["input_ids"] and one["labels"] == other["labels"]
    for verb in ("check", "train"):
        ended = start(verb, recipe, "data.columns.image=foto")
        assert ended.code == 2 and "Did you mean 'photo'?" in ended.err
    assert start("train", recipe).code == 0
    assert "data.missing_image_mark" in start("check", recipe, "data.missing_image_mark=error").out


def test_what_was_read_once_is_read_again_where_other_labels_or_places_of_images_are_asked_for(tmp_path: Path) -> None:
    settings = [
        {}, {"image_placement": "start"}, {"labels": "original"}, {"image_placement": "start_if_single"},
        {"image_placement": "in_place"},
    ]  # fmt: skip
    recipes = [recipe(tmp_path, data=each) for each in settings]
    processing = load_processing(recipes[0].model, "pad")
    keys = [survey_key(each, processing) for each in recipes]
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_the_list_of_what_is_left_out_is_added_to_whatever_it_holds(tmp_path: Path) -> None:
    path, name = tmp_path / "run" / SKIPPED, "gr\u00f6\u00dfe \udce9.png"
    one, other = (DataError("json", f"no image {name}", "Add it", file="a.json", row=row) for row in (1, 2))
    list_skipped(path, [one])
    path.write_bytes(path.read_bytes() + b"\xff\xfe half a line")
    list_skipped(path, [one, other])
    assert [line.partition(b":")[0] for line in path.read_bytes().splitlines()] == [
        b"a.json, row 1", b"\xff\xfe half a line", b"a.json, row 2",
    ]  # fmt: skip


def test_a_list_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SKIPPED).mkdir()
    list_skipped(tmp_path / SKIPPED, [DataError("json", "no JSON", "Mend it")])
    assert "skipped.txt cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"on_too_long": "skip", "max_length": 30}, ["no record of the file is left", "Raise data.max_length"]),
        ({"weight": 0.2}, ["the weights leave none of the 2 records in an epoch", "Raise them"]),
    ],
)
def test_data_of_which_nothing_is_left_are_refused_by_check_as_by_train(
    folder: Path, settings: dict[str, object], says: list[str]
) -> None:
    file = write(folder / "1.jsonl", talk(1, "Q", "A", "a.png"), talk(2, "Q", "B", "b.png"))
    source = {"path": str(file), "weight": settings.pop("weight", 1.0)}
    recipe = str(write_recipe(folder, file, data={"train": [source], "images": str(folder), **settings}))
    for verb in ("check", "train"):
        assert_refused(start(verb, recipe), says)


def test_a_column_that_only_the_training_data_have_is_told_with_the_file_that_lacks_it(folder: Path) -> None:
    train = write(folder / "1.jsonl", {"image": "a.png", "q": "Q", "label": "A"})
    held_out = write(folder / "2.jsonl", {"image": "b.png", "question": "Q", "answer": "A"})
    columns = {"question": "q", "answer": "label"}
    recipe = write_recipe(folder, train, data={"eval": str(held_out), "images": str(folder), "columns": columns})
    for verb in ("check", "train"):
        assert_refused(start(verb, str(recipe)), [f"{held_out}: data.columns.", "data.train and data.eval alike"])
