"""A file of any size and form becomes rows that cost nothing to open again, or an error that says where it breaks."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from helpers.samples import corpus_of, record
from llava_accel.sources import json_rows
from llava_accel.sources import mapped_table as table_module
from llava_accel.sources.mapped_table import Table
from llava_accel.sources.problems import DataError

RECORDS = [record(f"Q{n}", "A 你好\n🙂", id=str(n)) for n in range(5)]


def open_table(path: Path) -> Table:
    return Table(path, path.parent / "cache")


def rows(table: Table) -> list[object]:
    return [json.loads(table[n].decode()) for n in range(len(table))]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_json_array_is_its_records(
    tmp_path: Path, indent: int | None, bom: bytes, line_end: str, ascii_only: bool
) -> None:
    text = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only).replace("\n", line_end)
    (tmp_path / "a.json").write_bytes(bom + b" \n" + text.encode() + b"\n ")
    table = open_table(tmp_path / "a.json")
    assert rows(table) == RECORDS
    assert [table.number(n) for n in range(5)] == [1, 2, 3, 4, 5]
    assert all(b"\n" not in table[n] and b"\r" not in table[n] for n in range(5)), "a row is a line of JSON lines"


def test_a_trailing_comma_as_in_llavas_own_example_is_forgiven(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS)[:-1] + ",\n]")
    assert rows(open_table(tmp_path / "a.json")) == RECORDS


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_json_lines_are_their_records(tmp_path: Path, suffix: str, bom: bytes, line_end: bytes) -> None:
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in RECORDS]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bom + line_end.join(lines))  # no line end behind the last
    assert rows(open_table(path)) == RECORDS


def test_blank_lines_do_not_shift_the_numbers_in_messages(tmp_path: Path) -> None:
    good = json.dumps(RECORDS[0])
    (tmp_path / "a.jsonl").write_text(f"\n{good}\r\n \t\n\n{{broken\n\n{good}\n")
    table = open_table(tmp_path / "a.jsonl")
    assert [table.number(n) for n in range(len(table))] == [2, 5, 7]
    with pytest.raises(DataError, match="row 5"):
        corpus_of(tmp_path / "a.jsonl").record(1)


def test_parquet_rows_are_their_records(tmp_path: Path) -> None:
    mixed = [*RECORDS, record("<image>\nQ", "A", image="x.png", answers={"red": 2})]
    parquet.write_table(pa.Table.from_pylist(mixed, schema=_schema()), tmp_path / "a.parquet", row_group_size=2)
    data = corpus_of(tmp_path / "a.parquet")
    assert [data.record(n).id for n in range(6)] == ["0", "1", "2", "3", "4", "6"]
    assert data.record(0).turns[1].text == "A 你好\n🙂" and data.record(0).images == ()
    assert data.record(5).images == ("x.png",) and data.record(5).answers == (("red", 2.0),)


def _schema() -> pa.Schema:
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    answers = pa.struct([("red", pa.int64()), ("blue", pa.int64())])
    return pa.schema(
        [("id", pa.string()), ("conversations", pa.list_(turn)), ("image", pa.string()), ("answers", answers)]
    )


def test_a_record_may_be_larger_than_what_is_read_at_once(tmp_path: Path) -> None:
    records = [record("Q" * size, "A\n" * size, id=str(size)) for size in (1, 500, 3, 70, 2000, 1)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    for block in (1, 7, 64, 1024):
        with mock.patch.object(json_rows, "_BLOCK", block):
            assert rows(Table(tmp_path / "a.json", tmp_path / str(block))) == records


def test_random_access_finds_every_row_of_many_chunks(tmp_path: Path) -> None:
    with mock.patch.object(table_module, "_ROWS_PER_CHUNK", 3):
        (tmp_path / "a.jsonl").write_text("".join(f'{{"id": {n}}}\n' for n in range(10)))
        table = open_table(tmp_path / "a.jsonl")
        assert [json.loads(table[n])["id"] for n in (9, 0, 3, 2, 8, 5)] == [9, 0, 3, 2, 8, 5]


def test_a_second_start_maps_the_same_file_and_a_changed_one_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n')
    first = open_table(path)
    with mock.patch.object(table_module, "_rows", side_effect=AssertionError("read again")):
        again = open_table(path)
    assert rows(again) == [{"id": 1}] and again.fingerprint == first.fingerprint
    path.write_text('{"id": 1}\n{"id": 2}\n')
    changed = open_table(path)
    assert rows(changed) == [{"id": 1}, {"id": 2}] and changed.fingerprint != first.fingerprint


def test_a_file_of_equal_size_and_mtime_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n')
    before, first = path.stat(), open_table(path)
    for put in (lambda new: os.replace(new, path), lambda new: path.write_bytes(new.read_bytes())):
        new = tmp_path / "new"
        number = int(rows(open_table(path))[0]["id"]) + 1  # type: ignore[index, call-overload]
        new.write_text(f'{{"id": {number}}}\n')
        put(new)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert rows(open_table(path)) == [{"id": number}]
        assert open_table(path).fingerprint != first.fingerprint


def test_the_fingerprint_is_that_of_the_rows_wherever_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path / "a.jsonl", tmp_path / "elsewhere" / "b.ndjson"):
        place.write_text("".join(f'{{"id": {n}}}\n' for n in range(5000)))
    one, other = open_table(tmp_path / "a.jsonl"), open_table(tmp_path / "elsewhere" / "b.ndjson")
    assert one.fingerprint == other.fingerprint and len(one) == len(other) == 5000
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": {n}}}\n' for n in [1, 0, *range(2, 5000)]))
    assert open_table(tmp_path / "a.jsonl").fingerprint != other.fingerprint


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_kept_file_that_was_cut_off_is_made_anew(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"id": {n}}}\n' for n in range(5000)))
    first = rows(open_table(path))
    (arrow,) = (tmp_path / "cache" / "tables").iterdir()
    os.truncate(arrow, size)
    assert rows(open_table(path)) == first
    assert str(arrow) in capsys.readouterr().err


def test_a_cache_without_room_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    (tmp_path / "cache").write_text("no folder")
    assert rows(open_table(tmp_path / "a.jsonl")) == [{"id": 1}]
    assert "data.cache_dir" in capsys.readouterr().err


def test_a_table_travels_to_a_worker_without_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": "{n:0>1000}"}}\n' for n in range(100)))
    table = open_table(tmp_path / "a.jsonl")
    sent = pickle.dumps(table)
    assert len(sent) < 2000
    first = rows(table)
    (tmp_path / "a.jsonl").write_text('{"id": "another"}\n')
    assert rows(pickle.loads(sent)) == first, "a worker that starts later reads what the run reads"


def _open_many(path: Path, start: object, count: object) -> None:
    start.wait()  # pyright: ignore[reportAttributeAccessIssue]
    if len(open_table(path)) == 20_000:
        with count.get_lock():  # pyright: ignore[reportAttributeAccessIssue]
            count.value += 1  # pyright: ignore[reportAttributeAccessIssue]


def test_ranks_that_start_together_all_get_the_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"id": {n}}}\n' for n in range(20_000)))
    context = multiprocessing.get_context("fork")
    start, count = context.Barrier(4), context.Value("i", 0)
    workers = [context.Process(target=_open_many, args=(path, start, count)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert count.value == 4
    assert [file.suffix for file in (tmp_path / "cache" / "tables").iterdir()] == [".arrow"]


def test_a_large_array_is_read_block_by_block_and_no_block_twice(tmp_path: Path) -> None:
    line = json.dumps(record("<image>\nWhat is in the image?", "A red square.", id="000000", image="a/000000.jpg"))
    (tmp_path / "a.json").write_text("[" + ",\n".join([line] * 50_000) + "]")
    with mock.patch.object(json_rows, "_may_be_cut", wraps=json_rows._may_be_cut) as asked:
        table = open_table(tmp_path / "a.json")
    assert len(table) == 50_000 and table[49_999] == line.encode()
    assert asked.call_count <= (tmp_path / "a.json").stat().st_size // json_rows._BLOCK


def test_a_date_that_python_has_no_value_for_is_an_error_of_its_row(tmp_path: Path) -> None:
    days = pa.array([0, 1, 2, 2**31 - 1, 3], pa.int32()).cast(pa.date32())
    rows = pa.Table.from_pylist([record("Q", "A", id=str(n)) for n in range(5)]).append_column("taken", days)
    parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 4: a value cannot be read") as caught:
        open_table(tmp_path / "a.parquet")
    assert "leave their column out" in str(caught.value)
    parquet.write_table(rows.drop_columns(["taken"]), tmp_path / "a.parquet")
    assert len(open_table(tmp_path / "a.parquet")) == 5


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("us", tz="Mars/Crater"), pa.date64()])
def test_other_times_out_of_range_are_refused_as_well(tmp_path: Path, kind: pa.DataType) -> None:
    times = pa.array([2**60, 0], pa.int64()).cast(kind)
    rows = pa.Table.from_pylist([record("Q", "A"), record("Q", "A")]).append_column("taken", times)
    parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1: a value cannot be read"):
        open_table(tmp_path / "a.parquet")
