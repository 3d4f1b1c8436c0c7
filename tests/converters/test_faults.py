"""What cannot be used is told all at once, or left out and counted."""

from pathlib import Path

import pytest

from llava_accel.converters.entry import Rows, make_record, placed
from llava_accel.converters.faults import Part, write_part
from llava_accel.converters.image_lookup import ImageLookup
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError
from llava_accel.storage.jsonl import read_json_lines


def _rows(*answers: str, names: tuple[str, ...] = (), images: ImageLookup | None = None) -> Rows:
    """A record for each answer; a blank one gives a fault."""
    for number, answer in enumerate(answers):
        try:
            found = [images.find(names[number])] if images else ["a.jpg"]
            yield make_record(record_id=str(number), images=found, question="q", answers={answer: 1})
        except DataError as error:
            yield placed(error, Path("q.json"), str(number))


def _part(folder: Path, rows: Rows, images: ImageLookup | None = None) -> Part:
    return Part(out=folder / "t.jsonl", rows=rows, source="q.json", images=images)


def test_all_faults_are_told_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        write_part(_part(tmp_path, _rows("a", " ", "b", "", *[" "] * 30)), False, print)
    lines = str(raised.value).splitlines()
    assert lines[0] == "q.json: 32 of 34 records cannot be used:"
    assert lines[1].startswith("  q.json (id '1'): every answer is blank")
    assert len(lines) == 1 + 20 + 2
    assert lines[-2] == "  and 12 more: '22', '23', '24', '25', '26', '27', '28', '29', '30', '31', '32', '33'"
    assert lines[-1] == "Correct them, or leave them out with --on-bad-record skip"
    assert list(tmp_path.iterdir()) == []


def test_faults_are_left_out_counted_and_named_where_the_user_wants_that(tmp_path: Path) -> None:
    said: list[str] = []
    write_part(_part(tmp_path, _rows("a", " ", "b", "")), True, said.append)
    assert [row["id"] for row in read_json_lines(tmp_path / "t.jsonl")] == ["0", "2"]
    assert said[0] == f"{tmp_path / 't.jsonl'}: 2 questions on 1 images"
    assert (
        said[1].startswith("left out 2 of 4 records of q.json:\n  q.json (id '1'): every answer") and "'3'" in said[1]
    )


def test_one_fault_is_one_line_with_the_way_round_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^q\.json \(id '1'\): .* Or leave it out with --on-bad-record skip$"):
        write_part(_part(tmp_path, _rows("a", " ")), False, print)


@pytest.mark.parametrize("skips", [False, True])
def test_where_nothing_is_left_there_is_nothing_to_skip(skips: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 2 records") as raised:
        write_part(_part(tmp_path, _rows(" ", "")), skips, print)
    assert "--on-bad-record" not in str(raised.value)
    with pytest.raises(DataError, match="there is no record"):
        write_part(_part(tmp_path, []), skips, print)


def test_missing_images_are_counted_and_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "deep" / "0.jpg").touch()
    names = ("0.jpg", "1.jpg", "1.jpg", *[f"{number}.jpg" for number in range(3, 10)])

    def part() -> Part:
        images = ImageLookup(tmp_path / "images", "http://example.org/a.zip")
        return _part(tmp_path, _rows("a", *["b"] * 8, " ", names=names, images=images), images)

    with pytest.raises(DataError) as raised:
        write_part(part(), False, print)
    message = str(raised.value)
    assert "8 of 9 images are not in" in message and "1.jpg, 3.jpg, 4.jpg, 5.jpg and 4 more" in message
    assert "http://example.org/a.zip" in message and "the 9 question(s) on them" in message
    assert "\n" not in message and raised.value.kind == "missing_image"
    said: list[str] = []
    write_part(part(), True, said.append)
    assert said[1].count("\n") == 1 and "left out 9 of 10" in said[1] and "8 of 9 images" in said[1]
    assert read_json_lines(tmp_path / "t.jsonl")[0]["image"] == "deep/0.jpg"


def test_an_id_that_comes_twice_is_a_fault(tmp_path: Path) -> None:
    rows = [row for row in [*_rows("a"), *_rows("b")]]
    with pytest.raises(DataError, match=r"\(id '0'\): the question occurs twice"):
        write_part(_part(tmp_path, rows), False, print)


@pytest.mark.parametrize("name", ["../o.jpg", "/etc/o.jpg", "deep/../../o.jpg", "a\0b.jpg"])
def test_an_image_outside_the_folder_is_never_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "o.jpg").touch()
    with pytest.raises(DataError):
        ImageLookup(tmp_path / "images", "").find(name)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Check --images"):
        ImageLookup(tmp_path / "absent", "")


def test_a_name_out_of_the_data_never_controls_the_terminal(tmp_path: Path) -> None:
    images = ImageLookup(tmp_path, "")
    with pytest.raises(DataError):
        images.find("\x1b[2J.jpg")
    assert "\x1b" not in images.shortage()[0] and "x1b[2J.jpg" in images.shortage()[0]


def test_a_record_has_a_mark_for_each_image_and_none_without() -> None:
    def prompt(*images: str) -> object:
        record = make_record(record_id="1", images=images, question="q", answers={"a": 1}, suffix="s")
        assert ("image" in record) == bool(images)
        return record["conversations"]

    answer = {"from": "gpt", "value": "a"}
    assert prompt() == [{"from": "human", "value": "q\ns"}, answer]
    assert prompt("a", "b") == [{"from": "human", "value": "<image>\n<image>\nq\ns"}, answer]
