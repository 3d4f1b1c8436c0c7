"""Tables: nothing in them is lost or guessed in silence, and every flaw is told with its line, all at once."""

from pathlib import Path
from typing import Any

import pytest

from helpers.converted import faults, records
from llava_accel.converters import csv_rows
from llava_accel.converters.csv_rows import Columns, csv_part
from llava_accel.converters.csv_text import find_delimiter, read_text
from llava_accel.converters.faults import Part, write_part
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError

EXCEL = 'image;question;answer\r\nä 1.png;"what ""colour""\nis it; really?";3\r\nb.png;what?;"a; b"\r\n'


def _table(folder: Path, *lines: str, header: str = "image,question,answer") -> Path:
    (folder / "a.png").touch()
    (folder / "t.csv").write_text("\n".join([header, *lines]), encoding="utf-8")
    return folder / "t.csv"


def _part(file: Path, columns: Columns | None = None, said: list[str] | None = None, **reading: str) -> Part:
    out, say = file.with_suffix(".jsonl"), ([] if said is None else said).append
    return csv_part(file, file.parent, columns or Columns(), out=out, say=say, **reading)


def _records(file: Path, columns: Columns | None = None, suffix: str = "") -> list[dict[str, Any]]:
    return records(_part(file, columns, suffix=suffix))


def _faults(file: Path, columns: Columns | None = None) -> list[str]:
    return faults(_part(file, columns))


def test_quoted_commas_line_ends_and_further_columns_are_read(tmp_path: Path) -> None:
    file = _table(
        tmp_path, 'a.png,"one,\ntwo?", yes ,more', "", ",,,", "./a.png,why?,no", header="image,question,answer,x"
    )
    made = _records(file, suffix="Briefly.")
    assert [record["question"] for record in made] == ["one,\ntwo?", "why?"]
    assert made[0]["answers"] == {"yes": 1} and made[1]["id"] == "t-2"
    assert [record["image"] for record in made] == ["a.png", "a.png"]
    assert made[1]["conversations"] == [
        {"from": "human", "value": "<image>\nwhy?\nBriefly."},
        {"from": "gpt", "value": "no"},
    ]


def test_answers_are_counted_over_their_columns_and_the_most_frequent_is_trained_on(tmp_path: Path) -> None:
    file = _table(tmp_path, "a.png,q,no,yes,yes", "a.png,q,,no,", header="image,question,a,b,c")
    made = _records(file, Columns(answers=("a", "b", "c")))
    assert [record["answers"] for record in made] == [{"no": 1, "yes": 2}, {"no": 1}]
    assert [record["conversations"][1]["value"] for record in made] == ["yes", "no"]


def test_every_filled_image_column_gets_its_mark(tmp_path: Path) -> None:
    (tmp_path / "b.png").touch()
    file = _table(tmp_path, "a.png,b.png,q,x", "a.png,,q,x", ",,q,x", header="left,right,question,answer")
    columns = Columns(images=("left", "right"))
    made = _records(file, columns)
    assert [record["image"] for record in made] == [["a.png", "b.png"], "a.png"]
    assert [record["conversations"][0]["value"] for record in made] == ["<image>\n<image>\nq", "<image>\nq"]
    assert _faults(file, columns) == [
        f"{file}, row 4: the columns ['left', 'right'] are blank. Fill it in, or remove the row"
    ]


def test_one_question_may_serve_all_rows(tmp_path: Path) -> None:
    file = _table(tmp_path, "a.png,a cat", header="image,answer")
    (record,) = _records(file, Columns(question="", asked="What is this?"))
    assert record["question"] == "What is this?" and record["answers"] == {"a cat": 1}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_that_shows_the_columns(delimiter: str) -> None:
    header = delimiter.join(["image", '"a, b; c|d"', "question", "answer"])
    assert find_delimiter(f"\n{header}\nx", ["image", "question"]) == delimiter
    assert find_delimiter("a, b, c, d;image\tand;question\nx", ["image\tand", "question"]) == ";"
    assert find_delimiter("a;b;c,d", ["unknown"]) == ";"


