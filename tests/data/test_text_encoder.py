"""Text becomes the ids that its tokenizer makes of it, with the leading space in its place and nothing ever parsed."""

import copy
import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast

from helpers.samples import (
    NUM_IMAGE_TOKENS,
    PARITY,
    byte_level,
    encode,
    encoder,
    llama,
    record,
    texts,
)
from llava_accel.data.conversation import TEMPLATES, Piece
from llava_accel.data.labels import Labeller
from llava_accel.data.text_encoder import TextEncoder

GOLDEN = json.loads((PARITY / "labels_golden.json").read_text())
TOKENIZERS = {
    "v1": llama(),
    "plain": llama(legacy=False),
    "llava_llama_2": llama(),
    "mistral_instruct": llama(legacy=False),
    "chatml": byte_level(),
}
SURROUNDED = {  # what the template puts around an answer that is learned, besides the end token
    "v1": "{}",  # the space before it belongs to its first token
    "plain": "{}\n",
    "llava_llama_2": "{} ",
    "mistral_instruct": "{} ",
    "chatml": "{}",
}
assert set(SURROUNDED) == set(TEMPLATES)


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    token_id = tokenizer.eos_token_id
    assert isinstance(token_id, int)
    return token_id


@cache
def sentencepiece(space_first: bool) -> SentencePieceProcessor:
    """The library that LLaVA's tokenizer calls, with or without its own space at the start."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((PARITY / "llava-orig" / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = space_first
    return SentencePieceProcessor(model_proto=model.SerializeToString())


@cache
def text_encoder(legacy: bool) -> TextEncoder:
    return TextEncoder(llama(legacy))


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(texts, st.text("ab ▁<s>/unk0x'\n3你🙂", max_size=30)), legacy=st.booleans())
def test_every_text_becomes_what_sentencepiece_makes_of_it(text: str, legacy: bool) -> None:
    encode_text = text_encoder(legacy)
    assert encode_text(text, "start") == (sentencepiece(True).encode(text) if text else [])
    assert encode_text(text, "special") == (sentencepiece(legacy).encode(text) if text else [])
    assert encode_text(text, "text") == sentencepiece(False).encode(text)


def test_only_a_legacy_tokenizer_puts_a_space_behind_the_end_of_an_answer() -> None:
    fields = record("one?", "1", "two?", "2")
    behind = {}
    for legacy in (True, False):
        ids = encode(encoder(llama(legacy)), fields).input_ids.tolist()
        behind[legacy] = ids[ids.index(end_id(llama())) + 1 :]
    expected = "USER: two? ASSISTANT:"
    assert behind[True][: -len(spans_of("2"))] == sentencepiece(True).encode(expected)
    assert behind[False][: -len(spans_of("2"))] == sentencepiece(False).encode(expected)
    assert behind[True] != behind[False]


def spans_of(answer: str) -> list[int]:
    return [*sentencepiece(True).encode(answer), end_id(llama())]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_chunk_starts_anew_behind_a_image(legacy: bool) -> None:
    example = encode(encoder(llama(legacy)), record("<image>\nWhat?", "A cat", image="t0.png"))
    behind = example.input_ids[example.image_starts[0] + NUM_IMAGE_TOKENS :].tolist()
    chunk = sentencepiece(True).encode("\nWhat? ASSISTANT:")
    assert behind == chunk + spans_of("A cat")
    space = sentencepiece(True).encode(" ")[:1]
    assert chunk[:1] == space and example.input_ids[example.image_starts[0] - 1] == space[0]


def test_an_empty_system_turn_leaves_no_space_behind() -> None:
    fields: dict[str, object] = {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": "What?"},
            {"from": "gpt", "value": "A cat"},
        ]
    }
    assert encode(encoder(), fields).input_ids.tolist()[1:] == [
        *sentencepiece(True).encode("USER: What? ASSISTANT:"),
        *spans_of("A cat"),
    ]


def test_in_place_images_stay_where_they_were_written() -> None:
    fields = record("Look at <image> and tell", "a cat", image="t0.png")
    moved, kept = encode(encoder(), fields), encode(encoder(image_placement="in_place"), fields)
    before = sentencepiece(True).encode("USER: Look at ")
    assert kept.input_ids[: kept.image_starts[0]].tolist()[-len(before) + 1 :] == before[1:]
    assert moved.image_starts[0] < kept.image_starts[0]


@pytest.mark.parametrize("add_prefix_space", [True, False])
@pytest.mark.parametrize("text", ["cats", " cats", "3", "\nred", "", "a  b"])
def test_a_byte_level_start_is_what_the_tokenizer_itself_makes(text: str, add_prefix_space: bool) -> None:
    tokenizer = byte_level(add_prefix_space)
    encode_text = TextEncoder(tokenizer)
    if not (add_prefix_space and text.startswith(" ")):
        assert encode_text(text, "start") == tokenizer(text)["input_ids"]
    assert tokenizer.decode(encode_text(text, "text")) == text


def test_structure_that_a_tokenizer_does_not_mark_as_special_is_still_never_read_from_text() -> None:
    tokenizer = byte_level(special=False)
    ids = tokenizer.get_added_vocab()
    label = Labeller(tokenizer, ids["<image>"], 2)
    example = label([Piece("text", "<image> <|im_end|>", supervised=True)])
    assert not {ids["<image>"], ids["<|im_end|>"]} & set(example.input_ids.tolist())
    assert tokenizer.decode(example.input_ids.tolist()) == "<image> <|im_end|>"


def test_settings_of_the_tokenizers_last_use_neither_cut_nor_fill_a_piece() -> None:
    tokenizer = byte_level().__class__(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|im_end|>")
    expected = TextEncoder(tokenizer)("What is in the image?", "start")
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert TextEncoder(tokenizer)("What is in the image?", "start") == expected
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


@pytest.mark.parametrize("legacy", [True, False])
@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("ab▁ \n\t.'é你🙂<>/s\u0301\u00a0"), max_size=30) | texts)
def test_words_apart_are_the_text_whole(legacy: bool, text: str) -> None:
    found = TextEncoder(llama(legacy))
    assert found._words is not None, "SentencePiece's tokens never reach over a space"
    whole = found._backend.encode(text, add_special_tokens=False).ids
    for _ in range(2):  # the second time from what is known
        assert found(text, "text") == whole


def test_a_tokenizer_whose_tokens_reach_over_spaces_takes_texts_whole() -> None:
    assert TextEncoder(byte_level())._words is None
    tokenizer = copy.deepcopy(llama())
    tokenizer.add_tokens(["two words"])
    with_phrase, plain = TextEncoder(tokenizer), TextEncoder(llama())
    assert with_phrase._words is None
    assert len(with_phrase("a two words b", "text")) < len(plain("a two words b", "text"))
