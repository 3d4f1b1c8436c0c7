"""A conversation with a model, in prompts that the same code makes as in training."""

import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava_accel.data.conversation import IMAGE, Turn
from llava_accel.data.examples import Encoder
from llava_accel.data.images import check_images, find_image
from llava_accel.data.labels import Example
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.records import Record
from llava_accel.data.tiling import ImageView
from llava_accel.exceptions import UserError
from llava_accel.inference.answering import answer_batch, question_batch
from llava_accel.inference.origin import Loaded
from llava_accel.model.precision import computed_in
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.setup.datasets import build_encoder, build_image_reader
from llava_accel.sources.problems import DataError, quoted

_ANSWER = "-"  # in the place of the model's answer; the prompt ends before it, whatever it is


class Reply(NamedTuple):
    """An answer, the number of tokens of its prompt and its own, and whether its limit has cut it off."""

    text: str
    num_asked: int
    num_written: int
    is_cut: bool


class Dialogue:
    """A conversation: its turns so far, and images for the next one.

    Args:
        recipe: Template, placement and size of images.
        max_new_tokens: Longest answer; at most half of what the model can hold.
    """

    def __init__(self, loaded: Loaded, recipe: Recipe, max_new_tokens: int) -> None:
        self._objective, processing = loaded.objective, loaded.processing
        self._tokenizer = processing.processor.tokenizer
        self._window = int(processing.base.text.max_position_embeddings)
        self._max_new_tokens = min(max_new_tokens, self._window // 2)
        self._encode = _encoder(recipe, processing, self._window - self._max_new_tokens)
        self._image_reader = build_image_reader(recipe.data, processing)
        self._cuts_images = bool(processing.tiling.canvases)
        self._shown: dict[ImageView, LoadedImage] = {}
        self._waiting: list[str] = []
        self._turns: list[Turn] = []
        self._images: list[str] = []
        self._template = recipe.model.template
        self._system: str | None = None

    def reset(self) -> None:
        """Forget turns and images."""
        for kept in (self._turns, self._images, self._waiting, self._shown):
            kept.clear()

    @property
    def has_begun(self) -> bool:
        """Whether something was asked since the last reset."""
        return bool(self._turns)

    @property
    def sees_whole_squares(self) -> bool:
        """Whether the base cuts single images into tiles, but sees these as one square each, as there are several."""
        return self._cuts_images and len(self._images) + len(self._waiting) > 1

    def use_system(self, text: str) -> None:
        """Begin every conversation from the next one on with this system prompt, as a record with a system turn does.

        Args:
            text: Blank means no system prompt, not even the template's own.

        Raises:
            UserError: it cannot be put into the template.
        """
        if IMAGE in text:
            raise UserError(f"{IMAGE} in a system prompt has no image. Leave it out; /image FILE is for questions")
        if self._template == "plain":
            raise UserError(
                "model.template = 'plain' has no place for a system prompt. Leave it out, or name a --template"
            )
        system = Turn("system", text.strip())
        try:
            self._example((system, Turn("user", _ANSWER), Turn("assistant", _ANSWER)), ())
        except DataError as error:
            problem = (
                error.problem if error.kind != "too_long" else f"it is longer than the {self._window:,} tokens left"
            )
            raise UserError(f"the system prompt cannot be used: {problem}. Write another one") from None
        self._system = system.text

    def show(self, path: Path) -> None:
        """Add an image, which will be at the start of the next turn.

        Raises:
            DataError: there is no such image, or it cannot be read.
        """
        self._waiting.append(checked_image(path))

    def prompt(self, text: str) -> Example:
        """The conversation up to the answer to `text`, as training would hold it.

        Raises:
            UserError: it is too long, or cannot be put into the template.
        """
        if IMAGE in text:
            raise UserError(f"{IMAGE} in a question has no image. Give one with /image FILE")
        question = Turn("user", f"{IMAGE}\n" * len(self._waiting) + text)
        return self._fitting((*self._begun(), question), (*self._images, *self._waiting), "Start again with /reset")

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """The model's answer; question and answer become part of the conversation.

        Args:
            on_text: Called with each piece of the answer as soon as it is known.

        Raises:
            UserError: see `prompt`.
        """
        example = self.prompt(text)
        # The model sees the first image differently once there is a second one.
        self._shown |= {view: self._image_reader.load(view) for view in example.images if view not in self._shown}
        answer = self._answer(example, self._shown, on_text).text
        question = f"{IMAGE}\n" * len(self._waiting) + text
        self._turns = [*self._begun(), Turn("user", question), Turn("assistant", answer)]
        self._images += self._waiting
        self._waiting = []
        return answer

    def reply(
        self,
        turns: Sequence[Turn],
        images: Sequence[str],
        on_text: Callable[[str], None] | None = None,
        *,
        longest: int | None = None,
        blind: bool = False,
    ) -> Reply:
        """The model's answer to turns that are not part of the conversation, which does not change.

        Args:
            turns: The last one is a question. Without a system turn they have the conversation's.
            images: Absolute paths, one for each mark.
            on_text: As in `ask`; an exception in it ends the answer.
            longest: Longest answer, in tokens, if it is to be shorter than the dialogue's.
            blind: Blank the images.

        Raises:
            UserError: see `prompt`.
        """
        if self._system is not None and turns[0].role != "system":
            turns = [Turn("system", self._system), *turns]
        example = self._fitting(turns, images, "Shorten it, or set --max-new-tokens lower")
        shown = {} if blind else {view: self._image_reader.load(view) for view in example.images}
        return self._answer(example, shown, on_text, longest, blind)

    def _fitting(self, turns: Sequence[Turn], images: Sequence[str], remedy: str) -> Example:
        try:
            return self._example((*turns, Turn("assistant", _ANSWER)), tuple(images))
        except DataError as error:
            if error.kind != "too_long":
                raise
            raise UserError(
                f"the conversation does not fit into the model's {self._window:,} tokens together with an answer of "
                f"{self._max_new_tokens:,}. {remedy}"
            ) from None

    def _answer(
        self,
        example: Example,
        shown: Mapping[ImageView, LoadedImage],
        on_text: Callable[[str], None] | None,
        longest: int | None = None,
        blind: bool = False,
    ) -> Reply:
        stops = frozenset(_stops(example, self._tokenizer.eos_token_id))
        pieces = _Pieces(self._tokenizer, stops, on_text or (lambda text: None))
        objective, device = self._objective, self._objective.llava.device
        most = min(longest or self._max_new_tokens, self._max_new_tokens)
        batch, questions = question_batch([example], shown, self._image_reader.shape, device, blind=blind)
        with computed_in(objective.llava.dtype, device):
            answered = answer_batch(
                objective, batch, questions, stop_ids=stops, max_new_tokens=most, on_tokens=pieces.add, blind=blind
            )
        num_written = len(answered.ids[0])
        return Reply(pieces.end(), example.prompt_length(), num_written, num_written == most)

    def _begun(self) -> Sequence[Turn]:
        """The turns so far; a new conversation has its system turn, if there is one."""
        return self._turns or ([] if self._system is None else [Turn("system", self._system)])

    def _example(self, turns: tuple[Turn, ...], images: tuple[str, ...]) -> Example:
        record = Record(id="chat", turns=turns, images=images)
        return self._encode(record, -1, _find).example


def checked_image(path: Path) -> str:
    """The real path of an image.

    Raises:
        DataError: there is no such image, or it cannot be read.
    """
    if not os.path.isfile(name := os.path.expanduser(path)):
        raise DataError("missing_image", f"there is no image {quoted(path)}", "Correct the path")
    name = os.path.realpath(name)
    check_images([name], whole=True)
    return name


def _find(name: str) -> str:
    """The file of an image. Images of a conversation may be anywhere: their names are absolute paths."""
    return str(find_image(Path(Path.cwd().anchor), name))


def stop_ids(recipe: Recipe, processing: Processing) -> list[int]:
    """Tokens that end an answer: the one that the template puts there, and the tokenizer's own."""
    record = Record(id="stop", turns=(Turn("user", _ANSWER), Turn("assistant", _ANSWER)))
    example = _encoder(recipe, processing, recipe.data.max_length)(record, -1, _find).example
    return _stops(example, processing.processor.tokenizer.eos_token_id)


class _Pieces:
    """Passes an answer on token by token: without the token that ends it, and never half of a character."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: frozenset[int], on_text: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._stops, self._on_text = tokenizer, stops, on_text
        self._ids: list[int] = []
        self._said = 0

    def add(self, token: Int[Tensor, "1"]) -> None:
        self._ids += [each for each in token.tolist() if each not in self._stops]
        # The bytes of a character may come in several tokens, and a space may still turn out to be the last.
        self._say(self._text().rstrip(f"\ufffd{string.whitespace}"))

    def end(self) -> str:
        """Pass on what is left, and return the whole answer."""
        self._say(self._text())
        return self._text()

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).strip()

    def _say(self, text: str) -> None:
        if len(text) > self._said:
            self._on_text(text[self._said :])
            self._said = len(text)


def _encoder(recipe: Recipe, processing: Processing, max_length: int) -> Encoder:
    data = recipe.data.model_copy(update={"max_length": max_length, "on_too_long": "error"})
    return build_encoder(recipe.model_copy(update={"data": data}), processing)


def _stops(example: Example, eos_token_id: int | None) -> list[int]:
    return sorted({example.end_id, example.end_id if eos_token_id is None else int(eos_token_id)})