@pytest.mark.parametrize(
    ("raw", "encoding"),
    [
        (EXCEL.encode(), "utf-8"),
        (b"\xef\xbb\xbf" + EXCEL.encode(), "utf-8"),
        (EXCEL.encode("utf-16"), "utf-16"),
        (EXCEL.encode("utf-16-le"), "utf-16-le"),
        (EXCEL.encode("utf-16-be"), "utf-16-be"),
        (EXCEL.encode("utf-32"), "utf-32"),
        (EXCEL.encode("cp1252"), "cp1252"),
        (b"sep=;\r\n" + EXCEL.encode(), "utf-8"),
    ],
)
def test_a_spreadsheets_table_is_read_as_it_was_saved(raw: bytes, encoding: str, tmp_path: Path) -> None:
    for name in ("ä 1.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "t.csv").write_bytes(raw)
    said: list[str] = []
    made = records(_part(tmp_path / "t.csv", said=said))
    assert [record["question"] for record in made] == ['what "colour"\nis it; really?', "what?"]
    assert [record["image"] for record in made] == ["ä 1.png", "b.png"]
    assert [record["answers"] for record in made] == [{"3": 1}, {"a; b": 1}]
    assert said[0] == f"{tmp_path / 't.csv'}: encoding {encoding}, delimiter ';'"
    assert len(said) == (2 if encoding == "cp1252" else 1)


def test_a_guessed_encoding_is_told_with_what_it_makes_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes("image,question,answer\na,q,Äpfel\n".encode("latin-1"))
    note = read_text(file, "")[2]
    assert "not UTF-8" in note and "'Äpfel'" in note and "--encoding" in note
    file.write_bytes("ПТ".encode("cp1251") + b"\x81")  # no letter of cp1252
    assert read_text(file, "")[1] == "latin-1"
    file.write_bytes("Яблоки".encode("cp1251"))
    assert read_text(file, "cp1251")[0] == "Яблоки"


@pytest.mark.parametrize(
    ("raw", "encoding", "told"),
    [
        (b"PK\x03\x04...", "", r"spreadsheet \(\.xlsx.*CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0...", "", r"\(\.xls\).*CSV UTF-8"),
        (b"\x1f\x8b...", "", "gunzip"),
        (b"PAR1...", "", "Parquet"),
        (b" \n", "", "the file is empty"),
        (b"\xff\xfea", "", "not utf-16"),
        (b"a\xe4", "utf-8", "not utf-8.*Name another --encoding"),
        (b"a", "utf8000", "--encoding utf8000: not known"),
        (b"a", "base64", "--encoding base64: not known"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_with_a_remedy(
    raw: bytes, encoding: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(UserError, match=told):
        read_text(tmp_path / "t.csv", encoding)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file\. Check --file"):
        _part(tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"no folder .* Check --images"):
        csv_part(tmp_path / "t.csv", tmp_path / "x", Columns(), out=tmp_path / "o", say=print)
    with pytest.raises(DataError, match=r"a folder\. Check --file"):
        _part(tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("b.png,q,a", "no image 'b.png'"),
        ("A.PNG,q,a", "Write 'a.png', which is there"),
        ("a.jpg,q,a", "Write 'a.png', which is there"),
        ("../a.png,q,a", "lies outside"),
        ("a.png,q,", "'answer' is blank"),
        ("a.png,q", "'answer' is blank"),
        ("a.png,,a", "'question' is blank"),
        (",q,a", "'image' is blank"),
        ("a.png,q, r,a", "Put text with the delimiter in it in quotes"),
        ("a.png,<image>q,a", "every image gets one <image>"),
    ],
)
def test_a_flaw_in_a_row_is_told_with_the_line_where_the_row_begins(line: str, told: str, tmp_path: Path) -> None:
    file = _table(tmp_path, 'a.png,"two\nlines",a', "", line)
    (fault,) = _faults(file)
    assert fault.startswith(f"{file}, row 5: ") and told in fault and "data.images" not in fault
    assert len(_records(file)) == 1


def test_the_line_that_names_the_delimiter_counts_as_a_line(tmp_path: Path) -> None:
    file = _table(tmp_path, "image|question|answer", "a.png|q|", header="sep=|")
    assert _faults(file)[0].startswith(f"{file}, row 3: the column 'answer' is blank")


def test_the_backslashes_of_windows_are_written_as_slashes_and_told(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.png").touch()
    part = _part(_table(tmp_path, "deep\\c.png,q,a", "deep/c.png,q,a", "a.png,q,a"))
    assert [row["image"] for row in records(part)] == ["deep/c.png", "deep/c.png", "a.png"]
    assert part.notes == ["1 image names with \\ were written with /"]


@pytest.mark.parametrize(("line", "row"), [('a.png,"q" x,a', 3), ('a.png,"q,a\na.png,q,a', 3)])
def test_a_quote_that_is_not_closed_ends_it_with_the_line_where_it_begins(line: str, row: int, tmp_path: Path) -> None:
    file = _table(tmp_path, "a.png,q,a", line)
    with pytest.raises(DataError) as raised:
        list(_part(file).rows)
    assert str(raised.value).startswith(f"{file}, row {row}: not well-formed CSV") and "unclosed" in str(raised.value)


def test_a_missing_column_is_told_with_the_nearest_that_there_is(tmp_path: Path) -> None:
    file = _table(tmp_path, header="Image,question,answers")
    with pytest.raises(DataError) as raised:
        _part(file)
    message = str(raised.value)
    assert "no column 'image', 'answer' among 'Image', 'question', 'answers'" in message
    assert "Did you mean 'Image' and 'answers'?" in message and "--delimiter" in message
    with pytest.raises(DataError, match="--question TEXT"):
        _part(_table(tmp_path, header="image,answer"))
    with pytest.raises(DataError, match="'image' is there twice"):
        _part(_table(tmp_path, header="image,image,question,answer"))


def test_what_is_left_of_a_table_says_nothing_when_the_program_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = csv_rows._lines(tmp_path / "t.csv", "image,question\na.png,q", ",", 0)
    assert next(lines) == (1, ["image", "question"])
    monkeypatch.setattr(csv_rows, "csv", None)  # as Python leaves a module at its end
    lines.close()  # pyright: ignore[reportAttributeAccessIssue]  a generator


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = _table(tmp_path, "a.png,q,a")
    write_part(_part(file), False, print)
    before = file.with_suffix(".jsonl").read_bytes()
    _table(tmp_path, "a.png,q,b", "b.png,q,a")
    with pytest.raises(DataError):
        write_part(_part(file), False, print)
    assert file.with_suffix(".jsonl").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "t.csv", "t.jsonl"}
