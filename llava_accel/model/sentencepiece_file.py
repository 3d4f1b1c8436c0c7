"""Turns tokenizer.model, SentencePiece's own file, into the same tokenizer of the `tokenizers` library.

transformers 5 ranks the merges of such a file by id, where SentencePiece ranks them by the scores in the file; it also
takes every file for a BPE without normalisation. The tokenizer built here gives SentencePiece's ids, also once saved.
"""

import base64
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_OUT_OF_REACH = 1000.0  # how far below the lowest score a piece is put that no text may become
_NUM_SAMPLED = 2000  # pieces of the vocabulary that two tokenizers are compared on
PROBES = (
    "with  double", "   three before", "three behind   ", "def f(x):\n    if x:\n        return  [x]\n", "\n", "\ta\n\n b",
    "3.14159 $5,000 50%", "naïve Ünïcode ß", "привет, мир", "你好。世界", "日本語 テキスト", "한국어", "مرحبا بك", "שלום",
    "हिन्दी", "ไทย", "🙂👍🏽", "½ ﬁ \uff26\uff55", "e\u0301a\u0300", "a\u00a0b\u3000c", "https://a.b/c?d=e", "------ ====",
)  # fmt: skip
"""Texts to which different tokenizers give different ids."""


class SentencePieceFile:
    """The vocabulary, the scores and the normalisation of a tokenizer.model."""

    def __init__(self, content: bytes) -> None:
        self._own = SentencePieceProcessor()
        self._own.LoadFromSerializedProto(content)
        self._proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
        self._proto.ParseFromString(content)

    @property
    def pieces(self) -> list[str]:
        """The vocabulary, by id."""
        return [piece.piece for piece in self._proto.pieces]

    def encode(self, text: str) -> list[int]:
        """SentencePiece's own ids, with the space that it puts before a text."""
        return self._own.encode(text)

    def differing(self, encode: Callable[[str], Sequence[int]]) -> str | None:
        """A text to which `encode` gives other ids than SentencePiece; None if they agree on some hundred texts."""
        pieces = [piece.piece.replace(SPACE, " ") for piece in self._proto.pieces if piece.type == _NORMAL]
        sample = pieces[:: max(1, len(pieces) // _NUM_SAMPLED)]
        lines = ("".join(sample[start : start + 10]) for start in range(0, len(sample), 10))
        return next((text for text in itertools.chain(PROBES, lines) if encode(text) != self.encode(text)), None)

    def describe(self, spec: dict[str, Any], *, always_spaced: bool, spaced: bool = True) -> None:
        """Rewrite the description of a tokenizer (tokenizer.json) to this file's; its post-processor is kept.

        Args:
            spec: Changed in place. The names that its added tokens give to ids are kept.
            always_spaced: Put a space before each text between special tokens, as SentencePiece does, and not only
                before the first (`legacy` in transformers).
            spaced: False puts no spaces, whatever the file says.
        """
        types = dict(enumerate(piece.type for piece in self._proto.pieces))
        for token in spec["added_tokens"]:
            token["special"] = types.get(token["id"]) != _USER_DEFINED and token["special"]
        known = {token["id"] for token in spec["added_tokens"]}
        spec["added_tokens"] += [
            _added(id, piece.piece)
            for id, piece in enumerate(self._proto.pieces)
            if piece.type == _USER_DEFINED and id not in known
        ]
        spec["added_tokens"].sort(key=lambda token: token["id"])
        names = self.pieces
        for token in spec["added_tokens"]:
            if token["id"] < len(names):
                names[token["id"]] = token["content"]
        spaced = spaced and self._proto.normalizer_spec.add_dummy_prefix
        is_first_alone = spaced and not always_spaced
        spec["model"] = self._unigram(names) if self._proto.trainer_spec.model_type == _UNIGRAM else self._bpe(names)
        parts = [*self._normalizers()]
        if spaced and always_spaced:
            parts.append({"type": "Prepend", "prepend": SPACE})
        if not is_first_alone:
            parts.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
        spec["normalizer"] = {"type": "Sequence", "normalizers": parts} if parts else None
        spec["pre_tokenizer"] = (
            {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
            if is_first_alone
            else None
        )
        spec["decoder"] = {"type": "Sequence", "decoders": _decoders(spaced)}

    def _unigram(self, names: Sequence[str]) -> dict[str, Any]:
        normal = [piece.score for piece in self._proto.pieces if piece.type == _NORMAL]
        lowest = min(normal, default=0.0) - _OUT_OF_REACH
        return {
            "type": "Unigram",
            "unk_id": self._own.unk_id(),
            "vocab": [
                [name, piece.score if piece.type in (_NORMAL, _USER_DEFINED) else lowest]
                for name, piece in zip(names, self._proto.pieces, strict=True)
            ],
            "byte_fallback": self._proto.trainer_spec.byte_fallback,
        }

    def _bpe(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[self._own.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": self._proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": [list(pair) for pair in self._merges(names)],
        }

    def _merges(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Pairs in the order in which SentencePiece would merge them.

        It merges into the piece with the highest score, and among equal scores at the leftmost place. In a run of spaces,
        whose pieces share one score in Llama's file, that makes the longest piece: the one that grows from the left.
        """
        pieces = [piece for name, piece in zip(names, self._proto.pieces, strict=True) if name == piece.piece]
        scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
        for whole in sorted(scores, key=lambda piece: (-scores[piece], -len(piece))):
            for cut in range(len(whole) - 1, 0, -1):
                if whole[:cut] in scores and whole[cut:] in scores:
                    yield whole[:cut], whole[cut:]

    def _normalizers(self) -> Iterator[dict[str, Any]]:
        settings = self._proto.normalizer_spec
        if settings.precompiled_charsmap:
            charsmap = base64.b64encode(settings.precompiled_charsmap).decode()
            yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
        if settings.remove_extra_whitespaces:
            for pattern, content in ((rf"\A +|[ {SPACE}]+\z", ""), (" {2,}", " ")):
                yield {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def read_sentencepiece(folder: Path) -> SentencePieceFile | None:
    """The tokenizer.model of a folder; None if there is none, or if it is another library's: Llama 3 has one, too."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    try:
        return SentencePieceFile(path.read_bytes())
    except (RuntimeError, ValueError):  # the parser's
        return None


def _added(id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id, "content": content, **flags}


def _decoders(spaced: bool) -> list[dict[str, Any]]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return decoders + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else [])
