"""Plain text -> ids, as the base's tokenizer makes them of a text in the middle of a conversation."""

import base64
import json
import re
from collections.abc import Collection
from itertools import chain
from typing import Any, Literal

from sentencepiece import SentencePieceNormalizer, sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava_accel import compat
from llava_accel.exceptions import UserError

Context = Literal["start", "special", "text"]
"""What comes before a text: the start of a chunk (of the conversation, or after an image), a special token, or text."""
_CONTROL = re.compile(r"<\|.*\|>")
_WORDS = re.compile("[ ▁]*[^ ▁]+|[ ▁]+$")  # each word with the spaces that lead to it
_OVER_AN_END = re.compile("[^▁]▁")
_MOST_KNOWN = 100_000  # words whose ids are kept: some ten MB
_LONGEST_KNOWN = 64  # characters


class TextEncoder:
    """Plain text -> ids, with the leading space under our control and no special token ever parsed.

    Args:
        tokenizer: One with a `tokenizers` backend, else UserError.
        image_token_id: Never made from a text either, whether the tokenizer calls it special or not.
        words: Added tokens that are found in texts all the same, as if they were not special.

    Attributes:
        spelled_out: The special tokens that no text becomes, the longest first, without the image's.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int = -1, words: Collection[str] = ()
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"model: the tokenizer {type(tokenizer).__name__} has no `tokenizers` backend. "
                "Save it once with `tokenizer.save_pretrained` as tokenizer.json and put that file into the folder"
            )
        spec = json.loads(compat.tokenizer_backend(tokenizer).to_str())
        self._space, self.space_at_start, self.space_after_special = _take_over_spaces(spec)
        # Some files hold the settings of their last use, which would cut off or pad every piece.
        spec["truncation"] = spec["padding"] = None
        for token in spec["added_tokens"]:
            # Not all bases mark the tokens that structure a conversation as special. Other added tokens are words.
            token["special"] |= token["id"] == image_token_id or bool(_CONTROL.fullmatch(token["content"]))
            token["special"] &= token["content"] not in words
        special = [token for token in spec["added_tokens"] if token["special"] and token["id"] != image_token_id]
        self.spelled_out = sorted((token["content"] for token in special), key=len, reverse=True)
        _put_out_of_reach(spec)
        self._charsmap = _take_over_charsmap(spec)
        self._backend = Tokenizer.from_str(json.dumps(spec))
        self._backend.encode_special_tokens = True
        # A normalizer that removes spaces at both ends of a text must not do so where a text continues another.
        strips = self._backend.encode(" a").ids == self._backend.encode("a").ids
        self._normalizer = self._backend.normalizer if strips else None
        if self._normalizer:
            self._backend.normalizer = None
        self._splits = not self._charsmap and not self._normalizer and _ends_at_spaces(spec)
        self._known = _Known(self._backend)
        self._head, self._heads = "", dict[str, list[int]]()

    def __call__(self, text: str, after: Context) -> list[int]:
        """Ids of `text`, given what comes before it."""
        lead = (after == "start" and self.space_at_start) or (after == "special" and self.space_after_special)
        text = self._charsmap.Normalize(text) if self._charsmap else text
        if self._normalizer and lead:
            text = self._normalizer.normalize_str(text)
        elif self._normalizer:
            text = self._normalizer.normalize_str(f"|{text}")[1:]
        if not text:
            return []
        space = self._space if lead else ""
        if not self._splits:
            return list(self._known[f"{space}{text}"])
        if self._head and text.startswith(self._head) and text.startswith(" ", len(self._head)):
            return self._heads[space] + self._of_words(text[len(self._head) :], "")
        return self._of_words(text, space)

    def expect(self, head: str) -> None:
        """Keep the ids of a beginning that many texts share, such as a system prompt; used where a space follows it."""
        if self._splits and head and not head.endswith((" ", "▁")):
            self._head, self._heads = head, {space: self._of_words(head, space) for space in ("", self._space)}

    def _of_words(self, text: str, space: str) -> list[int]:
        return list(chain.from_iterable(map(self._known.__getitem__, self._split(text, space))))

    @staticmethod
    def _split(text: str, space: str) -> list[str]:
        """The words that `_WORDS` finds; without that search if each has at most one space before it, as nearly always."""
        if "  " in text or "▁" in text or "\0" in text or (space and text[0] == " "):
            return _WORDS.findall(f"{space}{text}")
        words = text.replace(" ", "\0 ").split("\0")
        words[0] = f"{space}{words[0]}"
        return words


class _Known(dict[str, list[int]]):
    """Ids of words; one that is not there is tokenised, and kept if it is short."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> list[int]:
        ids = self._backend.encode(word, add_special_tokens=False).ids
        if len(self) >= _MOST_KNOWN:
            self.clear()
        if len(word) <= _LONGEST_KNOWN:
            self[word] = ids
        return ids


