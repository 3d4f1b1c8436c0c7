"""Ids and labels equal those of LLaVA-NeXT's and OneVision's own code, also where it loses a conversation, which is said."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from helpers.samples import (
    IMAGE_ID,
    PARITY,
    byte_level,
    encode,
    encoder,
    fitting,
    image_in,
    llama,
    llama_3,
    record,
    spans,
)
from llava_accel.data.conversation import SYSTEM_PROMPTS, TEMPLATES, Turn
from llava_accel.data.examples import Encoder
from llava_accel.data.jinja_template import ChatTemplate
from llava_accel.data.labels import Example
from llava_accel.data.questions import ask
from llava_accel.data.records import parse_record
from llava_accel.data.tiling import Tiling
from llava_accel.data.trie import chain
from llava_accel.model.chat_template import chat_template
from llava_accel.release.verification import _last_answer
from llava_accel.sources.problems import DataError

NEXT = PARITY / "next"
IMAGE = 999_999
GOLDEN: list[dict[str, Any]] = json.loads((NEXT / "labels_golden.json").read_text())
BASES = ("next-vicuna", "onevision-qwen")


@cache
def tokenizer(base: str) -> PreTrainedTokenizerFast:
    kind = LlamaTokenizer if base == "next-vicuna" else PreTrainedTokenizerFast
    return kind.from_pretrained(NEXT / "bases" / base if base in BASES else NEXT / base)


@cache
def exact(base: str, template: str, **settings: str) -> Encoder:
    """As NeXT's code reads a conversation; an image takes one token."""
    settings = {"labels": "original", "image_placement": "start_if_single"} | settings
    return Encoder(tokenizer(base), IMAGE, Tiling(28, 1), template=template, **settings)  # pyright: ignore[reportArgumentType]


def fields(row: dict[str, Any]) -> dict[str, object]:
    made: dict[str, object] = {"conversations": row["conversations"]}
    return made | ({"image": [f"t{number}.png" for number in range(row["images"])]} if row["images"] else {})


def read(row: dict[str, Any], **settings: str) -> Example:
    return encode(exact(row["base"], row["version"], **settings), fields(row))


def name(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["base"], row["version"], row["id"]


def label(row: dict[str, Any], **settings: str) -> Example:
    """What the templates and labels make of a row, before the encoder refuses what nothing is learned from."""
    encode_record = exact(row["base"], row["version"], **settings)
    return encode_record._label(encode_record.pieces(parse_record(json.dumps(fields(row)).encode(), 1)))


def is_refused(row: dict[str, Any]) -> bool:
    """Whether the original learns nothing from a row, or gives images of it to other records."""
    return bool(row.get("error")) or row["ignored"] or (row["version"] == "plain" and row["images"] > 1)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: "-".join(name(row)))
def test_ids_and_labels_equal_the_original(row: dict[str, Any]) -> None:
    if row.get("error"):
        with pytest.raises(DataError, match="takes one question"):
            read(row)
        return
    example = label(row)
    assert [-200 if id == IMAGE else id for id in example.input_ids.tolist()] == row["input_ids"]
    # The first token has a label in the original too, which nothing predicts.
    assert example.is_target[1:].tolist() == [label != -100 for label in row["labels"]][1:]


