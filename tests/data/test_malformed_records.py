"""Every bad record is an error that names row, id and remedy; no JSON is a crash."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import PARITY, corpus, corpus_of, encoder, record, write_lines

from llava_accel.data.problems import DataError
from llava_accel.data.records import parse_record

HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}

TEXT_ONLY = record("Q", "A")
MALFORMED: dict[str, tuple[object, str, str]] = {  # name -> row, kind, a word of the message
    "a number": (5, "json", "not a JSON object"),
    "a list": ([1], "json", "not a JSON object"),
    "null": (None, "json", "not a JSON object"),
    "nothing": ({}, "fields", "'conversations' is missing"),
    "turns are null": ({"conversations": None}, "fields", "missing"),
    "turns are a string": ({"conversations": "Q"}, "fields", "'conversations' is 'Q'"),
    "turns are an object": ({"conversations": HUMAN}, "fields", "'conversations' is"),
    "no turns": ({"conversations": []}, "empty", "no turns"),
    "only a system turn": ({"conversations": [{"from": "system", "value": "S"}]}, "empty", "no turns"),
    "a turn is a string": ({"conversations": ["Q", GPT]}, "fields", "turn 1 is 'Q'"),
    "a turn is null": ({"conversations": [HUMAN, None]}, "fields", "turn 2 is 'None'"),
    "an unknown role": ({"conversations": [HUMAN, {"from": "bot", "value": "A"}]}, "roles", "turn 2 is from 'bot'"),
    "a role in capitals": ({"conversations": [{"from": "Human", "value": "Q"}, GPT]}, "roles", "'Human'"),
    "no role": ({"conversations": [{"value": "Q"}, GPT]}, "roles", "turn 1 is from 'None'"),
    "a role is a number": ({"conversations": [{"from": 1, "value": "Q"}, GPT]}, "roles", "from '1'"),
    "a role is a list": ({"conversations": [{"from": ["human"], "value": "Q"}, GPT]}, "roles", "turn 1"),
    "a text is missing": ({"conversations": [HUMAN, {"from": "gpt"}]}, "fields", "text of turn 2 is 'None'"),
    "a text is null": ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "fields", "turn 2 is 'None'"),
    "a text is a number": ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "fields", "turn 2 is '3'"),
    "a text is a list": ({"conversations": [HUMAN, {"from": "gpt", "value": ["A"]}]}, "fields", "turn 2"),
    "two human turns": ({"conversations": [HUMAN, HUMAN, GPT]}, "roles", "turn 2 is from 'user'"),
    "two answers": ({"conversations": [HUMAN, GPT, GPT]}, "roles", "turn 3 is from 'assistant'"),
    "a leading answer": ({"conversations": [GPT, HUMAN, GPT]}, "roles", "leading answer"),
    "a trailing question": ({"conversations": [HUMAN, GPT, HUMAN]}, "roles", "ends with a question"),
    "a late system turn": ({"conversations": [HUMAN, {"from": "system", "value": "S"}, GPT]}, "roles", "system"),
    "a picture without a mark": (record("Q", "A", image="a.png"), "image_count", "0 <image>"),
    "a mark without a picture": (record("<image>\nQ", "A"), "image_count", "names 0 picture"),
    "two marks, one picture": (record("<image><image>", "A", image="a.png"), "image_count", "2 <image>"),
    "one mark, two pictures": (record("<image>", "A", image=["a", "b"]), "image_count", "names 2"),
    "a mark in an answer": (record("<image>", "see <image>", image="a"), "image_count", "outside a user turn"),
    "a picture is a number": (record("Q", "A", image=3), "fields", "'image' holds '3'"),
    "a picture is an object": (record("<image>", "A", image=[{"bytes": "x"}]), "fields", "'image' holds"),
    "a picture is null": (record("<image>", "A", image=["a", None]), "fields", "'image' holds 'None'"),
    "a picture is empty": (record("<image>", "A", images=""), "fields", "'image' holds ''"),
    "an id is a list": (TEXT_ONLY | {"id": ["x"]}, "fields", "'id'"),
    "an id is true": (TEXT_ONLY | {"id": True}, "fields", "'id'"),
    "an id is a fraction": (TEXT_ONLY | {"id": 1.5}, "fields", "'id'"),
    "a question is a number": (TEXT_ONLY | {"question": 3}, "fields", "'question' is '3'"),
    "a type is a list": (TEXT_ONLY | {"answer_type": []}, "fields", "'answer_type'"),
    "answers are empty": (TEXT_ONLY | {"answers": []}, "fields", "'answers'"),
    "answers are a number": (TEXT_ONLY | {"answers": 3}, "fields", "'answers'"),
    "answers are nulls": (TEXT_ONLY | {"answers": {"red": None}}, "fields", "'answers'"),
    "a count is a string": (TEXT_ONLY | {"answers": {"red": "3"}}, "fields", "'answers'"),
    "a count is a list": (TEXT_ONLY | {"answers": {"red": [3]}}, "fields", "'answers'"),
    "a count is zero": (TEXT_ONLY | {"answers": {"red": 0}}, "fields", "'answers'"),
    "a count is true": (TEXT_ONLY | {"answers": {"red": True}}, "fields", "'answers'"),
    "a count has no end": (TEXT_ONLY | {"answers": {"red": float("inf")}}, "fields", "'answers'"),
    "a count is no number": (TEXT_ONLY | {"answers": {"red": float("nan")}}, "fields", "'answers'"),
    "an answer is a number": (TEXT_ONLY | {"answers": ["red", 3]}, "fields", "'answers'"),
    "an answer has no text": (TEXT_ONLY | {"answers": [{"answer_id": 3}]}, "fields", "'answers'"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "kind", "word"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_record_is_named_with_row_id_and_remedy(tmp_path: Path, row: Any, kind: str, word: str) -> None:
    if isinstance(row, dict):
        row = {"id": "the one"} | row
    data = corpus(tmp_path, [TEXT_ONLY, TEXT_ONLY, row])
    with pytest.raises(DataError) as caught:
        data.encode(2)
    error, message = caught.value, str(caught.value)
    assert error.kind == kind
    assert word in message
    assert message.startswith(f"{tmp_path / 'data.jsonl'}, row 3")
    assert error.remedy and message.endswith(error.remedy)
    if isinstance(row, dict) and isinstance(row["id"], str):
        assert "(id 'the one')" in message


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b'{"id": "x", "conversations": [', "not valid JSON"),
        (b'{"id": "x"} {"id": "y"}', "not valid JSON"),
        (b"{'id': 'x'}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"id": "\xff\xfe"}', "not UTF-8"),
        (b"\x00", "not valid JSON"),
        (rb'{"conversations": [{"from": "human", "value": "\ud83d"}]}', "half a character"),
        (rb'{"conversations": [{"from": "human", "value": "\uDE00\uD83D"}]}', "half a character"),
    ],
)
def test_what_is_no_json_is_an_error_of_its_row(raw: bytes, word: str) -> None:
    with pytest.raises(DataError, match=word) as caught:
        parse_record(raw, 1)
    assert caught.value.kind == "json"


def test_an_escaped_pair_is_a_whole_character() -> None:
    raw = rb'{"conversations": [{"from": "human", "value": "\ud83d\ude00"}, {"from": "gpt", "value": "\\ud83d"}]}'
    assert [turn.text for turn in parse_record(raw, 1).turns] == ["\U0001f600", "\\ud83d"]


CONTROL = "\x1b[31m\x07\r\u202e\u2028\x9b\ud83d"


@pytest.mark.parametrize(
    "row",
    [
        record("Q", "A", id=CONTROL, image=3),
        {"id": CONTROL, "conversations": CONTROL},
        {"conversations": [{"from": CONTROL, "value": "Q"}, GPT]},
        {"conversations": [HUMAN, CONTROL]},
        {"conversations": [HUMAN, {"from": "gpt", "value": [CONTROL]}]},
        record("<image>", "A", image=f"../{CONTROL[:-1]}"),
        record("<image>", "A", image=f"{CONTROL[:-1]}.png"),
        record("Q", "A", answers={CONTROL: 0}),
        record("Q", "A", question=[CONTROL]),
        record("Q", CONTROL),
        CONTROL,
    ],
)
def test_control_characters_of_the_data_never_reach_a_message(tmp_path: Path, row: object) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(row))  # escaped, as half a character can only be
    data = corpus_of(tmp_path / "data.jsonl")
    with pytest.raises(DataError) as caught:
        data.encode(0)
    assert [c for c in str(caught.value) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")] == []


def test_a_huge_value_does_not_fill_the_message(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"id": "x" * 10_000, "conversations": "y" * 10_000}])
    with pytest.raises(DataError) as caught:
        corpus_of(path).record(0)
    assert len(str(caught.value)) < 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.sampled_from(["", "<image>", "t0.png", "human"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "answer"]), inner, max_size=3)
    ),
    max_leaves=12,
)
speaker = st.sampled_from(["human", "gpt", "user", "assistant", "system"])
turn = st.fixed_dictionaries({"from": speaker, "value": st.sampled_from(["", "Q", "<image>", "<image>\n<image>"])})


@settings(deadline=None, max_examples=300)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "id": json_values,
            "conversations": st.lists(turn | json_values, max_size=4) | json_values,
            "messages": json_values,
            "image": st.sampled_from(["t0.png", "none.png", "../x", "a\0b", "x" * 5000]) | json_values,
            "answers": json_values,
            "question": json_values,
        },
    )
)
@example(fields=record("<image>", "A", image="x" * 300))
def test_any_json_is_an_example_or_a_data_error(fields: dict[str, object]) -> None:
    try:
        checked = parse_record(json.dumps(fields).encode(), 1)
        encoder()(checked, 0, PARITY / "images")
    except DataError as error:
        assert error.problem and error.remedy
