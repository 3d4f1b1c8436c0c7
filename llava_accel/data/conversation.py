"""Templates: a conversation becomes a list of pieces, each marked supervised or not.

The texts are LLaVA's (`llava/conversation.py`, of 1.5 and of NeXT); what is supervised is each answer and the token that
ends it. The pieces are tokenised one by one in `labels.py`, so the targets are known by construction and never counted
again.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Literal

from llava_accel.sources.problems import DataError

IMAGE = "<image>"
_OF_OTHERS = re.compile(r"<\|?(?:image|img_context|vision_start)[\w |/]{0,12}>", re.IGNORECASE)
Role = Literal["system", "user", "assistant"]
Original = Literal["", "all", "newlines"]
"""What LLaVA's own code learns of a piece that is not an answer: nothing, all, or the tokens that are one line break."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. The text of a user turn has `<image>` in the place of each image."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a conversation that is tokenised on its own.

    `text` is plain text of any content, `special` names one token of the vocabulary (or "bos"/"eos"), `image` is the
    place of one image. `original` is used only with data.labels = "original".
    """

    kind: Literal["text", "special", "image"]
    text: str = ""
    supervised: bool = False
    original: Original = ""


Template = Callable[[Sequence[Turn], bool], list[Piece]]

BOS = Piece("special", "bos")
EOS = Piece("special", "eos", supervised=True)

_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
SYSTEM_PROMPTS = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "plain": "",
    "llava_llama_2": _HELPFUL,
    "llava_llama_3": _HELPFUL,
    "mistral_instruct": "",
    "chatml": "Answer the questions.",
    "qwen_1_5": "You are a helpful assistant.",
}
"""The system prompt of each template, for records without a system turn."""


def check_turns(turns: Sequence[Turn], num_images: int) -> None:
    """DataError unless the turns are [system] (user assistant)+ and the user turns have one mark for each image."""
    start = _start(turns)
    marks, in_others = 0, turns[0].text.count(IMAGE) if start else 0
    for position, turn in enumerate(turns[start:]):
        if turn.role == "system":
            raise DataError("roles", "a system turn comes after another turn", "Move it to the start")
        if turn.role != ("assistant" if position % 2 else "user"):
            raise DataError(
                "roles",
                f"turn {position + 1} is from {turn.role!r}, but user and assistant must alternate, user first",
                "Merge neighbouring turns of one speaker, or remove the record",
            )
        if position % 2:
            in_others += turn.text.count(IMAGE)
        else:
            marks += turn.text.count(IMAGE)
    if len(turns) == start:
        raise DataError("empty", "the conversation has no turns", "Remove the record or fill 'conversations'")
    if (len(turns) - start) % 2:
        raise DataError(
            "roles", "the conversation ends with a question", "Add its answer, or remove the record: it has no target"
        )
    if in_others and num_images:
        raise DataError("image_count", f"{IMAGE} is outside a user turn", "Move it into a question")
    if marks != num_images:
        remedy = f"Write one {IMAGE} for each image, where it belongs" if num_images else "Name the image in 'image'"
        if mark := _mark_of_others(turns):
            remedy = f"Write {IMAGE} in place of {mark}"
        elif not marks:
            remedy += '; data.missing_image_mark = "start" puts them before the first question'
        raise DataError(
            "image_count", f"the text has {marks} {IMAGE}, but the record names {num_images} image(s)", remedy
        )


def whole_rounds(turns: Sequence[Turn], images: Sequence[str]) -> tuple[Sequence[Turn], tuple[str, ...]]:
    """Leave out a leading answer, as LLaVA does, and a trailing question, each with the images that it shows.

    A conversation that is not a sequence of rounds for another reason stays as it is, for `check_turns` to refuse.
    """
    start = _start(turns)
    first = start + (len(turns) > start and turns[start].role == "assistant")
    last = len(turns) - (turns[-1].role == "user" if turns else 0)
    if (first == start and last == len(turns)) or last - first < 2:
        return turns, tuple(images)
    if any(one.role == other.role for one, other in pairwise(turns[start:])):
        return turns, tuple(images)
    before, after = (sum(turn.text.count(IMAGE) for turn in each) for each in (turns[start:first], turns[last:]))
    inside = sum(turn.text.count(IMAGE) for turn in turns[first:last] if turn.role == "user")
    if before + inside + after == len(images):
        images = images[before : before + inside]
    return [*turns[:start], *turns[first:last]], tuple(images)


def marked(turns: Sequence[Turn], num_images: int) -> Sequence[Turn]:
    """The turns with a mark per image before the first question, each on a line; unchanged if they have marks already,
    or those of other models, which `check_turns` refuses."""
    start = _start(turns)
    if start == len(turns) or any(IMAGE in turn.text for turn in turns[start::2]) or _mark_of_others(turns):
        return turns
    text = f"{IMAGE}\n" * num_images + turns[start].text
    question = Turn(turns[start].role, text if turns[start].text else text.strip())
    return [*turns[:start], question, *turns[start + 1 :]]


def _mark_of_others(turns: Sequence[Turn]) -> str:
    """The first mark of another model's form, such as <|image_1|>, where no text has ours; else ""."""
    texts = [turn.text for turn in turns if turn.role == "user"]
    found = None if any(IMAGE in text for text in texts) else re.search(_OF_OTHERS, "\n".join(texts))
    return found.group() if found else ""


