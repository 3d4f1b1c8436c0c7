"""Rows with two answers, of which one is preferred, in the forms of TRL, LLaMA-Factory, ms-swift and RLAIF-V.

The rejected answer is put in the place of the chosen one and then read by the form of its row.
"""

from collections.abc import Sequence
from dataclasses import replace

from llava_accel.data.conversation import IMAGE, Turn, check_turns, whole_rounds
from llava_accel.data.messages import Fields, present, read_images, read_messages, role_of
from llava_accel.data.row_forms import RowForm, continued, in_llavas_form, with_columns
from llava_accel.sources.problems import DataError, quoted

_ANSWERS = ("chosen", "completion", "response", "output", "answer")
"""Fields that hold the answer in one form or another."""


def is_pair(fields: Fields, form: RowForm) -> bool:
    """Whether a row has a rejected answer."""
    return _rejected(with_columns(fields, form)) is not None


def _with_rejected(fields: Fields, form: RowForm) -> Fields:
    """A row with a rejected answer, as if that one were the answer to learn."""
    fields = with_columns(fields, form)
    rejected = _rejected(fields)
    for name in ("conversations", "messages", "conversation"):
        rows = fields.get(name)
        if isinstance(rows, list) and rows and role_of(rows[-1]) == "assistant":
            return {**fields, name: continued(rows[:-1], rejected)}
    answer = next((name for name in _ANSWERS if fields.get(name) is not None), "answer")
    return {**fields, "answers": None, answer: rejected}


def _rejected(fields: Fields) -> object:
    return present(fields, "rejected", "rejected_response", "rejected_messages")


def rejected_answer(fields: Fields, form: RowForm, turns: Sequence[Turn]) -> str | None:
    """The rejected answer, which the last of these turns is preferred to; None if the row has none.

    Args:
        turns: Checked ones.

    Raises:
        DataError: it equals the chosen one, ends another conversation, shows other images, or is not an answer.
    """
    if not is_pair(fields, form):
        return None
    try:
        others = _turns_with_rejected(fields, form)
    except DataError as error:
        raise replace(
            error, problem=f"with the rejected answer in the place of the chosen one, {error.problem}"
        ) from None
    before = [[(turn.role, _unmarked(turn.text)) for turn in each[:-1]] for each in (turns, others)]
    if before[0] != before[1]:
        problem = "the chosen and the rejected answer do not end the same conversation"
        raise DataError("pair", problem, "Let both have the same turns before their last answer, which alone differs")
    if others[-1].text.strip() == turns[-1].text.strip():
        problem = f"the chosen and the rejected answer are the same, {quoted(turns[-1].text)}"
        raise DataError("pair", problem, "Remove the record: there is nothing to prefer")
    check_turns([*turns[:-1], others[-1]], sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user"))
    return others[-1].text


def _turns_with_rejected(fields: Fields, form: RowForm) -> Sequence[Turn]:
    renamed = replace(form, columns=tuple((ours, ours) for ours, _ in form.columns))
    others, named = read_messages(in_llavas_form(_with_rejected(fields, form), renamed).messages)
    images = read_images(fields, named)
    if (own := fields.get("rejected_images")) and read_images({"images": own}, []) != images:
        problem = "'rejected_images' names other images than those of the chosen one"
        raise DataError("pair", problem, "Let both answer the same question on the same images, or remove the record")
    return whole_rounds(others, images)[0]


def _unmarked(text: str) -> str:
    return text.replace(IMAGE, "").strip()
