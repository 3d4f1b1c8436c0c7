"""Ids and targets equal those of LLaVA's own code, and nothing but answers is ever a target."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as hypothesis_example
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.samples import (
    IMAGE_ID,
    NUM_IMAGE_TOKENS,
    PARITY,
    TRICKY,
    byte_level,
    encode,
    encoder,
    end_id,
    fitting,
    llama,
    record,
    rounds,
    spans,
    texts,
)
from llava_accel.data.conversation import TEMPLATES
from llava_accel.data.examples import Encoder
from llava_accel.data.tiling import Tiling

GOLDEN = json.loads((PARITY / "labels_golden.json").read_text())
SURROUNDED = dict.fromkeys(TEMPLATES, "{}") | {"plain": "{}\n", "llava_llama_2": "{} ", "mistral_instruct": "{} "}
"""What the template puts around an answer that is learned, besides the end token; a space before it is of its first."""


def shown(answer: str, template: str) -> str:
    """What of an answer a template writes: Llama 3's own leaves out white space round it."""
    return answer.strip() if template == "llava_llama_3" else answer


@cache
def one_token_encoder(template: str) -> Encoder:
    return Encoder(llama(), IMAGE_ID, Tiling(56, 1), template=template)


@pytest.mark.parametrize("case", GOLDEN, ids=[case["id"] for case in GOLDEN])
def test_ids_and_targets_equal_the_original(case: dict) -> None:
    fields: dict[str, object] = {"conversations": case["conversations"]}
    fields |= {"image": "t0.png"} if case["image"] else {}
    example = encode(one_token_encoder(case["version"]), fields)
    ids = [IMAGE_ID if token == -200 else token for token in case["input_ids"]]
    assert example.input_ids.tolist() == ids
    assert example.is_target.tolist() == [label != -100 for label in case["labels"]]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", TRICKY)
def test_an_answer_of_any_content_is_plain_text_and_learned_whole(template: str, answer: str) -> None:
    tokenizer = fitting(template)
    example = encode(encoder(tokenizer, template), record("What?", answer))
    (span,) = spans(example)
    if template != "plain":
        assert span.pop() == end_id(tokenizer)
    assert tokenizer.decode(span) == SURROUNDED[template].format(shown(answer, template))
    assert not set(span) & set(tokenizer.all_special_ids), "a text of the user became a special token"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("question", [text for text in TRICKY if text != "<image>"])
def test_a_question_of_any_content_is_plain_text_and_not_learned(template: str, question: str) -> None:
    tokenizer = fitting(template)
    example = encode(encoder(tokenizer, template), record(question, "yes"))
    plain = encode(encoder(tokenizer, template), record("What?", "yes"))
    assert spans(example) == spans(plain)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    assert sum(id in special for id in example.input_ids) == sum(id in special for id in plain.input_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_answer_teaches_only_the_end(template: str) -> None:
    tokenizer = fitting(template)
    (span,) = spans(encode(encoder(tokenizer, template), record("What?", "")))
    if template == "plain":
        assert tokenizer.decode(span) == "\n"  # stage 1 of LLaVA ends captions so
    else:
        assert span == [end_id(tokenizer)]


@settings(deadline=None, max_examples=150)
@given(
    rounds=rounds,
    system=st.none() | texts,
    template=st.sampled_from(list(TEMPLATES)),
    has_image=st.booleans(),
    legacy=st.booleans(),
)
@hypothesis_example(rounds=[("", ""), ("", "</s>")], system="</s>", template="v1", has_image=True, legacy=False)
def test_targets_are_exactly_the_answers_and_their_ends(
    rounds: list[tuple[str, str]], system: str | None, template: str, has_image: bool, legacy: bool
) -> None:
    tokenizer = fitting(template, legacy)
    rounds = rounds[:1] if template == "plain" else rounds
    if has_image:
        rounds = [(question, answer.replace("<image>", "")) for question, answer in rounds]
        rounds[0] = (f"<image>\n{rounds[0][0]}", rounds[0][1])
    flat = [text for pair in rounds for text in pair]
    fields = record(*flat, image="t0.png" if has_image else ())
    if system is not None:
        turns = fields["conversations"]
        assert isinstance(turns, list)
        turns.insert(0, {"from": "system", "value": system.replace("<image>", "") if has_image else system})
    example = encode(encoder(tokenizer, template), fields)
    found = spans(example)
    assert len(found) == len(rounds)
    for span, (_, answer) in zip(found, rounds, strict=True):
        learned = span if template == "plain" else span[:-1]
        assert template == "plain" or span[-1] == end_id(tokenizer)
        around = SURROUNDED[template] if answer or template == "plain" else "{}"
        assert tokenizer.decode(learned) == around.format(shown(answer, template))
    (places,) = np.nonzero(example.input_ids == IMAGE_ID)
    assert places.tolist() == [start + n for start in example.image_starts for n in range(NUM_IMAGE_TOKENS)]
    assert not example.is_target[places].any()
    assert not example.is_target[0]


def test_images_stand_as_their_tokens_in_the_order_of_the_files() -> None:
    fields = record("<image>\n<image>\nSame?", "no", "<image>\nAnd this?", "yes", image=["t0.png", "t1.png", "t2.png"])
    example = encode(encoder(), fields)
    assert [Path(view.file).name for view in example.images] == ["t0.png", "t1.png", "t2.png"]
    assert example.image_starts[1] > example.image_starts[0] + NUM_IMAGE_TOKENS, "a line break stands between them"
    for start in example.image_starts:
        assert (example.input_ids[start : start + NUM_IMAGE_TOKENS] == IMAGE_ID).all()
    assert (example.input_ids == IMAGE_ID).sum() == 3 * NUM_IMAGE_TOKENS


def test_a_first_token_that_nothing_precedes_is_no_target() -> None:
    example = encode(encoder(byte_level(), "plain"), record("", "A cat"))
    assert byte_level().decode(example.input_ids.tolist()) == "A cat\n"
    assert example.is_target.tolist() == [False] + [True] * (len(example.input_ids) - 1)


def test_generation_starts_where_the_last_answer_begins() -> None:
    example = encode(encoder(), record("one?", "1", "two?", "2"))
    whole = example.input_ids.tolist()
    assert whole[example.prompt_length() :] == spans(example)[-1]
    assert len(spans(example)) == 2
    assert (
        encode(encoder(), record("one?", "1", "two?", "other")).input_ids.tolist()[: example.prompt_length()]
        == (whole[: example.prompt_length()])
    )


def test_a_template_whose_tokens_are_missing_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"<\|im_start\|>.*auto"):
        encode(encoder(llama(), "chatml"), record("What?", "A cat"))


def test_a_template_whose_token_has_no_row_is_refused() -> None:
    rows = byte_level().get_vocab()["<|im_start|>"]
    with pytest.raises(ValueError, match=rf"<\|im_start\|>.*number {rows} .*{rows} rows"):
        encode(encoder(byte_level(), "chatml", num_rows=rows), record("What?", "A cat"))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    with pytest.raises(ValueError, match="end-of-sequence"):
        encode(encoder(tokenizer, "v1"), record("What?", "A cat"))


def test_stretches_of_targets_are_never_neighbours() -> None:
    example = encode(encoder(), record("", "", "", ""))
    starts = np.flatnonzero(example.is_target)
    assert all(later - earlier > 1 for earlier, later in pairwise(starts))