def _start(turns: Sequence[Turn]) -> int:
    return int(bool(turns) and turns[0].role == "system")


def split_images(text: str, has_images: bool, original: Original = "") -> list[Piece]:
    """Cut the text at its images. In a record without images `<image>` is plain text, as in LLaVA."""
    if not has_images:
        return [Piece("text", text, original=original)]
    pieces: list[Piece] = []
    for position, part in enumerate(text.split(IMAGE)):
        if position:
            pieces.append(Piece("image"))
        if part:
            pieces.append(Piece("text", part, original=original))
    return pieces


def move_images_to_start(text: str) -> str:
    """LLaVA-1.5's placement: the images of a turn come before its text, one per line, and the text is stripped."""
    count = text.count(IMAGE)
    if not count:
        return text
    return (f"{IMAGE}\n" * count + text.replace(IMAGE, "").strip()).strip()


def move_single_image_to_start(text: str) -> str:
    """NeXT's and OneVision's placement: a single image comes first, as with LLaVA-1.5; several stay in place."""
    return text if text.count(IMAGE) != 1 or text.startswith(IMAGE) else move_images_to_start(text)


PLACEMENTS: dict[str, Callable[[str], str]] = {
    "start": move_images_to_start, "start_if_single": move_single_image_to_start, "in_place": str,
}  # fmt: skip
"""For each value of data.image_placement the function that is applied to the text of a turn."""


def _v1(turns: Sequence[Turn], has_images: bool, *, template: str) -> list[Piece]:
    system, rounds = _rounds(turns, template)
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


_SPECIAL = re.compile(r"(<\|.*?\|>)")
_CHATML = "<|im_start|>ROLE\nTEXT<|im_end|>"
_FIRST = Piece("special", "bos", original="all")
_LLAMA_3 = "<|start_header_id|>ROLE<|end_header_id|>\n\nTEXT<|eot_id|>"


def _headed(
    turns: Sequence[Turn],
    has_images: bool,
    *,
    template: str,
    form: str,
    original: Original | None = None,
    start: Sequence[Piece] = (),
    strips: bool = False,
) -> list[Piece]:
    """Each turn between a header that names its role and a token that ends it.

    An answer is tokenised by itself, as in generation; with data.labels = "original" together with its header, which is
    the same unless it begins with a line break.

    Args:
        form: The text of a turn, with ROLE and TEXT in place of its own.
        original: What LLaVA's own code learns of texts that are not the assistant's; it learns the special tokens and the
            assistant's whole turns besides. None: it learns only answers and their ends.
        strips: Leave out white space around a turn's text, as the template of the language model does.
    """
    pieces = list(start)
    system = () if turns[0].role == "system" else (Turn("system", SYSTEM_PROMPTS[template]),)
    for turn in (*system, *turns):
        text = turn.text.strip() if strips else turn.text
        before, header, after = _frame(form, turn.role, original)
        pieces += before
        if turn.role == "assistant":
            pieces += [header, Piece("text", text, supervised=True)] if text else [header]
        else:
            pieces += split_images(header.text + text, has_images, header.original)
        pieces += after
    return pieces


@cache
def _frame(form: str, role: Role, original: Original | None) -> tuple[list[Piece], Piece, list[Piece]]:
    """The pieces before a turn's text but the last, the last of them, and the pieces after the text."""
    is_answer, (before, after) = role == "assistant", form.replace("ROLE", role).split("TEXT")

    def piece(part: str, ends: bool = False) -> Piece:
        kind = "special" if _SPECIAL.fullmatch(part) else "text"
        learned = "" if original is None else "all" if is_answer or kind == "special" else original
        return Piece(kind, part, supervised=is_answer and ends and kind == "special", original=learned)

    *front, header = (piece(part) for part in _SPECIAL.split(before) if part)
    return front, header, [piece(part, ends=True) for part in _SPECIAL.split(after) if part]


TEMPLATES: dict[str, Template] = {
    "v1": partial(_v1, template="v1"),
    "llava_v1": partial(_v1, template="llava_v1"),
    "plain": _plain,
    "llava_llama_2": partial(_inst, template="llava_llama_2", bos_between=True),
    "llava_llama_3": partial(
        _headed, template="llava_llama_3", form=_LLAMA_3, original="", start=(_FIRST,), strips=True
    ),
    "mistral_instruct": partial(_inst, template="mistral_instruct", bos_between=False),
    "chatml": partial(_headed, template="chatml", form=_CHATML),
    "qwen_1_5": partial(_headed, template="qwen_1_5", form=f"{_CHATML}\n", original="newlines"),
}


def _rounds(turns: Sequence[Turn], template: str) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt and the (question, answer) pairs of checked turns (`check_turns`)."""
    system, spoken = without_system(turns, template)
    texts = [turn.text for turn in spoken]
    assert len(texts) % 2 == 0, "records hold whole rounds"
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def without_system(turns: Sequence[Turn], template: str) -> tuple[str, Sequence[Turn]]:
    """The system prompt, which is the template's if no turn has one, and the other turns."""
    return (turns[0].text, turns[1:]) if turns[0].role == "system" else (SYSTEM_PROMPTS[template], turns)
