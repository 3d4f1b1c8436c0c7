"""A tokenizer.model becomes a tokenizer with SentencePiece's own ids, which outlive saving."""

from pathlib import Path

import pytest

from helpers.vocabularies import base_of, own_ids, texts
from llava_accel.data.text_encoder import TextEncoder
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
