"""Records -> examples: placement of images, template, labels, length. What a loader worker does for each record."""

from bisect import bisect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from operator import itemgetter
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from llava_accel.data.conversation import IMAGE, PLACEMENTS, TEMPLATES, Piece, Template, Turn
from llava_accel.data.images import Exif, image_size
from llava_accel.data.jinja_template import ChatTemplate
from llava_accel.data.labels import Example, Labeller
from llava_accel.data.original_rounds import ORIGINALS, check_caption, not_learned
from llava_accel.data.records import Record, is_blank
from llava_accel.data.tiling import WHOLE, ImageView, Tiling
from llava_accel.data.trie import num_common
from llava_accel.sources.problems import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record's examples, and how many of its turns were dropped to make it fit."""

    record: Record
    """The record that was encoded, without dropped rounds."""
    examples: tuple[Example, ...]
    """One; with data.answers = "weighted" one for each answer, the most frequent first, whose weights sum to 1; for a pair
    that of the chosen answer, then that of the rejected one."""
    dropped_turns: int = 0

    @property
    def num_turns(self) -> int:
        """Turns of user and assistant in each example."""
        return len(self.record.turns) - (self.record.turns[0].role == "system")

    @property
    def length(self) -> int:
        """Tokens of the longest example, image tokens included."""
        return max([len(example.input_ids) for example in self.examples])

    @property
    def example(self) -> Example:
        """The first example. All have the same images and the same prompt."""
        return self.examples[0]


