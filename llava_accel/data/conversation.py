"""Templates: a conversation becomes a list of pieces, each marked supervised or not.

The texts are LLaVA's (`llava/conversation.py`); what is supervised is each answer and the token that ends it. The
pieces are tokenised one by one in `labels.py`, so the targets are known by construction and never counted again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from llava_accel.data.problems import DataError

IMAGE = "<image>"
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. The text of a user turn has `<image>` in the place of each image."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a conversation that is tokenised on its own.

    `text` is plain text of any content, `special` names one token of the vocabulary (or "bos"/"eos"), `image` is the
    place of one image.
    """

    kind: Literal["text", "special", "image"]
    text: str = ""
    supervised: bool = False


Template = Callable[[Sequence[Turn]], list[Piece]]

BOS = Piece("special", "bos")
EOS = Piece("special", "eos", supervised=True)

SYSTEM_PROMPTS = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "plain": "",
    "llava_llama_2": "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.",
    "mistral_instruct": "",
    "chatml": "Answer the questions.",
}
"""What a template says where a record has no system turn."""


def check_turns(turns: Sequence[Turn], num_images: int) -> None:
    """Check the shape that templates rely on: [system] (user assistant)+, images in user turns only, counts equal."""
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError("roles", "a system turn comes after another turn", "Move it to the start")
    if not spoken:
        raise DataError("empty", "the conversation has no turns", "Remove the record or fill 'conversations'")
    for position, turn in enumerate(spoken):
        expected = "user" if position % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(
                "roles",
                f"turn {position + 1} is from {turn.role!r}, but user and assistant must alternate, user first",
                "Merge neighbouring turns of one speaker, or drop a leading answer",
            )
    if len(spoken) % 2:
        raise DataError(
            "roles", "the conversation ends with a question", "Add its answer, or drop the last turn: it has no target"
        )
    in_answers = sum(turn.text.count(IMAGE) for turn in turns if turn.role != "user")
    if in_answers and num_images:
        raise DataError("image_count", f"{IMAGE} is outside a user turn", "Move it into a question")
    marks = sum(turn.text.count(IMAGE) for turn in spoken if turn.role == "user")
    if marks != num_images:
        raise DataError(
            "image_count",
            f"the text has {marks} {IMAGE}, but the record names {num_images} image(s)",
            f"Write one {IMAGE} for each image, where it belongs" if num_images else "Name the image in 'image'",
        )


def split_images(text: str, has_images: bool) -> list[Piece]:
    """Cut the text at its images. In a record without images `<image>` is plain text, as in LLaVA."""
    if not has_images:
        return [Piece("text", text)]
    pieces: list[Piece] = []
    for position, part in enumerate(text.split(IMAGE)):
        if position:
            pieces.append(Piece("image"))
        if part:
            pieces.append(Piece("text", part))
    return pieces


def move_images_to_start(text: str) -> str:
    """LLaVA's placement: the images of a turn come before its text, one a line, and the text is stripped."""
    count = text.count(IMAGE)
    if not count:
        return text
    return (f"{IMAGE}\n" * count + text.replace(IMAGE, "").strip()).strip()


def _v1(turns: Sequence[Turn], has_images: bool) -> list[Piece]:
    system, rounds = _rounds(turns, "v1")
    pieces = [BOS]
    for number, (question, answer) in enumerate(rounds):
        lead = f"{system} " if number == 0 and system else ""
        pieces += split_images(f"{lead}USER: {question} ASSISTANT:", has_images)
        pieces += [Piece("text", f" {answer}", supervised=True)] if answer else []
        pieces.append(EOS)
    return pieces


def _inst(turns: Sequence[Turn], has_images: bool, *, template: str, bos_between: bool) -> list[Piece]:
    system, rounds = _rounds(turns, template)
    pieces = [BOS]
    for number, (question, answer) in enumerate(rounds):
        lead = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if number == 0 and system else ""
        if number and bos_between:
            pieces.append(BOS)
        pieces += split_images(f"[INST] {lead}{question} [/INST]", has_images)
        pieces += [Piece("text", f" {answer} ", supervised=True)] if answer else []
        pieces.append(EOS)
    return pieces


def _plain(turns: Sequence[Turn], has_images: bool) -> list[Piece]:
    _, rounds = _rounds(turns, "plain")
    if len(rounds) != 1:
        raise DataError(
            "roles",
            f"the template 'plain' captions images and takes one question and one answer, not {len(rounds)}",
            "Split the record, or choose another model.template",
        )
    question, answer = rounds[0]
    # The question's words are dropped, its images stay: stage 1 of LLaVA learns captions, not answers.
    images = [Piece("image")] * (question.count(IMAGE) if has_images else 0)
    return [BOS, *images, Piece("text", f"{answer}\n", supervised=True)]


def _chatml(turns: Sequence[Turn], has_images: bool) -> list[Piece]:
    system, rounds = _rounds(turns, "chatml")
    start, end = Piece("special", "<|im_start|>"), Piece("special", "<|im_end|>")
    pieces = [start, Piece("text", f"system\n{system}"), end]
    for question, answer in rounds:
        pieces += [start, *split_images(f"user\n{question}", has_images), end, start, Piece("text", "assistant\n")]
        pieces += [Piece("text", answer, supervised=True)] if answer else []
        pieces.append(Piece("special", "<|im_end|>", supervised=True))
    return pieces


TEMPLATES: dict[str, Callable[[Sequence[Turn], bool], list[Piece]]] = {
    "v1": _v1,
    "plain": _plain,
    "llava_llama_2": partial(_inst, template="llava_llama_2", bos_between=True),
    "mistral_instruct": partial(_inst, template="mistral_instruct", bos_between=False),
    "chatml": _chatml,
}


def _rounds(turns: Sequence[Turn], template: str) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt and the (question, answer) pairs of checked turns (`check_turns`)."""
    system = turns[0].text if turns[0].role == "system" else SYSTEM_PROMPTS[template]
    spoken = [turn.text for turn in turns if turn.role != "system"]
    assert len(spoken) % 2 == 0, "records hold whole rounds"
    return system, list(zip(spoken[::2], spoken[1::2], strict=True))
