"""Plain text -> ids: what the tokenizer of a base makes of a text in the middle of a conversation."""

import json
import re
from typing import Literal

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
        image_token_id: Is never made from a text either, whether the tokenizer calls it special or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int = -1) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"model: the tokenizer {type(tokenizer).__name__} has no `tokenizers` backend. "
                "Save it once with `tokenizer.save_pretrained` as tokenizer.json and put that file into the folder"
            )
        spec = json.loads(compat.tokenizer_description(tokenizer))
        self._space, self.space_at_start, self.space_after_special = _take_over_spaces(spec)
        # Some files hold the settings of their last use, which would cut off or pad every piece.
        spec["truncation"] = spec["padding"] = None
        for token in spec["added_tokens"]:
            # Not all bases mark what structures a conversation as special. Other added tokens are words.
            token["special"] |= token["id"] == image_token_id or bool(_CONTROL.fullmatch(token["content"]))
        self._backend = Tokenizer.from_str(json.dumps(spec))
        self._backend.encode_special_tokens = True
        self._words = _WORDS if _ends_at_spaces(spec) else None
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str, after: Context) -> list[int]:
        """Ids of `text`, given what comes before it."""
        if not text:
            return []
        lead = (after == "start" and self.space_at_start) or (after == "special" and self.space_after_special)
        text = f"{self._space}{text}" if lead else text
        if self._words is None:
            return list(self._ids(text))
        return [token for word in self._words.findall(text) for token in self._ids(word)]

    def _ids(self, text: str) -> list[int]:
        ids = self._known.get(text)
        if ids is None:
            ids = self._backend.encode(text, add_special_tokens=False).ids
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            if len(text) <= _LONGEST_KNOWN:
                self._known[text] = ids
        return ids


def _ends_at_spaces(spec: dict) -> bool:
    """Whether no token reaches over the end of a word into the space after it, as with SentencePiece's BPE.

    Then a text's ids are those of its words, each with the spaces that lead to it: what is merged, and in which order,
    in one word depends on no other.
    """
    model, normalizer, pre_tokenizer = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
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


def _take_over_spaces(spec: dict) -> tuple[str, bool, bool]:
    """Remove the automatic leading space from a tokenizer's description.

    Returns:
        The space, whether it is added at the start of a text, and whether it is added after special tokens too.
    """
    normalizer, pre_tokenizer = spec.get("normalizer"), spec.get("pre_tokenizer")
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
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
