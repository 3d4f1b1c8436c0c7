"""Records -> examples: placement of images, template, labels, length. What a loader worker does for each record."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from llava_accel.data.conversation import IMAGE, TEMPLATES, Piece, Turn, move_images_to_start
from llava_accel.data.images import find_image
from llava_accel.data.jinja_template import ChatTemplate
from llava_accel.data.labels import Example, Labeller
from llava_accel.data.problems import DataError
from llava_accel.data.records import Record
from llava_accel.data.trie import num_common


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record's examples, the number of turns that each holds, and how many were dropped to make it fit."""

    examples: tuple[Example, ...]
    """One; with data.answers = "weighted" one for each answer, the most frequent first, whose weights sum to 1."""
    num_turns: int
    dropped_turns: int = 0

    @property
    def example(self) -> Example:
        """The first. All have the same images and the same prompt."""
        return self.examples[0]


class Encoder:
    """Turns one record into an example, or says why it cannot be one.

    Args:
        tokenizer: The base's tokenizer.
        image_token_id, num_image_tokens: See `Labeller`.
        template: A name of `conversation.TEMPLATES`, or "auto".
        chat_template: The processor's Jinja template, for "auto".
        answers, image_placement, max_length, on_too_long: The recipe's keys of that name.
        words, num_rows: See `Labeller`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_token_id: int,
        num_image_tokens: int,
        *,
        template: str,
        chat_template: str | None = None,
        answers: Literal["most_frequent", "weighted"] = "most_frequent",
        image_placement: Literal["start", "in_place"] = "start",
        max_length: int = 2048,
        on_too_long: Literal["error", "drop_turns", "skip"] = "error",
        words: Collection[str] = (),
        num_rows: int | None = None,
    ) -> None:
        self._label = Labeller(tokenizer, image_token_id, num_image_tokens, words, num_rows)
        self._template: Callable[[Sequence[Turn], bool], list[Piece]] = (
            ChatTemplate(tokenizer, chat_template) if template == "auto" else TEMPLATES[template]
        )
        self._is_weighted = answers == "weighted"
        self._placement = image_placement
        self._max_length = max_length
        self._on_too_long = on_too_long

    def pieces(self, record: Record) -> list[Piece]:
        """The record's conversation in the template's form."""
        turns, has_images = record.turns, bool(record.images)
        if has_images and self._placement == "start":
            turns = [replace(turn, text=move_images_to_start(turn.text)) for turn in turns]
        return self._template(turns, has_images)

    def __call__(self, record: Record, index: int, root: Path) -> Encoded:
        """Tokenise and label.

        Args:
            index: Place of the record in the data.
            root: Folder that its image names are relative to.

        Raises:
            DataError: unsafe or missing image, or too long and not shortened. Without its place.
        """
        dropped = 0
        images = [str(find_image(root, name)) for name in record.images]
        while True:
            examples = self._examples(record, images[: len(record.images)], index)
            if not any(example.num_targets for example in examples):
                raise DataError("empty", "there is nothing to learn from the record", "Give it an answer, or remove it")
            length = max(len(example.input_ids) for example in examples)
            if length <= self._max_length:
                num_turns = sum(turn.role != "system" for turn in record.turns)
                return Encoded(examples, num_turns, dropped)
            shorter = _without_last_round(record) if self._on_too_long == "drop_turns" else None
            if shorter is None:
                raise DataError(
                    "too_long",
                    f"{length} tokens, image tokens included, exceed data.max_length = {self._max_length}",
                    "Raise data.max_length, shorten the record, or set data.on_too_long to drop_turns or skip",
                )
            dropped += 2
            record = shorter

    def _examples(self, record: Record, images: list[str], index: int) -> tuple[Example, ...]:
        if not self._is_weighted or not record.answers:
            return (self._label(self.pieces(record), images, index),)
        total = sum(count for _, count in record.answers)
        examples: list[Example] = []
        for text, count in sorted(record.answers, key=lambda answer: -answer[1]):
            turns = (*record.turns[:-1], replace(record.turns[-1], text=text))
            example = self._label(self.pieces(replace(record, turns=turns)), images, index)
            repeated = max((num_common(example.input_ids, other.input_ids) for other in examples), default=0)
            examples.append(replace(example, weight=count / total, num_repeated=repeated))
        return tuple(examples)


def _without_last_round(record: Record) -> Record | None:
    turns = record.turns[:-2]
    if sum(turn.role != "system" for turn in turns) == 0:
        return None
    num_images = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    images = record.images[:num_images] if record.images else ()
    return replace(record, turns=turns, images=images, answers=())  # the answers were to the round that is gone


def find_images(record: Record, index: int, root: Path) -> Encoded:
    """Replaces an `Encoder` where there is no tokenizer: the record's images are found, its text is not read.

    Raises:
        DataError: unsafe or missing image. Without its place.
    """
    images = tuple(str(find_image(root, name)) for name in record.images)
    num_turns = sum(turn.role != "system" for turn in record.turns)
    ids, is_target = np.zeros(2, dtype=np.int64), np.array([False, True])
    return Encoded((Example(input_ids=ids, is_target=is_target, images=images, index=index),), num_turns)