def parts_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The description of a tokenizer but for its model, whose vocabulary takes a second to be serialised."""
    backend = compat.tokenizer_backend(tokenizer)
    alone = Tokenizer(type(backend.model)())
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if (part := getattr(backend, name)) is not None:
            setattr(alone, name, part)
    return json.loads(alone.to_str())


def spaces_of(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Whether a tokenizer puts a space before a text at the start, and before one after a special token."""
    _, at_start, after_special = _take_over_spaces(parts_of(tokenizer))
    return at_start, after_special


def _put_out_of_reach(spec: dict[str, Any]) -> None:
    """Change a tokenizer's description so that no text becomes a special token that its model can spell by itself."""
    model, special = spec["model"], [token for token in spec["added_tokens"] if token["special"]]
    if model["type"] == "BPE":
        names = {token["content"] for token in special}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if "".join(pair) not in names]
    elif model["type"] == "Unigram":
        vocabulary = model["vocab"]
        ids = {token["id"] for token in special if token["id"] < len(vocabulary)} | {model["unk_id"]} - {None}
        for id in ids:
            vocabulary[id][0] = ""
        # Under its old name each would be a new token, and those after it would move.
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] not in ids]


def _ends_at_spaces(spec: dict) -> bool:
    """Whether no token reaches over the end of a word into the space after it, as with SentencePiece's BPE.

    Then a text's ids are those of its words, each with the spaces that lead to it: what is merged, and in which order,
    in one word depends on no other.
    """
    model, pre_tokenizer, parts = spec["model"], spec["pre_tokenizer"], _normalizers(spec)
    return (
        model["type"] == "BPE"
        and not any(
            model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and all(
            part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == "▁"
            for part in parts
        )
        and (pre_tokenizer is None or (pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == "▁"))
        and (bool(parts) or pre_tokenizer is not None)
        and "▁" in model["vocab"]
        and not any(_OVER_AN_END.search(token) for token in model["vocab"])
        and not any(_reaches_out(token) for token in spec["added_tokens"] if not token["special"])
    )


def _reaches_out(token: dict) -> bool:
    content = token["content"]
    return token["lstrip"] or token["rstrip"] or token["single_word"] or " " in content or "▁" in content


def _take_over_charsmap(spec: dict[str, Any]) -> SentencePieceNormalizer | None:
    """Remove SentencePiece's table of character replacements, and return a normalizer that applies it as SentencePiece does.

    `tokenizers` looks up clusters of characters, and so misses some replacements and loses an accent with others.
    """
    parts = _normalizers(spec)
    maps = [part["precompiled_charsmap"] for part in parts if part["type"] == "Precompiled"]
    if not maps or not maps[0]:
        return None
    spec["normalizer"] = {"type": "Sequence", "normalizers": [p for p in parts if p["type"] != "Precompiled"]}
    alone = dict.fromkeys(("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces"), False)
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for key, value in {**alone, "precompiled_charsmap": base64.b64decode(maps[0])}.items():
        setattr(model.normalizer_spec, key, value)
    return SentencePieceNormalizer(model_proto=model.SerializeToString(), **alone)


def _normalizers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = spec.get("normalizer")
    return (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])


def _take_over_spaces(spec: dict) -> tuple[str, bool, bool]:
    """Remove the automatic leading space from a tokenizer's description.

    Returns:
        The space, whether it is added at the start of a text, and whether it is added after special tokens too.
    """
    pre_tokenizer, parts = spec.get("pre_tokenizer"), _normalizers(spec)
    for part in parts:
        if part["type"] == "Prepend":
            kept = [other for other in parts if other is not part]
            spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
            return part["prepend"], True, True
    for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else []):
        if part["type"] == "Metaspace":
            scheme, part["prepend_scheme"] = part["prepend_scheme"], "never"
            return part["replacement"], scheme in ("first", "always"), scheme == "always"
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            part["add_prefix_space"] = False
            return " ", True, True
    return "", False, False
