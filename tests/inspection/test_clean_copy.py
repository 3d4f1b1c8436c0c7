"""The copy of `check --fix` can be trained on with the command that is printed, and nothing but the bad records is lost."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from helpers.runs import metrics, talk
from helpers.verbs import assert_refused, start, write_recipe

BAD = {"id": "bad"}


def write(path: Path, *records: Mapping[str, object]) -> Path:
    """Data with an image of its own beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    Image.new("RGB", (40, 30), (len(records), 30, 30)).save(path.parent / "a.png")
    return path


def ids(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_text().splitlines()]


def next_command(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith("next: llava-accel ")]
    return shlex.split(line)[2:]


def fixed(recipe: Path, copy: Path, *overrides: str) -> list[str]:
    """The command that `check --fix` names; `check` finds nothing wrong with it."""
    ended = start("check", str(recipe), *overrides, "--fix", str(copy))
    assert ended.code == 1 and not ended.messages, ended.err
    verb, *words = next_command(ended.out)
    assert verb == "train"
    again = start("check", *words)
    assert again.code == 0, again.out + again.err
    return words


def test_files_of_one_name_and_of_several_folders_stay_apart(tmp_path: Path) -> None:
    sources = [
        {"path": str(write(tmp_path / name / file, talk(name, "Q", "A", "a.png"), BAD)), "weight": weight}
        for name, file, weight in (
            ("one", "data.jsonl", 1.0),
            ("two", "data.jsonl", 2.0),
            ("four", "data-2.jsonl", 1.0),
        )
    ]
    evaluation = write(tmp_path / "three" / "data.jsonl", BAD, talk("three", "Q", "A", "a.png"))
    data = {"train": sources, "eval": str(evaluation), "images": ""}
    words = fixed(write_recipe(tmp_path, data=data), tmp_path / "copy")
    files = ("data.jsonl", "data-2.jsonl", "data-2-2.jsonl", "eval/data.jsonl")
    assert [ids(tmp_path / "copy" / file) for file in files] == [["rone"], ["rtwo"], ["rfour"], ["rthree"]]
    assert (tmp_path / "copy" / "left_out.txt").read_text().count("(id 'bad')") == 4
    ended = start("train", *words)
    assert ended.code == 0 and metrics(tmp_path / "run")[0]["num_examples"] == 4, (
        ended.err
    )  # the second file counts twice


def test_the_overrides_of_the_command_line_are_kept(tmp_path: Path) -> None:
    data = write(tmp_path / "it's data" / "data.jsonl", talk(1, "Q", "A", "a.png"))
    overrides = [f"data.train={data}", "data.images=", "run.name=other name".replace(" ", "_")]
    ended = start("check", str(write_recipe(tmp_path)), *overrides)
    assert next_command(ended.out) == ["train", str(tmp_path / "recipe.toml"), *overrides]
    write(data, talk(1, "Q", "A", "a.png"), BAD)
    ended = start("check", str(write_recipe(tmp_path)), *overrides)
    (line,) = [line for line in ended.out.splitlines() if line.startswith("next: ")]
    assert ended.code == 1 and shlex.join(overrides) in line and line.endswith("--fix DIR")
    words = fixed(write_recipe(tmp_path), tmp_path / "copy", *overrides)
    assert words[1:4] == overrides and f"data.images={data.parent}" in words


def test_a_copy_without_a_record_is_not_written(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, write(tmp_path / "data.jsonl", BAD, BAD)))
    ended = start("check", recipe, "--fix", str(tmp_path / "copy"))
    assert_refused(ended, ["no record of data.train can be used", "Correct"])
    assert not (tmp_path / "copy").exists()


def test_a_file_without_a_usable_record_is_left_out(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", BAD), write(tmp_path / "b.jsonl", talk(1, "Q", "A"))]
    recipe = write_recipe(tmp_path, data={"train": [{"path": str(file)} for file in files]})
    fixed(recipe, tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").glob("*.jsonl")) == ["b.jsonl"]


def test_a_folder_with_other_files_is_left_alone_and_an_earlier_copy_is_written_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write(tmp_path / "data.jsonl", talk(1, "Q", "A"), BAD))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "data.jsonl").write_text("mine")
    ended = start("check", str(recipe), "--fix", str(tmp_path / "copy"))
    assert_refused(ended, ["holds other files", "Name a new one"])
    assert (tmp_path / "copy" / "data.jsonl").read_text() == "mine"
    for _ in range(2):
        fixed(recipe, tmp_path / "again")
    assert ids(tmp_path / "again" / "data.jsonl") == ["r1"]


@pytest.mark.parametrize("repeated", [True, False])
def test_ids_that_stand_twice_are_no_error(tmp_path: Path, repeated: bool) -> None:
    data = write(tmp_path / "data.jsonl", talk(1, "Q", "A"), talk(1 if repeated else 2, "P", "B"))
    ended = start("check", str(write_recipe(tmp_path, data)))
    assert ended.code == 0 and ("with the id of another" in ended.out) == repeated


def test_ids_of_another_column_are_made_unique_in_that_column(tmp_path: Path) -> None:
    rows = [{"nr": 1, "q": "Q", "answer": text} for text in ("A", "B", "")]
    data: dict[str, object] = {"columns": {"question": "q", "id": "nr"}}
    fixed(write_recipe(tmp_path, write(tmp_path / "data.jsonl", *rows), data=data), tmp_path / "copy")
    copied = [json.loads(line) for line in (tmp_path / "copy" / "data.jsonl").read_text().splitlines()]
    assert [(row["nr"], row["answer"]) for row in copied] == [(1, "A"), ("1-row2", "B")]
