"""Conversations as LLaVA's own code writes them and reads their rounds back, for data.labels = "original".

With most templates that code writes a conversation as one string, cuts it at the tokens that end an answer and each round
at the words that lead to its answer, and learns what follows them. So a template's words count in what people wrote, too,
and an empty turn is written without its end. Where a round is not one question and one answer, all of the conversation is
left out of the loss, which it reports as a "tokenization mismatch".
"""

from collections.abc import Mapping, Sequence
from functools import partial

from llava_accel.data.conversation import BOS, TEMPLATES, Piece, Template, Turn, split_images, without_system
from llava_accel.data.records import Record
from llava_accel.sources.problems import DataError

_END, _IM_END = "</s>", "<|im_end|>"
_PADDING = "<unk>"  # is not counted among a conversation's tokens, wherever it stands
_ANSWERS = 'Set data.labels = "answers", which learns each answer, or remove the record'


def check_caption(record: Record) -> None:
    """DataError for a record that LLaVA's own code refuses with the template 'plain', or whose images it mixes up."""
    TEMPLATES["plain"](record.turns, bool(record.images))  # refuses several rounds, for which "answers" is no remedy
    if record.dropped_turns or not record.images:
        has = "no image" if not record.images else "another turn before or after them"
        raise DataError(
            "roles",
            f"the template 'plain' of LLaVA's own code takes one question and one answer on an image; the record has {has}",
            _ANSWERS,
        )
    if len(record.images) > 1:
        raise DataError(
            "image_count",
            f"LLaVA's own code shows one of a caption's {len(record.images)} images, and gives the others to the records "
            "after it",
            _ANSWERS,
        )


def not_learned(record: Record) -> DataError:
    """The error of a conversation without targets."""
    in_texts = "its texts hold special tokens or words of the template, or one is empty"
    why = "it ends with a question" if record.unanswered else in_texts
    problem = f"{why}, so that LLaVA's own code finds other rounds and learns nothing from it"
    return DataError("empty", f'with data.labels = "original": {problem}', _ANSWERS)


def _v1(turns: Sequence[Turn], has_images: bool, *, template: str) -> list[Piece]:
    system, spoken = without_system(turns, template)
    text = f"{system} " if system else ""
    for turn in spoken:
        name, end = ("USER", " ") if turn.role == "user" else ("ASSISTANT", _END)
        text += f"{name}: {turn.text}{end}" if turn.text else f"{name}:"
    return [BOS, *_read_back(text.split(_END), has_images, " ASSISTANT:", " ", "eos")]


def _inst(turns: Sequence[Turn], has_images: bool, *, template: str, between: str) -> list[Piece]:
    system, spoken = without_system(turns, template)
    if not spoken[0].text:
        problem = f"the first question is empty, which LLaVA's own code refuses with {template!r}"
        raise DataError("empty", problem, _ANSWERS)
    text = ""
    for number, turn in enumerate(spoken):
        lead = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if number == 0 and system else ""
        if turn.role == "user" and turn.text:
            text += f"{between if number else ''}[INST] {lead}{turn.text} [/INST]"
        elif turn.text:
            text += f" {turn.text} {_END}"
    return [BOS, *_read_back(text.split(_END), has_images, "[/INST]", " ", "eos")]


def _chatml(turns: Sequence[Turn], has_images: bool) -> list[Piece]:
    system, spoken = without_system(turns, "chatml")
    text = f"<|im_start|>system\n{system}{_IM_END}"
    for turn in spoken:
        text += f"<|im_start|>{turn.role}\n" + (f"{turn.text}{_IM_END}" if turn.text else "")
    *parts, rest = text.split(_IM_END)
    parts = [_IM_END.join(parts[:2]), *parts[2:]]  # the system prompt belongs to the first question
    rounds = [_IM_END.join(parts[place : place + 2]) for place in range(0, len(parts), 2)]
    return _read_back([*rounds, rest], has_images, f"{_IM_END}<|im_start|>assistant\n", "", _IM_END)


def _plain(turns: Sequence[Turn], has_images: bool) -> list[Piece]:
    """As our own, but with one image whatever the question shows."""
    bos, *_, caption = TEMPLATES["plain"](turns, has_images)
    return [bos, Piece("image"), caption]


def _read_back(texts: Sequence[str], has_images: bool, to_answer: str, space: str, end: str) -> list[Piece]:
    """The pieces of a conversation, whose answers are learned if each round has one question and one answer.

    Args:
        texts: The rounds, without their ends, and what comes after the last end.
        to_answer, space: What leads to an answer; the space counts as the answer's.
        end: The token that ends a round.
    """
    *rounds, rest = texts
    parts = [each.split(to_answer + space) for each in rounds]
    pieces = list[Piece]()
    if rest or any(len(each) != 2 for each in parts) or any(_PADDING in each for each in rounds):
        for each in rounds:
            pieces += [*split_images(each, has_images), Piece("special", end)]
        return pieces + split_images(rest, has_images)
    for question, answer in parts:
        pieces += split_images(question + to_answer, has_images)
        pieces += [Piece("text", space + answer, supervised=True), Piece("special", end, supervised=True)]
    return pieces


ORIGINALS: Mapping[str, Template] = {
    **TEMPLATES,
    "v1": partial(_v1, template="v1"),
    "llava_v1": partial(_v1, template="llava_v1"),
    "llava_llama_2": partial(_inst, template="llava_llama_2", between="<s>"),
    "mistral_instruct": partial(_inst, template="mistral_instruct", between=""),
    "chatml": _chatml,
    "plain": _plain,
}
"""In place of `conversation.TEMPLATES`. For qwen_1_5 and llava_llama_3 they are the same: its pieces say what is learned."""
