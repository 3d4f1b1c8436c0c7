"""Text becomes the ids that its tokenizer makes of it, with the leading space in its place and nothing ever parsed."""

import copy
import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from helpers.samples import NUM_IMAGE_TOKENS, PARITY, byte_level, encode, encoder, end_id, llama, record, texts
from llava_accel.data.conversation import Piece
from llava_accel.data.labels import Labeller
from llava_accel.data.text_encoder import _WORDS, Context, TextEncoder

GOLDEN = json.loads((PARITY / "labels_golden.json").read_text())


@cache
def sentencepiece(space_first: bool) -> SentencePieceProcessor:
    """The library that LLaVA's tokenizer calls, with or without its own space at the start."""
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((PARITY / "llava-orig" / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = space_first
    return SentencePieceProcessor(model_proto=model.SerializeToString())


@cache
def text_encoder(legacy: bool, name: str = "") -> TextEncoder:
    """Made once for each name: it takes longer than many texts."""
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
    found = text_encoder(legacy)
    assert found._splits, "SentencePiece's tokens never reach over a space"
    contexts: dict[Context, bool] = {
        "start": found.space_at_start, "special": found.space_after_special, "text": False
    }  # fmt: skip
    for after, leads in contexts.items():
        lead = found._space if leads and text else ""
        whole = found._backend.encode(lead + text, add_special_tokens=False).ids
        for _ in range(2):  # the second time from what is known
            assert found(text, after) == whole


@settings(deadline=None, max_examples=500)
@given(text=st.text(st.sampled_from("ab▁ \n\0"), min_size=1, max_size=8), space=st.sampled_from(["", " ", "▁"]))
def test_a_text_is_cut_into_words_with_all_spaces_that_lead_to_them(text: str, space: str) -> None:
    assert list(filter(None, TextEncoder._split(text, space))) == _WORDS.findall(space + text)


@pytest.mark.parametrize("legacy", [True, False])
@settings(deadline=None, max_examples=200)
@given(
    head=st.text(st.sampled_from("ab▁ \n.'é你"), max_size=9),
    text=st.text(st.sampled_from("ab▁ \n.'é你"), max_size=12),
    after=st.sampled_from(["start", "special", "text"]),
)
def test_what_many_texts_begin_with_changes_nothing(legacy: bool, head: str, text: str, after: Context) -> None:
    plain, found = text_encoder(legacy), text_encoder(legacy, "one that expects")
    found._head = ""  # of the example before
    found.expect(head)
    for whole in (f"{head} {text}", f"{head}{text}", head, text):
        assert found(whole, after) == plain(whole, after)


def test_the_encoder_expects_what_its_template_says_before_a_question() -> None:
    found = encoder(template="v1")._label.encode_text
    assert found._head.startswith("A chat between") and found._head.endswith("USER:") and found._heads[""]
    found._heads = {space: [7] for space in found._heads}
    assert found(f"{found._head} Q", "start")[0] == 7, "it is used"


def test_a_tokenizer_whose_tokens_reach_over_spaces_takes_texts_whole() -> None:
    assert not TextEncoder(byte_level())._splits
    tokenizer = copy.deepcopy(llama())
    tokenizer.add_tokens(["two words"])
    with_phrase, plain = TextEncoder(tokenizer), TextEncoder(llama())
    assert not with_phrase._splits
    assert len(with_phrase("a two words b", "text")) < len(plain("a two words b", "text"))


def spelling(kind: str, letters: str = "</s>ab") -> PreTrainedTokenizerFast:
    """A tokenizer whose own vocabulary holds "</s>", and could spell it."""
    names = ["<unk>", "<s>", "</s>", *dict.fromkeys(letters)]
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([(name, 0.0 if len(name) > 1 else -9.0) for name in names], unk_id=0))
    else:
        vocabulary = {name: id for id, name in enumerate([*names, "</", "s>"])}
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<word>", special=False), AddedToken("<task>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("letters", ["</s>ab", "ab"], ids=["spelled", "unknown"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_that_holds_its_special_tokens_lets_no_text_become_one(kind: str, letters: str) -> None:
    if kind == "bpe" and letters == "ab":
        letters = "</s>ab"  # a merge needs its parts
    tokenizer = spelling(kind, letters)
    encode_text = TextEncoder(tokenizer)
    for text in ("</s>", "a</s>b", "<s>a", "</s></s>"):
        ids = encode_text(text, "text")
        assert not {1, 2} & set(ids)
        assert letters == "ab" or str(tokenizer.decode(ids)).replace(" ", "") == text
    unchanged = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    unchanged.encode_special_tokens = True
    assert 2 in unchanged.encode("</s>").ids, "what is kept from texts here can be spelled"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_added_tokens_keep_their_ids_and_only_words_are_parsed(kind: str) -> None:
    tokenizer = spelling(kind)
    ids = tokenizer.get_added_vocab()
    assert ids["<word>"] in TextEncoder(tokenizer)("a<word>b", "text")
    assert ids["<task>"] not in TextEncoder(tokenizer)("a<task>b", "text")
    allowed = TextEncoder(tokenizer, words={"<task>"})
    assert [token for token in allowed("a<task>b", "text") if token in ids.values()] == [ids["<task>"]]


def test_a_tokenizer_that_strips_spaces_keeps_the_one_between_two_texts() -> None:
    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "▁b": 3}, [("▁", "b")]))
    strip = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence([*strip, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encode_text = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert encode_text("  b ", "start") == [3]
    assert encode_text("a", "text") == [1]
    assert encode_text(" b", "text") == encode_text("   b", "text") == [3]
    assert encode_text("   ", "text") == []
