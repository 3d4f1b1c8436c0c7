"""`template = "auto"` trains on what the base's own chat template renders, and learns answers and their ends only."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from helpers.samples import (
    CHATML,
    CHATML_PARTS,
    LLAVA,
    PARITY,
    byte_level,
    encode,
    encoder,
    llama,
    record,
    rounds,
    spans,
)
from llava_accel.data.conversation import BOS, EOS, Piece, Turn
from llava_accel.data.jinja_template import ChatTemplate

TRIMMING = CHATML.replace("m['content']", "(m['content'] | trim)")
QUESTION, ANSWER = Turn("user", "What is it?"), Turn("assistant", "A cat.")


def text(pieces: list[Piece]) -> str:
    """The conversation as one text, for comparison."""
    return "".join("<image>" if piece.kind == "image" else piece.text for piece in pieces)


def learned(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.supervised]


def special(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.kind == "special"]


def test_the_llava_hf_template_gives_its_own_text_and_an_end() -> None:
    pieces = ChatTemplate(llama(), LLAVA)([Turn("user", "<image>\nWhat is it?"), ANSWER], True)
    assert text(pieces) == "bosUSER: <image>\nWhat is it? ASSISTANT: A cat.eos"
    assert learned(pieces) == [" A cat.", "eos"]


def test_rounds_without_an_end_token_are_learned_without_one_but_the_last() -> None:
    turns = [QUESTION, ANSWER, Turn("user", "Sure?"), Turn("assistant", "Yes.")]
    pieces = ChatTemplate(llama(), LLAVA)(turns, False)
    assert text(pieces) == "bosUSER: What is it? ASSISTANT: A cat. USER: Sure? ASSISTANT: Yes.eos"
    assert learned(pieces) == [" A cat.", " Yes.", "eos"]


def test_a_system_turn_stands_where_the_template_puts_it() -> None:
    pieces = ChatTemplate(llama(), LLAVA)([Turn("system", "Be brief."), QUESTION, ANSWER], False)
    assert text(pieces) == "bosBe brief. USER: What is it? ASSISTANT: A cat.eos"
    pieces = ChatTemplate(byte_level(), CHATML)([Turn("system", "Be brief."), QUESTION, ANSWER], False)
    assert text(pieces).startswith("bos<|im_start|>system\nBe brief.<|im_end|>".replace("<|im_end|>", "eos"))
    assert learned(pieces) == ["A cat.", "eos"]


@pytest.mark.parametrize("template", [CHATML, CHATML_PARTS, TRIMMING], ids=["string", "parts", "trimming"])
def test_chatml_learns_each_answer_and_its_own_end(template: str) -> None:
    turns = [Turn("user", "<image>\nWhat is it?"), ANSWER, Turn("user", "Sure?"), Turn("assistant", "Yes.")]
    pieces = ChatTemplate(byte_level(), template)(turns, True)
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert text(pieces) == (
        f"bos{user}<image>\nWhat is it?eos\n{assistant}A cat.eos\n{user}Sure?eos\n{assistant}Yes.eos"
    )
    assert learned(pieces) == ["A cat.", "eos", "Yes.", "eos"]
    assert sum(piece.kind == "image" for piece in pieces) == 1


def test_a_trimming_template_does_not_trim_what_is_learned() -> None:
    pieces = ChatTemplate(byte_level(), TRIMMING)([QUESTION, Turn("assistant", "  indented\n")], False)
    assert learned(pieces) == ["  indented\n", "eos"]


def test_several_images_stand_before_the_text_one_a_line() -> None:
    turns = [Turn("user", "<image>\n<image>\nSame?"), ANSWER]
    assert "USER: <image>\n<image>\nSame? ASSISTANT:" in text(ChatTemplate(llama(), LLAVA)(turns, True))
    assert "user\n<image>\n<image>\nSame?eos" in text(ChatTemplate(byte_level(), CHATML_PARTS)(turns, True))
    assert "user\n<image>\n<image>\nSame?eos" in text(ChatTemplate(byte_level(), CHATML)(turns, True))


def test_a_turn_of_a_image_alone_keeps_the_ends_of_its_neighbours() -> None:
    turns = [QUESTION, ANSWER, Turn("user", "<image>"), Turn("assistant", "A dog.")]
    pieces = ChatTemplate(byte_level(), CHATML_PARTS)(turns, True)
    assert learned(pieces) == ["A cat.", "eos", "A dog.", "eos"]
    assert sum(piece.kind == "image" for piece in pieces) == 1


def test_tokens_behind_the_last_end_do_not_replace_it() -> None:
    pieces = ChatTemplate(byte_level(), CHATML + "{{ '<|endoftext|>' if not add_generation_prompt }}")(
        [QUESTION, ANSWER], False
    )
    assert learned(pieces) == ["A cat.", "eos"]
    assert pieces[-1] == EOS


def test_the_end_that_is_learned_is_the_templates_and_not_the_tokenizers() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|endoftext|>")
    assert learned(ChatTemplate(tokenizer, CHATML)([QUESTION, ANSWER], False)) == ["A cat.", "<|im_end|>"]
    endless = CHATML.replace("<|im_end|>", " ")
    assert learned(ChatTemplate(tokenizer, endless)([QUESTION, ANSWER], False)) == ["A cat.", "eos"]


def test_special_tokens_in_a_users_text_are_not_parsed() -> None:
    turns = [Turn("user", "a <|im_end|> b"), Turn("assistant", "c <|im_start|> d")]
    pieces = ChatTemplate(byte_level(), CHATML)(turns, False)
    assert [piece.kind for piece in pieces if "a <|im_end|> b" in piece.text] == ["text"]
    assert learned(pieces) == ["c <|im_start|> d", "eos"]


def test_a_users_text_that_looks_like_a_mark_is_only_text() -> None:
    answer = "\ue0000.0\ue001"
    pieces = ChatTemplate(byte_level(), CHATML)([QUESTION, Turn("assistant", answer)], False)
    assert learned(pieces) == [answer, "eos"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_bos_of_the_template_stands_once(adds_bos: bool) -> None:
    template = "{{ '<s>' }}" + LLAVA
    tokenizer = llama() if adds_bos else without_bos()
    pieces = ChatTemplate(tokenizer, template)([QUESTION, ANSWER], False)
    ids = encode(encoder(tokenizer, "auto", chat_template=template), record("What is it?", "A cat.")).input_ids.tolist()
    assert ids.count(1) == 1 and ids[0] == 1
    assert special(pieces)[0] in ("bos", "<s>")


def without_bos() -> PreTrainedTokenizerFast:
    tokenizer = type(llama()).from_pretrained(PARITY / "llava-orig", add_bos_token=False)
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("template", [LLAVA, CHATML, CHATML_PARTS], ids=["llava", "string", "parts"])
def test_ids_are_those_of_generating_with_the_template(template: str) -> None:
    """What a user's `apply_chat_template` gives to the model before the last answer is what training saw there."""
    tokenizer = llama() if template == LLAVA else byte_level()
    as_string = template == CHATML
    fields = record("What is it?", "A cat.", "Sure?", "Yes.")
    example = encode(encoder(tokenizer, "auto", chat_template=template), fields)
    messages = [
        {"role": role, "content": text if as_string else [{"type": "text", "text": text}]}
        for role, text in zip(("user", "assistant", "user"), ("What is it?", "A cat.", "Sure?"), strict=True)
    ]
    prompt = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(prompt)["input_ids"]
    assert example.input_ids[: len(expected)].tolist() == expected
    if template != LLAVA:  # there the answer's leading space comes first
        assert example.prompt_length() == len(expected)


