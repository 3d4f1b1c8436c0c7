"""Pieces -> token ids and targets. The riskiest step of a LLaVA trainer, so it has its own file.

LLaVA tokenises the text between two images as one chunk and a SentencePiece tokenizer puts a space before the start
of a chunk; whether it also puts one after a special token depends on the tokenizer's `legacy` flag. Both are facts of
the encoder here, not corrections of a count, so ids and targets agree with LLaVA's for every text. Text of the user
never becomes a special token: a literal `</s>` in an answer is spelled out and learned like any other text. Only with
data.labels = "original" it does, as in LLaVA's own code.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerFast

from llava_accel.data.conversation import Piece
from llava_accel.data.text_encoder import Context, TextEncoder
from llava_accel.data.tiling import ImageView
from llava_accel.exceptions import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One conversation as the model sees it.

    `is_target[t]` says that token `t` is predicted, from the hidden state at `t - 1`. Image `k` is a run of image tokens
    from `image_starts[k]` on, which are never targets.
    """

    input_ids: Int[np.ndarray, "length"]
    is_target: Bool[np.ndarray, "length"]
    image_starts: tuple[int, ...] = ()
    images: tuple[ImageView, ...] = ()
    """One for each of `image_starts`."""
    index: int = -1
    """Place of the record in the data; -1 outside a data set."""
    weight: float = 1.0
    """Factor on the loss of its targets: the share of the annotators who gave this answer."""
    num_repeated: int = 0
    """Leading tokens that another answer to the same record holds already; 0 for a record's first answer."""
    number: int = 0
    """Place among the examples of a micro-batch."""
    is_answer: Bool[np.ndarray, "length"] | None = None
    """Which targets are answers and their ends; None: all."""

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.is_target))

    @property
    def num_tiles(self) -> int:
        """Tiles of its images that the vision tower sees, whole images included."""
        return sum(view.layout.num_tiles for view in self.images)

    def prompt_length(self) -> int:
        """Tokens before the last answer: what a model is given when it has to answer by itself."""
        positions = self._answers()
        gaps = np.nonzero(np.diff(positions) > 1)[0]
        return int(positions[gaps[-1] + 1] if len(gaps) else positions[0])

    @property
    def end_id(self) -> int:
        """The token that ends the last answer."""
        return int(self.input_ids[self._answers()[-1]])

    def _answers(self) -> Int[np.ndarray, "answers"]:
        return np.flatnonzero(self.is_target if self.is_answer is None else self.is_answer)


