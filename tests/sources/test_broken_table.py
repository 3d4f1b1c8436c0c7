"""A file that cannot be read whole is an error that says where it breaks, never a shorter file."""

import json
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from helpers.samples import corpus_of, record
from llava_accel.sources import json_rows
from llava_accel.sources.mapped_table import Table
from llava_accel.sources.problems import DataError

RECORDS = [record(f"Q{n}", "A 你好\n🙂", id=str(n)) for n in range(5)]


def open_table(path: Path) -> Table:
    return Table(path, path.parent / "cache")


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        open_table(path)
    assert caught.value.remedy and str(path) in str(caught.value)
    assert not list(path.parent.glob("cache/tables/*")), "half a table stays behind"
    return caught.value


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.9, 0.999])
def test_a_truncated_array_is_an_error_and_not_a_shorter_file(tmp_path: Path, cut: float) -> None:
    text = json.dumps(RECORDS)
    (tmp_path / "a.json").write_text(text[: int(len(text) * cut)])
    error = refused(tmp_path / "a.json")
    assert error.kind == "json" and "cut off" in error.problem
    assert error.row == 1 + text[: int(len(text) * cut)].count('{"conversations"') - (cut < 0.999)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a JSON array"),
        ("{}", "not a JSON array"),
        ('{"id": 1}\n{"id": 2}\n', "not a JSON array"),
        ("[", "cut off"),
        ("[{}", "cut off"),
        ("[{},", "cut off"),
        ("[,{}]", "not valid JSON"),
        ("[{'id': 1}]" + " " * 100, "not valid JSON (Expecting property name"),
        ("[{}] [{}]", "after the end"),
        ("[{}]}", "after the end"),
        ("[" * 100_000, "not valid JSON"),
        ('[{"id": ' + "9" * 5000 + "}]", "not valid JSON"),
        ('["' + "a" * 100, "cut off"),
    ],
)
def test_a_file_that_is_no_array_of_records_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert word in refused(tmp_path / "a.json").problem


def test_a_mistake_in_the_middle_is_found_there_without_reading_on(tmp_path: Path) -> None:
    with mock.patch.object(json_rows, "_BLOCK", 64):
        (tmp_path / "a.json").write_text("[" + '{"id": 1}, ' * 3 + '{"id" 2}, ' + '{"id": 1}, ' * 1000 + "{}]")
        with mock.patch.object(json_rows, "_may_be_cut", wraps=json_rows._may_be_cut) as asked:
            error = refused(tmp_path / "a.json")
    assert error.row == 4 and "cut off" not in error.problem
    assert asked.call_count < 5


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_json_file_that_is_not_utf_8_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps([record("é", "ü")], ensure_ascii=False).encode(encoding))
    assert "not UTF-8" in refused(tmp_path / "a.json").problem


def test_a_line_that_is_not_utf_8_is_an_error_of_its_row(tmp_path: Path) -> None:
    good = json.dumps(RECORDS[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + '{"id": "é"}'.encode("latin-1") + b"\n" + good)
    data = corpus_of(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"row 2.*not UTF-8") as caught:
        data.record(1)
    assert caught.value.kind == "json"
    assert data.record(2).id == "0"


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    table = pa.table({"id": [str(n) * 50 for n in range(1000)]})
    parquet.write_table(table, tmp_path / "good.parquet", compression="zstd")
    whole = (tmp_path / "good.parquet").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"[]",
        "cut": whole[: len(whole) // 2],
        "page": whole[:40] + bytes(len(whole) // 2) + whole[40 + len(whole) // 2 :],
    }.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        assert "Parquet" in refused(tmp_path / f"{name}.parquet").problem


@pytest.mark.parametrize("name", ["none.json", "none.jsonl", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_table(tmp_path / name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\n1\n")
    assert "'.csv'" in refused(tmp_path / "a.csv").problem


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.jsonl"])
def test_the_pointer_of_a_large_file_is_told_apart(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    if name == "a.jsonl":
        with pytest.raises(DataError, match="git lfs pull"):
            corpus_of(tmp_path / name).record(0)
    else:
        assert "git lfs pull" in refused(tmp_path / name).remedy


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_in_a_file_of_lines_is_told_apart(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS, indent=indent))
    with pytest.raises(DataError, match=r"one array of them is named \.json"):
        corpus_of(tmp_path / "a.jsonl").record(0)


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json"])
def test_an_ending_in_capitals_is_the_same(tmp_path: Path, name: str) -> None:
    rows = [json.dumps(each) for each in RECORDS]
    (tmp_path / name).write_text("\n".join(rows) if name == "a.JSONL" else f"[{','.join(rows)}]")
    assert len(open_table(tmp_path / name)) == len(RECORDS)


def test_a_file_that_is_not_there_is_told_as_the_recipe_tells_it(tmp_path: Path) -> None:
    for name, says in (("~/a.jsonl", f"Write {Path.home()}/a.jsonl"), ("a-{0..9}.tar", r"Write a pattern: a-\*\.tar")):
        with pytest.raises(DataError, match=f"no such file: .*Check data.train and data.eval. .*{says}$"):
            open_table(Path(name))
