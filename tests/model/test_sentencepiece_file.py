"""A tokenizer.model becomes a tokenizer with SentencePiece's own ids, which outlive saving."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers.samples import IMAGE_ID, NUM_IMAGE_TOKENS, encode, record
from helpers.vocabularies import base_of, own_ids, texts
from llava_accel.data.examples import Encoder
from llava_accel.data.text_encoder import TextEncoder
from llava_accel.data.tiling import Tiling
from llava_accel.model.saved_processor import save_tokenizer
from llava_accel.model.tokenizer import load_tokenizer

KINDS = ("llama", "bpe", "unigram", "unigram_bytes")
TEXTS = texts(10_000)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_sentencepieces_own(tmp_path: Path, kind: str, legacy: bool) -> None:
    tokenizer, notes = load_tokenizer(base_of(kind, tmp_path, legacy=legacy))
    encode, own = TextEncoder(tokenizer), own_ids(kind)
    sample = TEXTS if legacy else TEXTS[::10]
    wrong = [text for text, ids in zip(sample, own.encode(sample), strict=True) if encode(text, "start") != ids]
    assert not wrong, (len(wrong), wrong[0], encode(wrong[0], "start"), own.encode(wrong[0]))
    assert notes == []


@pytest.mark.parametrize("kind", ["llama", "unigram_bytes"])
def test_a_text_that_goes_on_after_another_gets_no_space(tmp_path: Path, kind: str) -> None:
    encode_text, own = TextEncoder(load_tokenizer(base_of(kind, tmp_path))[0]), own_ids(kind, spaced=False)
    assert all(encode_text(text, "text") == own.encode(text) for text in TEXTS[:3000])


@pytest.mark.parametrize("kind", ["llama", "unigram_bytes"])
def test_what_exports_hold_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    save_tokenizer(tmp_path / "saved", load_tokenizer(base_of(kind, tmp_path / "base", legacy=True))[0])
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "saved"), own_ids(kind)
    sample = [text for text in TEXTS if "<" not in text]  # plain transformers parses special tokens in texts
    assert len(sample) > 5000
    assert tokenizer(sample, add_special_tokens=False)["input_ids"] == own.encode(sample)


def test_runs_of_spaces_are_joined_last_of_all(tmp_path: Path) -> None:
    tokenizer, own = load_tokenizer(base_of("llama", tmp_path))[0], own_ids("llama")
    words = tokenizer.convert_ids_to_tokens(TextEncoder(tokenizer)("a  the", "start"))
    assert words[-2:] == ["▁", "▁the"], "the run would be one token"
    ids = TextEncoder(tokenizer)("a" + " " * 37, "start")
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["▁" * 16, "▁" * 16, "▁" * 5]
    assert ids == own.encode("a" + " " * 37)


@pytest.mark.parametrize(
    ("question", "before", "after"),
    [
        ("<image>", "USER: ", " ASSISTANT:"),
        ("Look at <image> and  tell", "USER: Look at ", " and  tell ASSISTANT:"),
        ("<image>\ndef f():\n        return  1", "USER: ", "\ndef f():\n        return  1 ASSISTANT:"),
    ],
)
def test_chunks_around_an_image_are_sentencepieces(tmp_path: Path, question: str, before: str, after: str) -> None:
    tokenizer, own = load_tokenizer(base_of("llama", tmp_path))[0], own_ids("llama")
    encoder = Encoder(tokenizer, IMAGE_ID, Tiling(56, NUM_IMAGE_TOKENS), template="v1", image_placement="in_place")
    turns = record(question, "yes", image="t0.png")
    turns["conversations"].insert(0, {"from": "system", "value": ""})  # type: ignore[attr-defined]
    ids = encode(encoder, turns).input_ids.tolist()
    start = ids.index(IMAGE_ID)
    assert ids[:start] == [1, *own.encode(before)]
    end = [*own.encode("yes"), tokenizer.eos_token_id]
    assert ids[start + NUM_IMAGE_TOKENS :] == own.encode(after) + end
