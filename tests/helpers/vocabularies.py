"""SentencePiece models of every kind, trained on the spot, and texts of many languages with odd spacing."""

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import LlavaConfig

from llava_accel.model.bases import Base, Layout

ENGLISH = (Path(__file__).parents[2] / "llava_accel/quickstart/english.txt").read_text().splitlines()[:400]
_RANGES = (
    (0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x905, 0x94D),
    (0xE01, 0xE3A), (0x3041, 0x30FF), (0x4E00, 0x4EFF), (0xAC00, 0xACFF), (0x1F600, 0x1F64F),
)  # fmt: skip
_ODD = (
    " ", "  ", "   ", "     ", " " * 17, "\n", "\n\n", "\n    ", "\n        return", "\t", "\r\n", "\u00a0", "\u3000",
    "\u200b",
    "▁", "▁▁", "e\u0301", "\x00", "<image>", "</s>", "<s>", "<unk>", "<0x0A>", "--------", "....", "aaaaaaa",
    "🙂👍🏽", "½", "ﬁ",
)  # fmt: skip
_BYTE = 6  # type of a piece
_PARTS = ("<0", "<0x", "<0x0", "A>", "</", "s>")  # of what no text may become, though these are there to be joined


@cache
def trained(kind: str) -> bytes:
    """A tokenizer.model, in all of which "<box>" is a word of the user.

    "llama" is as Llama's, where runs of spaces come last of all, with `_PARTS`; "bpe" and "unigram" have SentencePiece's own
    settings; "unigram_bytes" has no normalisation, and byte fallback.
    """
    settings: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= {"byte_fallback": True}
    if kind in ("bpe", "unigram"):
        settings = {}
    model = io.BytesIO()
    lines = [*ENGLISH, *texts(300, seed=1)] if settings else ENGLISH
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip() and "\0" not in line]),
        model_writer=model,
        model_type="unigram" if kind.startswith("unigram") else "bpe",
        vocab_size=1200,
        user_defined_symbols=["<box>"],
        control_symbols=["<pad>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model.getvalue())
    if kind == "llama":
        make = type(proto.pieces[0])
        runs = [make(piece="▁" * length, score=-1e9) for length in range(2, 17)]
        known = [piece for piece in proto.pieces if piece.piece not in {run.piece for run in runs} | set(_PARTS)]
        known += [make(piece=part, score=-0.5) for part in _PARTS]
        first = max(id for id, piece in enumerate(known) if piece.type == _BYTE) + 1
        del proto.pieces[:]
        proto.pieces.extend([*known[:first], *runs, *known[first:]])
    return proto.SerializeToString()


def own_ids(kind: str, *, spaced: bool = True) -> SentencePieceProcessor:
    """SentencePiece itself with that model, which puts a space before a text or does not."""
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(trained(kind))
    proto.normalizer_spec.add_dummy_prefix = spaced
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor


def base_of(kind: str, folder: Path, layout: Layout = "original", **config: object) -> Base:
    """A folder with that tokenizer.model and no other file of a tokenizer, as a base."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained(kind))
    fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | config))
    return Base(layout, folder, None, False, LlavaConfig())


def texts(count: int, seed: int = 0) -> list[str]:
    """Mixtures of words, spacing, literal special tokens, and letters of one script."""
    rng = random.Random(seed)
    words = [word for line in ENGLISH for word in line.split()]

    def part() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(words)
        if kind < 0.7:
            return rng.choice(_ODD)
        low, high = rng.choice(_RANGES)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))

    def text() -> str:
        return rng.choice(("", " ")).join(part() for _ in range(rng.randint(1, 8)))

    return [text() for _ in range(count)]
