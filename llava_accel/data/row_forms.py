"""The forms in which data sets write a record, each brought into LLaVA's. A new one is a line of `_FORMS`.

A row is read by the first form whose fields it has. Columns that the user has named get our names before that.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llava_accel.data.annotations import LETTER_REQUEST, LETTERS, option, parse_answers, with_options
from llava_accel.data.columns import Columns, unknown, value_at
from llava_accel.data.messages import IMAGE_FIELDS, Fields, present, role_of
from llava_accel.data.own_rows import Reader
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted


@dataclass(frozen=True, slots=True)
class RowForm:
    """How the recipe says that rows are to be read."""

    columns: Columns = ()
    missing_image_mark: Literal["error", "start"] = "error"
    pairs: bool = False
    """Whether the rejected answer of a row is read too."""
    reader: Reader | None = None
    """data.reader, which makes rows of a known form out of those of the file."""


class Row(NamedTuple):
    """A row in LLaVA's form."""

    fields: Fields
    messages: list[Any]
    has_marks: bool = True
    """Whether texts say where images are; if not, images without a mark belong to the start."""


class _Form(NamedTuple):
    names: tuple[str, ...]
    """The fields by which a row of the form is known; "image" stands for all of `IMAGE_FIELDS`."""
    read: Callable[[Fields], dict[str, Any]]
    """Returns the fields of LLaVA's form that replace these: `conversations`, and others that go with it."""
    has_marks: bool = False
    """Whether texts may say where images are, so that a missing mark may be a mistake."""


def in_llavas_form(fields: Fields, form: RowForm) -> Row:
    """Bring a row into LLaVA's form.

    Raises:
        DataError: it is in none of the forms, or the value of a field does not suit its form.
    """
    rows = fields.get("conversations")
    if isinstance(rows, list) and not form.columns and fields.keys().isdisjoint(_BESIDE):
        return Row(fields, rows)
    fields = with_columns(fields, form)
    for each in _in_order(form):
        if all(present(fields, *(IMAGE_FIELDS if name == "image" else (name,))) is not None for name in each.names):
            read = each.read(fields)
            fields = {**fields, **read}
            are_messages = isinstance(fields[each.names[0]], list)
            messages = read["conversations"] if are_messages else [*_history(fields), *read["conversations"]]
            return Row(fields, _with_system(fields, messages), each.has_marks and are_messages)
    raise unknown(fields, form.columns, (each.names for each in _FORMS))


def named_columns(words: Sequence[str]) -> dict[str, str]:
    """data.columns as --columns OURS=THEIRS gives it; UserError for a word of another form."""
    pairs = [word.partition("=") for word in words]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        raise UserError(f"--columns {wrong[0]}: it is not OURS=THEIRS. Write for example question=prompt")
    return {ours: theirs for ours, _, theirs in pairs}


def with_columns(fields: Fields, form: RowForm) -> Fields:
    """A row with the user's columns under our names too."""
    values = {ours: value_at(fields, theirs) for ours, theirs in form.columns}
    return {**fields, **{ours: value for ours, value in values.items() if value is not None}} if values else fields


def column(form: RowForm, name: str) -> str:
    """The user's name for one of our fields."""
    return dict(form.columns).get(name, name)


@functools.cache
def _in_order(form: RowForm) -> list[_Form]:
    """All forms: one whose fields data.columns names comes first, whatever else the rows hold."""
    mapped = {ours for ours, _ in form.columns} | {"image"}
    return sorted(_FORMS, key=lambda each: not mapped.issuperset(each.names))


def _with_system(fields: Fields, messages: list[Any]) -> list[Any]:
    text = _text(fields, "system") if fields.get("system") is not None else _text(fields, "system_prompt")
    if text is None:
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if role_of(first) != "system":
        return [{"from": "system", "value": text}, *messages]
    if _text_of(first) != text:
        problem = "the first turn is a system turn, and 'system' says something else"
        raise DataError("roles", problem, "Keep one of the two")
    return messages


