"""Rounds that do not fit are dropped from the end, as few as possible and in few passes; blank answers are not learned."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.samples import (
    CHATML_PARTS,
    IMAGE_ID,
    NUM_IMAGE_TOKENS,
    byte_level,
    corpus,
    encode,
    encoder,
    record,
    write_images,
)
from llava_accel.data import examples
from llava_accel.data.examples import Encoder
from llava_accel.data.labels import Labeller
from llava_accel.data.records import is_blank
from llava_accel.data.tiling import Tiling
from llava_accel.data.trie import num_common


def talk(count: int, **fields: object) -> dict[str, object]:
    """Rounds of different lengths."""
    texts = [text for n in range(count) for text in (f"Q{'?' * (n % 3)}", "word " * (1 + n % 4))]
    return record(*texts, **fields)


@pytest.mark.parametrize("template", ["v1", "chatml"])
@pytest.mark.parametrize("max_length", [60, 61, 75, 100, 140, 1000])
def test_as_many_rounds_are_kept_as_fit(template: str, max_length: int) -> None:
    tokenizer = byte_level() if template == "chatml" else None
    lengths = [len(encode(encoder(tokenizer, template), talk(count)).input_ids) for count in range(1, 13)]
    wanted = max((count for count, length in enumerate(lengths, start=1) if length <= max_length), default=0)
    dropping = encoder(tokenizer, template, max_length=max_length, on_too_long="drop_turns")
    assert encode(dropping, talk(12)).input_ids.tolist() == (
        encode(encoder(tokenizer, template), talk(wanted)).input_ids.tolist()
    )
    assert 1 <= wanted < 12 or max_length == 1000


@pytest.mark.parametrize("auto", [False, True])
def test_a_record_of_many_rounds_is_encoded_a_few_times_and_not_once_a_round(
    monkeypatch: pytest.MonkeyPatch, auto: bool
) -> None:
    count, pieces = 1500, list[int]()
    label = Labeller.__call__

    def counted(self: Labeller, given: list, *arguments: object, **named: object) -> object:
        pieces.append(len(given))
        return label(self, given, *arguments, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Labeller, "__call__", counted)
    settings: Any = {"template": "auto", "chat_template": CHATML_PARTS} if auto else {"template": "chatml"}
    tiling = Tiling(56, NUM_IMAGE_TOKENS)
    dropping = Encoder(byte_level(), IMAGE_ID, tiling, on_too_long="drop_turns", max_length=500, **settings)
    kept = encode(dropping, talk(count))
    assert 400 < len(kept.input_ids) <= 500
    assert len(pieces) <= 3 + math.log2(count) and sum(pieces) < 3 * max(pieces)


def test_the_turns_that_go_are_counted_with_their_images(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    texts = ["<image>\nQ", "A", "Q", "B", "<image>\n" + "word " * 30, "C", "Q", "D"]
    system = {"from": "system", "value": "S"}
    row = record(*texts, image=["a.png", "b.png"])
    row["conversations"].insert(0, system)  # type: ignore[attr-defined]
    data = corpus(tmp_path, [row], max_length=60, on_too_long="drop_turns")
    encoded = data.encode(0)
    assert (encoded.num_turns, encoded.dropped_turns) == (4, 4)
    assert [turn.role for turn in encoded.record.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [Path(view.file).name for view in encoded.example.images] == ["a.png"]


BLANK = ["", " ", "\n\t ", "\u00a0", "\u200b\ufeff", "\x00"]


@pytest.mark.parametrize("text", BLANK)
def test_a_blank_answer_anywhere_in_a_record_is_refused_with_its_turn(tmp_path: Path, text: str) -> None:
    rows = [record("Q", text), record("Q", "A", "Q", text, "Q", "B"), record(text, "A")]
    data = corpus(tmp_path, rows)
    for row, turn in ((0, 2), (1, 4)):
        with pytest.raises(ValueError, match=rf"row {row + 1}: the answer in turn {turn} is blank") as caught:
            data.encode(row)
        assert "remove it together with its question" in str(caught.value)
    assert data.encode(2).example.num_targets > 1  # a question may be blank
    # Without the round, as the message says, the record can be used.
    (tmp_path / "data.jsonl").write_text(json.dumps(record("Q", "A", "Q", "B")))
    assert is_blank(text) and corpus(tmp_path, [record("Q", "A", "Q", "B")]).encode(0)


@pytest.mark.parametrize("text", [".", "0", "🙂", "न", " a", "\u200bא"])
def test_a_text_with_one_character_that_is_seen_is_not_blank(text: str) -> None:
    assert not is_blank(text)


def test_blank_answers_of_annotators_are_not_learned_and_the_others_share_the_weight(tmp_path: Path) -> None:
    answers = {"cat": 6, " ": 2, "dog": 2}
    rows = [record("Q", "cat", answers=answers), record("Q", "cat", answers={"": 3})]
    data = corpus(tmp_path, rows, answers="weighted")
    assert [example.weight for example in data.encode(0).examples] == [0.75, 0.25]
    assert [example.weight for example in data.encode(1).examples] == [1.0]


def test_what_an_answer_shares_with_any_earlier_one_is_found_beside_it_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(examples, "num_common", lambda *pair: calls.append(1) or num_common(*pair))
    answers = {f"{'a ' * (n % 7)}{n * 37 % 100} of {n}": 1 + n % 3 for n in range(200)}
    encoded = corpus(tmp_path, [record("Q", "A", answers=answers)], answers="weighted").encode(0)
    assert len(calls) <= 2 * len(encoded.examples)  # of thousands of answers each cannot be compared with all
    known: list[Any] = []
    for example in encoded.examples:
        assert example.num_repeated == max((num_common(example.input_ids, other) for other in known), default=0)
        known.append(example.input_ids)