@pytest.mark.parametrize("row", [row for row in GOLDEN if is_refused(row)], ids=lambda row: "-".join(name(row)))
def test_what_the_original_loses_is_refused_and_learned_as_the_remedy_says(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as refused:
        read(row)
    if "Split the record" in str(refused.value):  # several rounds are no caption
        return
    assert 'Set data.labels = "answers"' in str(refused.value)
    example = read(row, labels="answers")
    answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"][row["id"] == "gpt_first" :]
    ids = [id for id in example.input_ids.tolist() if id != IMAGE]
    words = tokenizer(row["base"]).decode(ids)
    assert len(spans(example)) == len(answers) and all(answer in words for answer in answers)
    assert len(example.input_ids) - len(ids) == row["images"]


def test_every_row_is_compared_and_most_are_read() -> None:
    assert len(GOLDEN) == 184 and sum(map(is_refused, GOLDEN)) == 34
    for row in GOLDEN:
        if not is_refused(row):
            assert np.array_equal(read(row).input_ids, label(row).input_ids)


@pytest.mark.parametrize("version", sorted({row["version"] for row in GOLDEN}))
def test_both_labels_have_the_same_ids_answers_and_prompt(version: str) -> None:
    more = set()
    for row in GOLDEN:
        # Of these the original writes no end of an empty answer, or reads a text as the token.
        if (
            row["version"] == version
            and not is_refused(row)
            and row["id"] not in ("empty_then_more", "ends_with_eos_text")
        ):
            one, other = read(row), read(row, labels="answers")
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.is_answer is not None and other.is_answer is None
            assert one.is_answer.tolist() == other.is_target.tolist()
            assert not (other.is_target & ~one.is_target).any()
            assert (one.prompt_length(), one.end_id) == (other.prompt_length(), other.end_id)
            more.add(one.num_targets > other.num_targets)
    assert more == {version in ("qwen_1_5", "llava_llama_3")}


@pytest.mark.parametrize("template", ["qwen_1_5", "llava_llama_3"])
def test_a_question_asks_and_an_export_is_tried_from_the_last_answer_on(template: str) -> None:
    said = record("One?", "1 or\nmore", "Two?", "2")
    for labels in ("answers", "original"):
        encode_record = encoder(fitting(template), template, labels=labels)
        example = encode(encode_record, said)
        asked = ask([chain(example)], {0: example}, {0: parse_record(json.dumps(said).encode(), 1)})
        assert asked.places.tolist() == [example.prompt_length() - 1]
        assert sorted(asked.stop_ids) == [fitting(template).eos_token_id]
        tried = _last_answer(example, 0)
        assert tried.prompt_length() == example.prompt_length() == int(np.argmax(tried.is_target))


def test_an_own_system_turn_stands_in_place_of_the_templates() -> None:
    for template in ("qwen_1_5", "llava_llama_3"):
        turns = [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Ho")]
        texts = [piece.text for piece in TEMPLATES[template](turns, False)]
        assert any("Be brief." in text for text in texts)
        assert not any(SYSTEM_PROMPTS[template] in text for text in texts)


@pytest.mark.parametrize(
    ("said", "start", "single"),
    [
        ("Look at <image> here ", "<image>\nLook at  here", "<image>\nLook at  here"),
        ("Here: <image>", "<image>\nHere:", "<image>\nHere:"),
        ("<image>Which? ", "<image>\nWhich?", "<image>Which? "),
        ("<image> or <image>?", "<image>\n<image>\nor ?", "<image> or <image>?"),
        ("Which?", "Which?", "Which?"),
    ],
)
def test_an_image_moves_as_the_placement_says(said: str, start: str, single: str) -> None:
    images = [f"t{number}.png" for number in range(said.count("<image>"))]
    raw = json.dumps(record(f"{said}", "A", "<image>", "B", image=[*images, "t3.png"]))
    for placement, expected in (("start", start), ("start_if_single", single), ("in_place", said)):
        pieces = encoder(fitting("qwen_1_5"), "qwen_1_5", image_placement=placement).pieces(
            parse_record(raw.encode(), 1)
        )
        text = "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)
        assert f"user\n{expected}<|im_end|>" in text


@pytest.mark.parametrize(("base", "template"), [("onevision-qwen", "qwen_1_5"), ("llama3-tokenizer", "llava_llama_3")])
def test_auto_reads_what_the_named_template_reads(base: str, template: str) -> None:
    own = tokenizer(base).chat_template
    assert isinstance(own, str)
    system = {"from": "system", "value": SYSTEM_PROMPTS[template]}
    conversation = record("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image="t0.png")
    conversation["conversations"] = [system, *conversation["conversations"]]  # pyright: ignore[reportGeneralTypeIssues]
    raw = json.dumps(conversation).encode()
    auto = Encoder(tokenizer(base), IMAGE, Tiling(28, 1), template="auto", chat_template=own)
    named = Encoder(tokenizer(base), IMAGE, Tiling(28, 1), template=template)
    found, expected = (each(parse_record(raw, 1), 0, image_in(PARITY / "images")).example for each in (auto, named))
    assert found.prompt_length() == expected.prompt_length()
    length = len(found.input_ids)  # which ends with the answer, without the line break that stands between turns
    assert found.input_ids.tolist() == expected.input_ids[:length].tolist() and found.end_id == expected.end_id
    assert found.is_target.tolist() == expected.is_target[:length].tolist() and not expected.is_target[length:].any()
    assert ChatTemplate(tokenizer(base), own)


@pytest.mark.parametrize(("base", "template"), [("onevision-qwen", "qwen_1_5"), ("llama3-tokenizer", "llava_llama_3")])
def test_the_template_that_is_saved_writes_what_the_language_models_own_writes(base: str, template: str) -> None:
    messages = [
        {"role": "system", "content": SYSTEM_PROMPTS[template]},
        {"role": "user", "content": " What is it?\n"},
        {"role": "assistant", "content": "A cat. "},
        {"role": "user", "content": "Sure?"},
    ]
    own, ours = (
        tokenizer(base).apply_chat_template(messages, chat_template=text, tokenize=False, add_generation_prompt=True)
        for text in (None, chat_template(template, False))
    )
    assert isinstance(own, str) and own.removeprefix("<|begin_of_text|>") == ours


def test_only_a_token_that_is_a_line_break_alone_is_learned_in_a_question() -> None:
    example = encode(encoder(fitting("qwen_1_5"), "qwen_1_5", labels="original"), record("a\nb", "c"))
    (breaks,) = np.nonzero(example.input_ids == fitting("qwen_1_5").convert_tokens_to_ids("Ċ"))
    assert len(breaks) == 7 and example.is_target[breaks].all()
    other = encode(encoder(llama_3(), "llava_llama_3", labels="original"), record("a\nb", "c"))
    (breaks,) = np.nonzero(other.input_ids == llama_3().convert_tokens_to_ids("Ċ"))
    assert other.is_target[breaks].tolist() == [False] * 5 + [True] * 2
    assert IMAGE_ID not in example.input_ids


@cache
def with_double_line_breaks() -> PreTrainedTokenizerFast:
    """OneVision's tokenizer with a token for two line breaks, as those of Qwen and Llama 3 have."""
    spec = json.loads((NEXT / "bases" / "onevision-qwen" / "tokenizer.json").read_text())
    spec["model"]["vocab"]["ĊĊ"] = 1_000
    spec["model"]["merges"].insert(0, "Ċ Ċ")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="<|im_end|>")


@pytest.mark.parametrize("answer", ["A cat.", "\nA cat.", "\n\n\nA\n\ncat.", "\n", " A cat.\n\n"])
def test_the_original_tokenises_an_answer_together_with_its_header(answer: str) -> None:
    tokenizer, said = with_double_line_breaks(), record("What?", answer, "Sure?", answer)
    original, answers = (
        encode(encoder(tokenizer, "qwen_1_5", labels=labels), said) for labels in ("original", "answers")
    )
    turn = tokenizer(f"<|im_start|>assistant\n{answer}<|im_end|>\n")["input_ids"]
    assert isinstance(turn, list) and original.input_ids[-len(turn) :].tolist() == turn
    assert original.is_target[-len(turn) :].all()
    # A line break of both is the answer's: a prompt ends before the first token that holds some of the answer.
    header = tokenizer("<|im_start|>assistant" + "\n" * (not answer.startswith("\n")))["input_ids"]
    assert (
        isinstance(header, list) and original.input_ids[: original.prompt_length()].tolist()[-len(header) :] == header
    )
    assert original.prompt_length() == len(original.input_ids) - len(turn) + len(header)
    by_itself = tokenizer(f"{answer}<|im_end|>")["input_ids"]
    assert spans(answers) == [by_itself, by_itself]
    assert (answers.input_ids.tolist() == original.input_ids.tolist()) == (not answer.startswith("\n"))


@pytest.mark.parametrize(
    ("template", "token", "is_learned"),
    [
        ("qwen_1_5", "<|im_end|>", True),
        ("qwen_1_5", "<|endoftext|>", False),
        ("llava_llama_3", "<|begin_of_text|>", True),
        ("v1", "<s>", False),
    ],
)
def test_special_tokens_are_found_in_texts_as_by_the_original(template: str, token: str, is_learned: bool) -> None:
    tokenizer = fitting(template)
    id, said = tokenizer.convert_tokens_to_ids(token), record(f"One {token} two?", f"3 {token}")
    original, answers = (
        encode(encoder(tokenizer, template, labels=labels), said) for labels in ("original", "answers")
    )
    in_question, in_answer = np.flatnonzero(original.input_ids == id)[-3 if token == "<|im_end|>" else -2 :][:2]
    assert original.is_target[in_question] == is_learned and original.is_target[in_answer]
    assert np.count_nonzero(original.input_ids == id) == np.count_nonzero(answers.input_ids == id) + 2


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "qwen_1_5"])
def test_a_question_without_an_answer_is_read_as_by_the_original(template: str) -> None:
    said, settings = record("One?", "1", "Two?"), {"labels": "original"}
    answered = encode(encoder(fitting(template), template), record("One?", "1"))
    assert encode(encoder(fitting(template), template), said).input_ids.tolist() == answered.input_ids.tolist()
    if template == "qwen_1_5":
        example = encode(encoder(fitting(template), template, **settings), said)
        asked = fitting(template)("<|im_start|>user\nTwo?<|im_end|>\n")["input_ids"]
        assert isinstance(asked, list) and example.input_ids.tolist() == [*answered.input_ids.tolist(), *asked]
        assert example.prompt_length() == answered.prompt_length()
    else:
        with pytest.raises(DataError, match="learns nothing from it"):
            encode(encoder(fitting(template), template, **settings), said)


