"""Tables and easy-VQA: nothing in them is lost or guessed, and each flaw is told with its line."""

import importlib.util
import json
from pathlib import Path

import pytest

from llava_accel.converters import formats as converters
from llava_accel.converters.formats import convert_easy_vqa, csv_records, easy_vqa_folder
from llava_accel.sources.problems import DataError
from llava_accel.storage.jsonl import write_json_lines


def _table(folder: Path, *lines: str) -> Path:
    (folder / "a.png").touch()
    (folder / "t.csv").write_text("\n".join(["image,question,answer", *lines]), encoding="utf-8")
    return folder / "t.csv"


def test_quoted_commas_line_ends_and_further_columns_are_read(tmp_path: Path) -> None:
    file = _table(tmp_path, 'a.png,"one,\ntwo?", yes ', "", "a.png,why?,no")
    records = list(csv_records(file, tmp_path, suffix="Briefly."))
    assert [record["question"] for record in records] == ["one,\ntwo?", "why?"]
    assert records[0]["answers"] == {"yes": 1} and records[1]["id"] == "t-2"
    assert records[1]["conversations"] == [
        {"from": "human", "value": "<image>\nwhy?\nBriefly."},
        {"from": "gpt", "value": "no"},
    ]


@pytest.mark.parametrize(
    ("lines", "place", "told"),
    [
        (["a.png,q,a", "b.png,q,a"], ", row 3: ", "no image 'b.png'"),
        (["../a.png,q,a"], ", row 2: ", "lies outside"),
        (["a.png,q,"], ", row 2: ", "'answer' is blank"),
        (["a.png,q"], ", row 2: ", "'answer' is blank"),
        (["a.png,q, r,a"], ", row 2: ", "Put text with commas in quotes"),
        (["a.png,<image>q,a"], ", row 2: ", "every question gets one <image>"),
        (['a.png,"q" x,a'], ": ", "not well-formed CSV"),
    ],
)
def test_a_flaw_in_a_table_is_told_with_its_line(lines: list[str], place: str, told: str, tmp_path: Path) -> None:
    file = _table(tmp_path, *lines)
    with pytest.raises(DataError) as raised:
        list(csv_records(file, tmp_path))
    assert str(raised.value).startswith(f"{file}{place}") and told in str(raised.value)


def test_a_missing_column_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'photo' among .*image.*--image-column.*--delimiter"):
        list(csv_records(_table(tmp_path), tmp_path, image_column="photo"))


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Check --file"):
        list(csv_records(tmp_path / "absent.csv", tmp_path))
    (tmp_path / "latin.csv").write_bytes("image,question,answer\na,ä,b".encode("latin-1"))
    with pytest.raises(DataError, match="Save it as CSV UTF-8"):
        list(csv_records(tmp_path / "latin.csv", tmp_path))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "t.jsonl"
    assert write_json_lines([{"a": "ä\ud83d"}], out) == 1
    before = out.read_bytes()
    assert json.loads(before) == {"a": "ä\ud83d"} and "ä".encode() in before
    with pytest.raises(DataError):
        write_json_lines(csv_records(_table(tmp_path, "a.png,q,a", "b.png,q,a"), tmp_path), out)
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


def test_a_missing_package_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="python -m pip install easy-vqa"):
        easy_vqa_folder()


def test_a_damaged_package_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.json: cannot be read .*--force-reinstall"):
        convert_easy_vqa(tmp_path, tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="the package easy-vqa is not installed")
def test_the_real_easy_vqa_converts_in_full(tmp_path: Path) -> None:
    assert convert_easy_vqa(easy_vqa_folder(), tmp_path) == {"train": 38575, "test": 9673}
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert {row["question_type"] for row in rows} == {"shape", "color", "yes-no"}
    answers = {row["conversations"][1]["value"] for row in rows if row["question_type"] == "color"}
    assert answers == {"green", "red", "gray", "teal", "black", "yellow", "brown", "blue"}
    assert all((tmp_path / "images" / name).is_file() for name in {row["image"] for row in rows})