@settings(deadline=None, max_examples=100)
@given(rounds=rounds, template=st.sampled_from([LLAVA, CHATML, CHATML_PARTS, TRIMMING]), has_image=st.booleans())
def test_targets_are_exactly_the_answers_and_their_ends(
    rounds: list[tuple[str, str]], template: str, has_image: bool
) -> None:
    tokenizer = llama() if template == LLAVA else byte_level()
    if has_image:
        rounds = [(question, answer.replace("<image>", "")) for question, answer in rounds]
        rounds[0] = (f"<image>\n{rounds[0][0]}", rounds[0][1])
    flat = [text for pair in rounds for text in pair]
    fields = record(*flat, image="t0.png" if has_image else ())
    example = encode(encoder(tokenizer, "auto", chat_template=template), json.loads(json.dumps(fields)))
    found = spans(example)
    assert found[-1].pop() == tokenizer.eos_token_id
    if template != LLAVA:
        assert all(span.pop() == tokenizer.eos_token_id for span in found[:-1])
    lead = " " if template == LLAVA else ""
    for span, (_, answer) in zip(found, rounds, strict=True):
        decoded = tokenizer.decode([*tokenizer("x", add_special_tokens=False)["input_ids"], *span])
        assert decoded == f"x{lead}{answer}"
    assert not example.is_target[np.isin(example.input_ids, [31_999])].any()


def test_the_first_piece_is_the_tokenizers_own_bos() -> None:
    assert ChatTemplate(llama(), LLAVA)([QUESTION, ANSWER], False)[0] == BOS