def _text(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # answers to "how many" are often numbers
    if value is not None and not isinstance(value, str):
        raise DataError("fields", f"{name!r} is {value!r:.80}, not a text", "Write it as a string")
    return value


def _round(question: object, answer: object) -> list[dict[str, object]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _listed(name: str) -> Callable[[Fields], dict[str, Any]]:
    """Reads a list of messages; its last answer, the preferred of two, may be in `chosen` instead."""

    def read(fields: Fields) -> dict[str, Any]:
        rows = fields[name]
        if isinstance(rows, str):  # from a table, whose cells cannot hold lists
            with suppress(ValueError, RecursionError):
                rows = json.loads(rows)
        if not isinstance(rows, list):
            remedy = 'Write "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
            raise DataError("fields", f"{name!r} is {quoted(rows)}", remedy)
        is_open = bool(rows) and role_of(rows[-1]) == "user" and fields.get("chosen") is not None
        return {name: rows, "conversations": continued(rows, fields["chosen"]) if is_open else rows}

    return read


def _texts(fields: Fields) -> dict[str, Any]:
    rounds = fields["texts"]
    if not isinstance(rounds, list) or not all(isinstance(each, dict) for each in rounds):
        problem = f"'texts' is {quoted(rounds)}"
        raise DataError("fields", problem, 'Write "texts": [{"user": ..., "assistant": ...}]')
    return {"conversations": [turn for each in rounds for turn in _round(each.get("user"), each.get("assistant"))]}


def _prompted(answer: str) -> Callable[[Fields], dict[str, Any]]:
    """Reads `prompt` and its answer, each a text or a list of messages."""

    def read(fields: Fields) -> dict[str, Any]:
        prompt = fields["prompt"]
        rows = prompt if isinstance(prompt, list) else [{"from": "human", "value": prompt}]
        return {"conversations": continued(rows, fields[answer])}

    return read


def continued(rows: list[Any], answer: object) -> list[Any]:
    """The messages followed by their answer: a text, a message, or a list of messages, which may repeat these first."""
    if not isinstance(answer, list):
        return [*rows, answer if isinstance(answer, dict) else {"from": "gpt", "value": answer}]
    # The answer of some data sets is the whole conversation, the question included.
    questions = [[_text_of(row) for row in each if role_of(row) == "user"] for each in (rows, answer)]
    return answer if questions[0] and questions[1][: len(questions[0])] == questions[0] else [*rows, *answer]


def _text_of(message: dict[str, object]) -> object:
    return present(message, "value", "content")


def _history(fields: Fields) -> list[dict[str, object]]:
    """The rounds before a question that is in a field of its own."""
    rounds = fields.get("history") or []
    if not isinstance(rounds, list) or not all(isinstance(each, list) and len(each) == 2 for each in rounds):
        problem = f"'history' is {quoted(rounds)}"
        raise DataError("fields", problem, "Write a list of [question, answer], or drop it")
    return [turn for question, answer in rounds for turn in _round(question, answer)]


def _asked(question: str, answer: str) -> Callable[[Fields], dict[str, Any]]:
    return lambda fields: {"conversations": _round(_text(fields, question), _text(fields, answer))}


def _instructed(answer: str) -> Callable[[Fields], dict[str, Any]]:
    """Reads an instruction, with its input on the line below."""

    def read(fields: Fields) -> dict[str, Any]:
        question = "\n".join(filter(None, (_text(fields, "instruction"), _text(fields, "input"))))
        return {"conversations": _round(question, _text(fields, answer))}

    return read


def _preferred(fields: Fields) -> dict[str, Any]:
    """Reads the preferred of two whole conversations, which differ in their last answer."""
    if not isinstance(fields["chosen"], list):
        problem = f"'chosen' is {quoted(fields['chosen'])}, and nothing says what it answers"
        raise DataError("fields", problem, "Write the question in 'prompt' or 'question'")
    return {"conversations": fields["chosen"]}


def _annotated(fields: Fields, name: str = "answers") -> dict[str, Any]:
    """Reads a question and its annotators' answers: the most frequent one is learned, of equals the first."""
    answers = parse_answers(fields["answers"], name)
    candidates = [answer for answer in answers if answer[0].strip()] or answers
    target, _ = max(candidates, key=lambda answer: answer[1])
    return {"conversations": _round(_text(fields, "question"), target)}


def _question(fields: Fields) -> dict[str, Any]:
    if present(fields, "choices", "options"):  # an empty list leaves the question open
        return _multiple_choice(fields)
    if isinstance(fields["answer"], list | dict) and fields.get("answers") is None:
        return {"answers": fields["answer"], **_annotated({**fields, "answers": fields["answer"]}, "answer")}
    return _asked("question", "answer")(fields)


def _multiple_choice(fields: Fields) -> dict[str, Any]:
    """Reads a question with its options below, as LLaVA-1.5 learns them, answered by a letter."""
    choices = present(fields, "choices", "options")
    if isinstance(choices, dict) and list(choices) == list(LETTERS[: len(choices)]):
        choices = list(choices.values())
    texts = [each for each in choices if isinstance(each, str)] if isinstance(choices, list) else []
    if not isinstance(choices, list) or len(texts) < len(choices) or not 2 <= len(texts) <= len(LETTERS):
        raise DataError("fields", f"the choices are {quoted(choices)}", "Write a list of 2 to 26 strings in 'choices'")
    question = f"{with_options(_text(fields, 'question') or '', choices)}\n{LETTER_REQUEST}"
    return {"conversations": _round(question, _letter(fields["answer"], choices)), "choices": choices, "answers": None}


def _letter(answer: object, choices: list[str]) -> str:
    """The letter of the choice that an answer means: by its number from 0, its letter or its text."""
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool):
        meant = set(letters[answer : answer + 1]) if answer >= 0 else set()
    else:
        text = answer.strip() if isinstance(answer, str) else ""
        meant = {letter for letter, choice in zip(letters, choices, strict=False) if choice.strip() == text}
        meant |= {letter for letter in [option(text, len(letters)), text.strip("().")] if letter and letter in letters}
    if len(meant) != 1:
        problem = f"the answer {quoted(answer)} does not name one of the {len(choices)} choices"
        raise DataError("fields", problem, "Write its number from 0, without quotes, its letter or its text")
    return meant.pop()


def _captioned(name: str) -> Callable[[Fields], dict[str, Any]]:
    def read(fields: Fields) -> dict[str, Any]:
        captions = fields[name]
        if name == "text" and fields.get("question_id") is not None:
            problem = "'text' beside 'question_id' is a question, as in LLaVA's files of questions"
            raise DataError("fields", problem, "Write it in 'question', and its answer in 'answer'")
        if isinstance(captions, str) and _OF_A_RECORD.match(captions):
            problem = f"{name!r} is {quoted(captions)}, a record and not a text to learn"
            raise DataError("fields", problem, "Write its fields into the row itself, or let a data.reader do so")
        several = {"answers": captions, "question": ""} if isinstance(captions, list) else {}
        return several | (_annotated(several, name) if several else {"conversations": _round("", _text(fields, name))})

    return read


_FORMS = (
    _Form(("conversations",), _listed("conversations"), has_marks=True),
    _Form(("messages",), _listed("messages"), has_marks=True),
    _Form(("conversation",), _listed("conversation"), has_marks=True),
    _Form(("texts",), _texts),
    _Form(("prompt", "completion"), _prompted("completion"), has_marks=True),
    _Form(("prompt", "chosen"), _prompted("chosen"), has_marks=True),
    _Form(("prompt", "response"), _prompted("response"), has_marks=True),
    _Form(("query", "response"), _asked("query", "response")),
    _Form(("instruction", "output"), _instructed("output")),
    _Form(("instruction", "chosen"), _instructed("chosen")),
    _Form(("prefix", "suffix"), _asked("prefix", "suffix")),
    _Form(("question", "answer"), _question),
    _Form(("question", "answers"), _annotated),
    _Form(("question", "chosen"), _asked("question", "chosen")),
    _Form(("chosen", "rejected"), _preferred, has_marks=True),
    _Form(("caption", "image"), _captioned("caption")),
    _Form(("text", "image"), _captioned("text")),
)

_OF_A_RECORD = re.compile(r'\s*\{\s*"(question|prompt|chosen|conversations|messages)"\s*:')
_BESIDE = {"chosen", "system", "system_prompt"}
"""Fields that add something to `conversations`."""
