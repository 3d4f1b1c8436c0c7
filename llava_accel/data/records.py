"""One row of the user's file -> `Record`: turns, images, answers, choices. Errors in it are raised here, with a remedy.

LLaVA's form is `conversations` of `{"from": human|gpt|system, "value": ...}` and `image`, a name or a list of names; the
others are brought into it in `row_forms.py`. `prepare` adds `question`, `answers` (text -> count), `question_type` and
`answer_type`; and `choices` are the options of a question whose answer is a letter.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_accel.data.annotations import parse_answers, parse_choices
from llava_accel.data.conversation import IMAGE, Turn, check_turns, marked, whole_rounds
from llava_accel.data.messages import present, read_images, read_messages
from llava_accel.data.pairs import is_pair, rejected_answer
from llava_accel.data.row_forms import RowForm, in_llavas_form, with_columns
from llava_accel.data.unread import check_all_is_read
from llava_accel.sources.extraction import PART, check_parts, check_texts, with_addresses
from llava_accel.sources.json_rows import FETCH, GIT_POINTER, MAX_BYTES
from llava_accel.sources.problems import DataError, quoted

_LLAVAS = RowForm()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A checked row: an optional system turn, then whole rounds of a user's and an assistant's turn."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    """Image names as written, one for each `<image>` in the user turns."""
    question: str = ""
    answers: tuple[tuple[str, float], ...] = ()
    """The annotators' answers and how many gave each; empty: the last turn is the only answer."""
    question_type: str = ""
    answer_type: str = ""
    choices: tuple[str, ...] = ()
    """Options A, B, C ...; the answer names one of them by its letter."""
    is_pair: bool = False
    """Whether the row has a rejected answer."""
    rejected: str | None = None
    """The rejected answer, an alternative to the last turn; read only if the form asks for pairs."""
    dropped_turns: int = 0
    """Turns of the row that are not here: a leading answer, a trailing question."""
    unanswered: Turn | None = None
    """The trailing question, if there is one."""

    def check_answers(self) -> None:
        """DataError if an answer has no visible character: the model would learn to say nothing, as with LLaVA's code."""
        for number, turn in enumerate((turn for turn in self.turns if turn.role != "system"), start=1):
            if turn.role == "assistant" and is_blank(turn.text):
                problem = f"the answer in turn {number} is blank, so that silence would be learned"
                raise DataError("blank_answer", problem, "Write it, or remove it together with its question")
        if self.rejected is not None and is_blank(self.rejected):
            problem = "the rejected answer is blank: the model would learn only not to be silent"
            raise DataError("blank_answer", problem, "Write it, or remove the record")


def parse_record(raw: bytes, row: int, form: RowForm = _LLAVAS, files: Sequence[str] = ()) -> Record:
    """Check one JSON object; DataError without file and row, which the caller adds (`DataError.at`).

    Args:
        row: Its number, which is its id if it has none.
        files: See `Table.files`.
    """
    fields = _object(read_raw(raw, form, files)) if form.reader else _fields(raw, files)
    given = fields
    fields, messages, has_marks = in_llavas_form(fields, form)
    record_id = present(fields, "id", "question_id")
    record_id = row if record_id is None else record_id
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise DataError("fields", f"'id' is {quoted(record_id)}", "Write a string or a whole number")
    turns, named = read_messages(messages)
    given_turns, images = turns, read_images(fields, named)
    check_parts(images, files)
    check_all_is_read(fields, turns, images, form.columns)
    turns, images = whole_rounds(turns, images)
    if images and (form.missing_image_mark == "start" or not has_marks):
        turns = marked(turns, len(images))
    check_turns(turns, num_images=len(images))
    answers = parse_answers(fields.get("answers"))
    rejected = rejected_answer(given, form, turns) if form.pairs else None
    check_texts([turn.text for turn in turns] + [text for text, _ in answers] + [rejected or ""], files)
    return Record(
        id=str(record_id),
        turns=tuple(turns),
        images=images,
        question=_text(fields, "question"),
        answers=answers,
        choices=parse_choices(fields.get("choices"), answers[0][0] if answers else turns[-1].text),
        question_type=_text(fields, "question_type"),
        answer_type=_text(fields, "answer_type"),
        is_pair=is_pair(given, form),
        rejected=rejected,
        dropped_turns=len(given_turns) - len(turns),
        unanswered=given_turns[-1] if given_turns[-1].role == "user" else None,
    )


def read_raw(raw: bytes, form: RowForm, files: Sequence[str] = ()) -> bytes:
    """The row that data.reader makes of this one, as JSON; unchanged if there is no reader.

    Raises:
        DataError: it is not a JSON object, or data.reader fails or leaves it out. Without file and row.
    """
    if form.reader is None:
        return raw
    made = form.reader(_fields(raw, files))
    if made is None:
        raise DataError("left_out", "data.reader returns None for it", "To use it, return a dict")
    return made


def described(record: Record) -> dict[str, Any]:
    """The fields of a prediction that come from its record: id, image, last question, and each answer with its count."""
    return {
        "id": record.id,
        "image": list(record.images) if len(record.images) != 1 else record.images[0],
        "question": record.question or record.turns[-2].text.replace(IMAGE, "").strip(),
        "answers": dict(record.answers) or {record.turns[-1].text: 1},
    }


def as_given(answers: Iterable[tuple[str, int | float]]) -> list[str]:
    """Each answer as often as it was given."""
    return [text for text, count in answers for _ in range(round(count))]


def is_blank(text: str) -> bool:
    """Whether a text is empty or holds only white space and invisible characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def record_id(raw: bytes, form: RowForm = _LLAVAS) -> str | None:
    """The id of a row that may be broken, for an error message; None if it cannot be read."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    name = present(with_columns(fields, form), "id", "question_id")
    return str(name) if isinstance(name, str | int) else None


def _fields(raw: bytes, files: Sequence[str]) -> dict[str, object]:
    """A row of the file, its images as addresses."""
    fields = _object(raw)
    return with_addresses(fields, files) if PART.encode() in raw else fields


def _object(raw: bytes) -> dict[str, object]:
    if len(raw) > MAX_BYTES:
        problem = f"the row is longer than {MAX_BYTES >> 20} MiB and was not read"
        raise DataError("json", problem, "Write one conversation per row; images are files, named in 'image'")
    try:
        fields = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError("json", f"not UTF-8 ({error})", "Save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            "json", f"not valid JSON ({error})", _of_another_kind(raw) or "Write one JSON object per row"
        ) from None
    if not isinstance(fields, dict):
        problem = f"the row is {quoted(fields)}, not a JSON object"
        raise DataError("json", problem, _of_another_kind(raw) or "Write {...}")
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = quoted(error.object[error.start])
            raise DataError("json", f"{half} is half of a surrogate pair", "Write both halves, or neither") from None
    return fields


def _of_another_kind(raw: bytes) -> str:
    """The remedy for a file that has such a row; empty if only the row is wrong."""
    if raw.startswith(GIT_POINTER):
        return FETCH
    return "Write one object {...} per row; a file that is one array of them is named .json" if raw[:1] == b"[" else ""


def _text(fields: Mapping[str, object], key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError("fields", f"{key!r} is {quoted(value)}", "Write it as a string")
    return value
