"""Two records contradict each other only where both cannot be right."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import PARITY, talk
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.data.records import Record, parse_record
from llava_accel.data.row_forms import RowForm
from llava_accel.data.survey import survey
from llava_accel.scoring.contradictions import contradict, contradictions
from llava_accel.sources.named import Named


def row(answer: str, **fields: Any) -> dict[str, Any]:
    return talk(1, "What colour?", answer, "t1.png") | fields


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (row("red"), row("blue"), True),
        (row("red"), row(" The Red."), False),
        (row("two"), row("2"), False),
        (row("rouge"), row("赤"), True),
        # Annotators need one answer in common.
        (row("red", answers={"red": 7, "blue": 3}), row("blue"), False),
        (row("red", answers={"red": 7, "pink": 3}), row("blue", answers=["blue", "navy"]), True),
        # Options count, not their letters.
        (row("A", choices=["red", "blue"]), row("B", choices=["blue", "red"]), False),
        (row("A", choices=["red", "blue"]), row("B", choices=["red", "blue"]), True),
        (row("A. red", choices=["red", "blue"]), row("A", choices=["red", "blue"]), False),
        # Captions differ and may both be right.
        (row("a red ball lies on the grass"), row("a child is throwing a ball"), False),
        (row("red"), row("it is a ball whose colour is red"), False),
    ],
)  # fmt: skip
def test_what_contradicts_what(one: dict[str, Any], other: dict[str, Any], expected: bool) -> None:
    records = [parse_record(json.dumps(each).encode(), 0) for each in (one, other)]
    assert contradict(*records) is contradict(*records[::-1]) is expected


def test_pairs_contradict_each_other_where_each_prefers_what_the_other_rejects() -> None:
    def pair(chosen: str, rejected: str) -> Record:
        fields = {"image": "t1.png", "question": "Which?", "chosen": chosen, "rejected": rejected}
        return parse_record(json.dumps(fields).encode(), 0, RowForm(pairs=True))

    long = "a red ball lies on the grass in front of a house"
    assert contradict(pair(long, "a dog"), pair("A dog.", long)) and contradict(pair("no", "yes"), pair("yes", "no"))
    assert not contradict(pair("red", "blue"), pair("green", "red"))
    assert not contradict(pair("red", "blue"), pair("green", "pink"))


def test_every_round_counts_and_so_does_the_system_prompt() -> None:
    def record(*turns: str) -> Any:
        roles = ("human", "gpt") if len(turns) % 2 == 0 else ("system", "human", "gpt")
        names = [roles[0], *(("human", "gpt") * 3)] if len(roles) == 3 else ["human", "gpt"] * 3
        texts = [{"from": name, "value": text} for name, text in zip(names, turns, strict=False)]
        return parse_record(json.dumps({"conversations": texts}).encode(), 0)

    assert contradict(record("colour?", "red", "shape?", "round"), record("colour?", "blue", "shape?", "round"))
    assert not contradict(record("In German.", "colour?", "rot"), record("In English.", "colour?", "red"))
    assert contradict(record("In English.", "colour?", "blue"), record("In English.", "colour?", "red"))


def test_only_records_on_the_same_picture_and_question_are_compared(tmp_path: Path) -> None:
    rows = [
        talk(0, "What colour?", "red", "t1.png"),
        talk(1, "What colour?", "blue", "t2.png"),
        talk(2, "What shape?", "round", "t1.png"),
        talk(3, "What colour?", "green", "t1.png"),
        talk(4, "What colour?", "red", "t1.png"),
        talk(5, "Who?", "he"),
        talk(6, "Who?", "she"),
        talk(7, "What colour?", "green", "t1.png"),
        talk(8, "What colour?", "blue", "t2.png"),
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    named = [Named(str(tmp_path / "data.jsonl"), str(PARITY / "images"))]
    corpus = Corpus(open_sources(named, tmp_path / "cache"), find_images)
    read = survey(corpus, workers=0, decode=False)
    assert contradictions(corpus, read, read.usable) == {0: 3, 3: 0, 4: 3, 7: 0}
    assert contradictions(corpus, read, read.usable[1:3]) == {} == contradictions(corpus, read, read.usable[:0])
