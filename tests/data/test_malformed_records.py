"""No record is a crash, and none drives a terminal. Which records are refused: tests/helpers/broken_rows.py."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.samples import CHATML_PARTS, PARITY, corpus_of, encoder, fitting, image_in, record, write_lines
from llava_accel.data.conversation import TEMPLATES
from llava_accel.data.records import parse_record
from llava_accel.data.row_forms import RowForm
from llava_accel.sources.problems import DataError

HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}

TEXT_ONLY = record("Q", "A")

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


KEYS = "from value role content answer type text image image_url url path bytes index".split()
words = st.sampled_from(["", "<image>", "t0.png", "human", "Q", "image"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=12,
)
speaker = st.sampled_from(["human", "gpt", "user", "assistant", "system", "Human", "tool"])
part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url"])},
    optional={"text": words, "image": json_values, "image_url": json_values, "index": st.integers(-1, 2)},
)
spoken = st.sampled_from(["", "Q", "<image>", "<image>\n<image>"]) | st.lists(part, max_size=3)
turn = st.fixed_dictionaries({"from": speaker, "value": spoken})
columns = st.tuples(
    st.sampled_from(["question", "answer", "image", "conversations", "id"]), st.sampled_from(["text", "img.path", "x"])
)


@settings(deadline=None, max_examples=200)
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
            "answer": json_values,
            "choices": json_values,
            "options": st.dictionaries(st.sampled_from("ABx"), json_values) | json_values,
            "system": json_values,
            "system_prompt": json_values,
            "conversation": st.lists(turn, max_size=5),
            "texts": st.lists(st.fixed_dictionaries({"user": words, "assistant": words}) | json_values) | json_values,
            "prompt": words | st.lists(turn) | json_values,
            "completion": words | turn | st.lists(turn) | json_values,
            "chosen": words | turn | st.lists(turn) | json_values,
            "query": json_values,
            "response": json_values,
            "history": st.lists(st.lists(words, min_size=2, max_size=2)) | json_values,
            "instruction": json_values,
            "input": json_values,
            "output": json_values,
            "caption": json_values,
            "text": json_values,
            "images": json_values,
            "img": json_values,
        },
    ),
    form=st.tuples(st.lists(columns, max_size=2).map(tuple), st.sampled_from(["error", "start"])),
    template=st.sampled_from([*TEMPLATES, "auto"]),
)
@example(fields=record("<image>", "A", image="x" * 300), form=(), template="v1")
@example(fields=record("Q", "A", "Q", "A"), form=(), template="plain")
def test_any_json_is_an_example_or_a_data_error(
    fields: dict[str, object], form: tuple[Any, ...], template: str
) -> None:
    tokenizer = fitting(template)
    try:
        checked = parse_record(json.dumps(fields).encode(), 1, RowForm(*form))
        encode_any = encoder(tokenizer, template, chat_template=CHATML_PARTS if template == "auto" else None)
        example = encode_any(checked, 0, image_in(PARITY / "images")).example
        assert example.num_targets and not example.is_target[0]
    except DataError as error:
        assert error.problem and error.remedy