class Labeller:
    """Turns pieces into an `Example`.

    Args:
        tokenizer: Any tokenizer of transformers that has a `tokenizers` backend.
        image_token_id: Id at every position of an image.
        num_image_tokens: Positions of an image for which no view is given.
        words: Added tokens that texts may hold; others are spelled out.
        num_rows: Rows of the embedding that are trained, among which a template's tokens must be; None: each token has one.
        labels: With "original", the tokens that a piece's `original` names are targets, too, and special tokens are found
            in texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_token_id: int,
        num_image_tokens: int,
        words: Collection[str] = (),
        num_rows: int | None = None,
        labels: Literal["answers", "original"] = "answers",
    ) -> None:
        self.encode_text = TextEncoder(tokenizer, image_token_id, words)
        self._is_original = labels == "original"
        self._newline = self.encode_text("\n", "text")
        self._num_rows = num_rows
        self._tokenizer = tokenizer
        self._image_token_id, self._num_image_tokens = image_token_id, num_image_tokens
        self._special_ids: dict[str, list[int]] = {}
        spelled_out = "|".join(map(re.escape, self.encode_text.spelled_out))
        self._tokens = re.compile(f"({spelled_out})") if spelled_out and self._is_original else None

    def __call__(self, pieces: Iterable[Piece], images: Sequence[ImageView] = (), index: int = -1) -> Example:
        """Ids and targets of the pieces; `images` are those of the image pieces, in order."""
        ids: list[int] = []
        is_answer, is_target = bytearray(), bytearray()
        image_starts: list[int] = []
        after: Context = "start"
        header: tuple[int, str, Context] | None = None
        for piece in self._parsed(tuple(pieces), self._tokens) if self._tokens else pieces:
            mark = b"\1" if piece.supervised else b"\0"
            if piece.kind == "text":
                start = len(ids)
                if header and piece.supervised:
                    start, new = self._with_header(header, ids, piece.text)
                    del ids[start:], is_answer[start:], is_target[start:]
                else:
                    new = self.encode_text(piece.text, after)
                is_header = self._is_original and piece.original == "all" and not piece.supervised
                header = (start, piece.text, after) if is_header else None
                after = "text" if new else after
            elif piece.kind == "special":
                new = self._special_ids.get(piece.text)
                if new is None:
                    new = self._special_ids[piece.text] = self._special(piece.text)
                # The first BOS belongs to the start: the tokenizer adds it, the text after it begins the chunk.
                after, header = "start" if piece.text == "bos" and not ids else "special", None
            else:
                number = images[len(image_starts)].num_tokens if images else self._num_image_tokens
                image_starts.append(len(ids))
                new, after, mark = [self._image_token_id] * number, "start", b"\0"
            ids += new
            is_answer += mark * len(new)
            is_target += self._besides(piece, new) if self._is_original and piece.original else mark * len(new)
        assert len(image_starts) == len(images) or not images, "one view for each image of the text"
        if is_target:
            is_answer[0] = is_target[0] = 0  # no token before the first one could predict it
        return Example(
            input_ids=np.fromiter(ids, np.int64, len(ids)),
            is_target=np.frombuffer(is_target, dtype=bool),
            image_starts=tuple(image_starts),
            images=tuple(images),
            index=index,
            is_answer=np.frombuffer(is_answer, dtype=bool) if self._is_original else None,
        )

    def _parsed(self, pieces: Sequence[Piece], tokens: re.Pattern[str]) -> Iterator[Piece]:
        """The pieces, cut at the special tokens in their texts, of which those that the template learns are learned."""
        learned = {self._name(piece.text) for piece in pieces if piece.kind == "special" and piece.original}
        for piece in pieces:
            if piece.kind != "text":
                yield piece
                continue
            for place, part in enumerate(tokens.split(piece.text)):
                if place % 2:
                    original = "all" if part in learned else piece.original
                    yield replace(piece, kind="special", text=part, original=original)
                elif part:
                    yield replace(piece, text=part)

    def _with_header(self, header: tuple[int, str, Context], ids: list[int], answer: str) -> tuple[int, list[int]]:
        """Where an answer starts, and its ids, if it is tokenised together with its header, as by LLaVA's own code.

        A line break that it begins with may then be one token with that of the header, which counts as the answer's.
        """
        start, text, after = header
        whole = self.encode_text(text + answer, after)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[start:], whole, strict=False)))
        return start + kept, whole[kept:]

    def _besides(self, piece: Piece, ids: list[int]) -> bytes:
        return bytes(piece.original == "all" or [id] == self._newline for id in ids)

    def _special(self, name: str) -> list[int]:
        if name == "bos" and not adds_bos(self._tokenizer):
            return []
        token = self._name(name)
        if token is None:
            raise UserError(
                "model: the tokenizer has no end-of-sequence token, so no answer could ever end. Use a base that has one"
            )
        token_id = self._tokenizer.get_added_vocab().get(token)
        if token_id is None:
            raise UserError(
                f"model.template: the tokenizer has no token {token!r}, which this template ends its turns with. "
                "Choose the template that the base was trained with, or 'auto'"
            )
        if self._num_rows is not None and token_id >= self._num_rows:
            raise UserError(
                f"model.template: its token {token!r} is number {token_id} of the tokenizer, and the embedding has "
                f"{self._num_rows} rows. Take the tokenizer's files from the model itself, or choose a template without it"
            )
        return [token_id]

    def _name(self, token: str) -> str | None:
        """What the tokenizer calls "bos" and "eos"; of others the name itself."""
        return self._tokenizer.special_tokens_map.get(f"{token}_token") if token in ("bos", "eos") else token


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text by itself."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
