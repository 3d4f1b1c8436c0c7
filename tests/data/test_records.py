"""Every spelling of a good record is read; every bad one is an error that names row, id and remedy."""

import json
from pathlib import Path

import pytest

from helpers.samples import corpus, record
from llava_accel.data.conversation import Turn
from llava_accel.data.records import as_given, parse_record
from llava_accel.sources.problems import DataError

HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
TURNS = (Turn("user", "Q"), Turn("assistant", "A"))


def parse(fields: object):
    return parse_record(json.dumps(fields).encode(), 7)


@pytest.mark.parametrize(
    "fields",
    [
        {"conversations": [HUMAN, GPT]},
        {"messages": [HUMAN, GPT]},
        {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"messages": [{"from": "user", "value": "Q"}, {"role": "gpt", "content": "A"}]},
        # Parquet writes every column in every row, null where a row has nothing.
        {"conversations": None, "messages": [HUMAN, GPT], "image": None, "question": None, "answers": None},
        {"conversations": [HUMAN | {"role": None}, {"from": None, "value": None, "role": "gpt", "content": "A"}]},
    ],
)  # fmt: skip
def test_both_spellings_of_keys_and_roles_are_read(fields: dict[str, object]) -> None:
    assert parse(fields).turns == TURNS


def test_a_system_turn_comes_first() -> None:
    turns = [{"from": "system", "value": "S"}, HUMAN, GPT]
    assert parse({"conversations": turns}).turns == (Turn("system", "S"), *TURNS)


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        (record("<image>\nQ", "A", image="a.png"), ("a.png",)),
        (record("<image>\nQ", "A", images=["a.png"]), ("a.png",)),
        (record("<image><image>\nQ", "A", image=["a.png", "b.png"]), ("a.png", "b.png")),
        (record("<image>", "A", "<image>", "B", image=["a.png", "b.png"]), ("a.png", "b.png")),
        (record("<image>\nQ", "A", image=None, images=["a.png"]), ("a.png",)),
        (record("Q", "A", image=None), ()),
        (record("Q", "A", image=[]), ()),
    ],
)
def test_one_image_or_a_list_of_them_is_read(fields: dict[str, object], images: tuple[str, ...]) -> None:
    assert parse(fields).images == images


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": "a"}, "a"),
        ({"id": 12}, "12"),
        ({"id": 0}, "0"),
        ({"question_id": 5}, "5"),
        ({"id": None, "question_id": 5}, "5"),
        ({"id": None}, "7"),
        ({}, "7"),
    ],
)
def test_a_record_without_an_id_goes_by_its_row(fields: dict[str, object], expected: str) -> None:
    assert parse(record("Q", "A", **fields)).id == expected


def test_the_same_id_may_stand_twice(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A", id="x"), record("Q", "B", id="x")])
    assert [data.record(row).id for row in range(2)] == ["x", "x"]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"red": 3, "pink": 1.0}, ["red", "red", "red", "pink"]),
        ({"red": 2, "blue": None}, ["red", "red"]),
        (["red", "pink", "red"], ["red", "red", "pink"]),
        ([{"answer": "red", "answer_id": 1}, {"answer": "pink"}], ["red", "pink"]),
    ],
)
def test_annotators_answers_are_read_from_counts_and_from_lists(answers: object, expected: list[str]) -> None:
    assert as_given(parse(record("Q", "A", answers=answers)).answers) == expected


@pytest.mark.parametrize("answers", [{"red": 10_001}, {"red": 9_999, "pink": 2}, ["red"] * 10_001, {"red": 10**400}])
def test_answers_that_would_fill_the_memory_when_written_out_are_refused(answers: object) -> None:
    with pytest.raises(DataError, match="at most 10,000 annotators"):
        parse(record("Q", "A", answers=answers))