@pytest.mark.parametrize("template", ["v1", "mistral_instruct"])
def test_the_token_that_the_original_pads_with_makes_it_ignore_a_conversation(template: str) -> None:
    said = record("One <unk> two?", "3")
    with pytest.raises(DataError, match="learns nothing from it"):
        encode(encoder(llama(), template, labels="original"), said)
    assert encode(encoder(llama(), template), said).num_targets


def test_an_empty_first_question_is_refused_as_by_the_original() -> None:
    said = record("", "1")
    with pytest.raises(DataError, match=r'first question is empty.*Set data.labels = "answers"'):
        encode(encoder(llama(), "llava_llama_2", labels="original"), said)
    assert encode(encoder(llama(), "llava_llama_2"), said).num_targets


@pytest.mark.parametrize(
    ("texts", "is_learned"),
    [
        (("One?", "1"), True),
        (("One?", "1", "Two?", "2"), True),
        (("One<|im_end|>?", "1"), False),
        (("One?", "1<|im_end|>"), False),
        (("One?", "1<|im_end|><|im_start|>user\nTwo?<|im_end|><|im_start|>assistant\n2"), True),
        (("One?", "", "Two?", "2"), False),
        (("", "1"), False),
        (("One?", "1", "Two?"), False),
    ],
)
def test_rounds_of_chatml_are_those_that_the_original_finds(texts: tuple[str, ...], is_learned: bool) -> None:
    original = encoder(byte_level(), "chatml", labels="original")
    if not is_learned:
        with pytest.raises(DataError, match="learns nothing from it"):
            encode(original, record(*texts))
        return
    rounds = ("One?", "1") if len(texts) == 2 and "<|im_end|>" not in texts[1] else ("One?", "1", "Two?", "2")
    example, expected = encode(original, record(*texts)), encode(encoder(byte_level(), "chatml"), record(*rounds))
    assert example.input_ids.tolist() == expected.input_ids.tolist()
    assert example.is_target.tolist() == expected.is_target.tolist()