class Encoder:
    """Turns one record into an example, or says why it cannot be one.

    Args:
        tokenizer: The base's tokenizer.
        image_token_id: See `Labeller`.
        tiling: How the base cuts images.
        template: A name of `conversation.TEMPLATES`, or "auto".
        chat_template: The processor's Jinja template, for "auto".
        answers: data.answers; or "pairs", where only the last answer of each example is a target.
        labels, image_placement, max_length, on_too_long: The recipe's keys of that name, with "auto" resolved.
        words, num_rows: See `Labeller`.
        exif: The recipe's key. An image that it turns has other tiles.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_token_id: int,
        tiling: Tiling,
        *,
        template: str,
        chat_template: str | None = None,
        answers: Literal["most_frequent", "weighted", "pairs"] = "most_frequent",
        labels: Literal["answers", "original"] = "answers",
        image_placement: Literal["start", "start_if_single", "in_place"] = "start",
        max_length: int = 2048,
        on_too_long: Literal["error", "drop_turns", "skip"] = "error",
        words: Collection[str] = (),
        num_rows: int | None = None,
        exif: Exif = "ignore",
    ) -> None:
        self._tiling, self._size = tiling, partial(image_size, exif=exif)
        number = tiling.num_tokens(WHOLE)
        self._label = Labeller(tokenizer, image_token_id, number, words, num_rows, labels)
        self._is_original = labels == "original"
        named = ORIGINALS if self._is_original else TEMPLATES
        self._template: Template = ChatTemplate(tokenizer, chat_template) if template == "auto" else named[template]
        self._is_caption = self._is_original and template == "plain"
        self._label.encode_text.expect(_common_start(self._template))
        self._answers = answers
        self._place = PLACEMENTS[image_placement]
        self._max_length = max_length
        self._on_too_long = on_too_long

    def pieces(self, record: Record) -> list[Piece]:
        """The record's conversation in the template's form."""
        turns, has_images = record.turns, bool(record.images)
        if self._is_original and record.unanswered and IMAGE not in record.unanswered.text:
            turns = (*turns, record.unanswered)
        if has_images:
            turns = [replace(turn, text=self._place(turn.text)) for turn in turns]
        return self._template(turns, has_images)

    def __call__(self, record: Record, index: int, find: Callable[[str], str]) -> Encoded:
        """Tokenise and label.

        Args:
            index: Place of the record in the data.
            find: Gives the address of an image name: see `Source.address`.

        Raises:
            DataError: unsafe, missing or broken image, no target, or too long and not shortened. Without file and row.
        """
        if self._is_caption:
            check_caption(record)
        images = self._tiling.views(list(map(find, record.images)), self._size)
        encoded = Encoded(record, self._examples(record, images, index))
        length = encoded.length
        if length > self._max_length and self._on_too_long == "drop_turns":
            encoded = self._longest(record, images, index)
            length = encoded.length
        if not any([example.num_targets for example in encoded.examples]):
            if self._is_original:
                raise not_learned(record)
            raise DataError("empty", "there is nothing to learn from the record", "Give it an answer, or remove it")
        if length > self._max_length:
            of_images = sum(view.num_tokens for view in encoded.example.images)
            others = "skip" if self._on_too_long == "drop_turns" else "drop_turns or skip"
            raise DataError(
                "too_long",
                f"{length:,} tokens, {of_images:,} of them of images, exceed data.max_length = {self._max_length}",
                f"Raise data.max_length to {length} or more, shorten the record, or set data.on_too_long to {others}",
                tokens=length,
            )
        return encoded

    def _longest(self, record: Record, images: Sequence[ImageView], index: int) -> Encoded:
        """The record with as many of its rounds as fit; with the first alone if not even that fits.

        A binary search: encoding once for each dropped round would take hours for a record of many rounds.
        """

        def encode(kept: Record) -> Encoded:
            examples = self._examples(kept, images[: len(kept.images)], index)
            return Encoded(kept, examples, len(record.turns) - len(kept.turns))

        fitting = encode(_first_rounds(record, 1))
        low, high = 1, sum(turn.role == "assistant" for turn in record.turns)  # `high` rounds do not fit
        while high - low > 1:
            middle = (low + high) // 2
            encoded = encode(_first_rounds(record, middle))
            if encoded.length <= self._max_length:
                low, fitting = middle, encoded
            else:
                high = middle
        return fitting

    def _examples(self, record: Record, images: Sequence[ImageView], index: int) -> tuple[Example, ...]:
        if self._answers == "pairs":
            return self._pair(record, images, index)
        if self._answers != "weighted" or all(is_blank(text) for text, _ in record.answers):
            return (self._label(self.pieces(record), images, index),)
        answers = [answer for answer in record.answers if not is_blank(answer[0])]
        total = sum(count for _, count in answers)
        examples, known = list[Example](), list[tuple[bytes, Example]]()  # in the order of their tokens
        for text, count in sorted(answers, key=lambda answer: -answer[1]):
            turns = (*record.turns[:-1], replace(record.turns[-1], text=text))
            example = self._label(self.pieces(replace(record, turns=turns)), images, index)
            key = example.input_ids.astype(">i8").tobytes()
            place = bisect(known, key, key=itemgetter(0))
            near = [other.input_ids for _, other in known[max(0, place - 1) : place + 1]]  # no other has more in common
            known.insert(place, (key, example))
            repeated = max((num_common(example.input_ids, other) for other in near), default=0)
            examples.append(replace(example, weight=count / total, num_repeated=repeated))
        return tuple(examples)

    def _pair(self, record: Record, images: Sequence[ImageView], index: int) -> tuple[Example, ...]:
        if record.rejected is None:
            problem = 'there is no "rejected" answer, and train.objective = "dpo" learns from pairs'
            raise DataError("pair", problem, 'Add one, remove the record, or set train.objective = "answers"')
        rejected = (*record.turns[:-1], replace(record.turns[-1], text=record.rejected))
        chosen, other = (
            _last_answer(self._label(self.pieces(replace(record, turns=turns)), images, index))
            for turns in (record.turns, rejected)
        )
        return chosen, replace(other, num_repeated=num_common(chosen.input_ids, other.input_ids))


def _last_answer(example: Example) -> Example:
    """The example with its last answer as the only target."""
    is_target = example.is_target.copy()
    is_target[: example.prompt_length()] = False
    return replace(example, is_target=is_target)


def _common_start(template: Template) -> str:
    """The start of a template's first text that is the same before every question, up to its last space."""
    pieces = (template([Turn("user", text), Turn("assistant", text)], False) for text in ("q", "p"))
    one, other = (next((piece.text for piece in each if piece.kind == "text"), "") for each in pieces)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same).rpartition(" ")[0]


def _first_rounds(record: Record, number: int) -> Record:
    """The record's first rounds, with their images. If any are dropped, so are the `answers`, which are to the last one."""
    is_systems = record.turns[0].role == "system"
    turns = record.turns[: 2 * number + is_systems]
    if len(turns) == len(record.turns):
        return record
    num_images = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    images = record.images[:num_images] if record.images else ()
    return replace(record, turns=turns, images=images, answers=(), unanswered=None)


def find_images(record: Record, index: int, find: Callable[[str], str]) -> Encoded:
    """Replaces an `Encoder` where there is no tokenizer: the record's images are found, its text is not read.

    Raises:
        DataError: unsafe or missing image. Without file and row.
    """
    images = tuple(ImageView(find(name), 0) for name in record.images)
    ids, is_target = np.zeros(2, dtype=np.int64), np.array([False, True])
    return Encoded(record, (Example(input_ids=ids, is_target=is_target, images=images, index=index),))
