"""One row of the user's file -> `Record`: turns, images, answers, choices. Errors in it are raised here, with a remedy.

Accepted: `conversations` (or `messages`) of `{"from": human|gpt|user|assistant|system, "value": ...}` or
`{"role": ..., "content": ...}`, `image` (a name or a list of names) or `images`, and what `prepare` adds: `question`,
`answers` (text -> count), `question_type`, `answer_type`; and `choices`, the options of a question whose answer is a letter.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from llava_accel.data.conversation import Role, Turn, check_turns
from llava_accel.sources.extraction import part_in
from llava_accel.sources.image_parts import part_of
from llava_accel.sources.json_rows import MAX_BYTES
from llava_accel.sources.problems import DataError, quoted

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"
}  # fmt: skip


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

    def check_answers(self) -> None:
        """DataError if an answer has nothing that can be seen: the model would learn to say nothing. LLaVA does."""
        for number, turn in enumerate((turn for turn in self.turns if turn.role != "system"), start=1):
            if turn.role == "assistant" and is_blank(turn.text):
                problem = f"the answer in turn {number} is blank, so that silence would be learned"
                raise DataError("blank_answer", problem, "Write it, or remove it together with its question")

    def references(self) -> list[str]:
        """Every annotator's answer, repeated as often as it was given."""
        return as_given(self.answers) or [self.turns[-1].text]


def parse_record(raw: bytes, row: int, files: Sequence[str] = ()) -> Record:
    """Check one JSON object; DataError without its place, as the caller knows the file (`DataError.at`).

    Args:
        row: Its id where it has none.
        files: See `Table.files`.
    """
    fields = _object(raw)
    record_id = _either(fields, "id", "question_id")
    record_id = row if record_id is None else record_id
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise DataError("fields", f"'id' is {quoted(record_id)}", "Write a string or a whole number")
    images = _images(fields, files)
    turns = _turns(fields)
    check_turns(turns, num_images=len(images))
    return Record(
        id=str(record_id),
        turns=turns,
        images=images,
        question=_text(fields, "question"),
        answers=(answers := parse_answers(fields.get("answers"))),
        choices=parse_choices(fields.get("choices"), answers[0][0] if answers else turns[-1].text),
        question_type=_text(fields, "question_type"),
        answer_type=_text(fields, "answer_type"),
    )


def as_given(answers: Iterable[tuple[str, int | float]]) -> list[str]:
    """Each answer as often as it was given."""
    return [text for text, count in answers for _ in range(round(count))]


def is_blank(text: str) -> bool:
    """Whether a text is empty, or holds white space and characters without a shape alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def record_id(raw: bytes) -> str | None:
    """The id of a row that may be broken, for an error message; None if it cannot be read."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    name = _either(fields, "id", "question_id") if isinstance(fields, dict) else None
    return str(name) if isinstance(name, str | int) else None


def _object(raw: bytes) -> Mapping[str, object]:
    if len(raw) > MAX_BYTES:
        problem = f"the row is longer than {MAX_BYTES >> 20} MiB and was not read"
        raise DataError("json", problem, "Write one conversation a row; images are files, named in 'image'")
    try:
        fields = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError("json", f"not UTF-8 ({error})", "Save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError("json", f"not valid JSON ({error})", "Write one JSON object a row") from None
    if not isinstance(fields, dict):
        raise DataError("json", f"the row is {quoted(fields)}, not a JSON object", "Write {...}")
    if b"\\ud" in raw or b"\\uD" in raw:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = quoted(error.object[error.start])
            raise DataError("json", f"{half} is half of a surrogate pair", "Write both halves, or neither") from None
    return fields


def _either(fields: Mapping[str, object], name: str, other: str) -> object:
    """The field of either spelling. A null counts as absent: Parquet has no other way to leave a field out."""
    value = fields.get(name)
    return fields.get(other) if value is None else value


def _images(fields: Mapping[str, object], files: Sequence[str]) -> tuple[str, ...]:
    value = _either(fields, "image", "images")
    values = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(image_reference(each, files) for each in values)


def image_reference(value: object, files: Sequence[str]) -> str:
    """The name of an image, as the record has it; of an image in the row, its address.

    Raises:
        DataError: it is neither.
    """
    if part := part_in(value, files):
        return part.address
    if not isinstance(value, str) or not value:
        raise DataError("fields", f"'image' holds {quoted(value)}, not a file name", "Name a file, or drop it")
    if part_of(value):
        problem = f"the image {quoted(value)} names a part of a file"
        raise DataError("unsafe_path", problem, "Name the file of the image itself")
    return value


def _turns(fields: Mapping[str, object]) -> tuple[Turn, ...]:
    rows = _either(fields, "conversations", "messages")
    if not isinstance(rows, list):
        raise DataError(
            "fields",
            f"'conversations' is {'missing' if rows is None else quoted(rows)}",
            'Write "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]',
        )
    return tuple(_turn(row, position) for position, row in enumerate(rows, start=1))


def _turn(row: object, position: int) -> Turn:
    if not isinstance(row, dict):
        raise DataError("fields", f"turn {position} is {quoted(row)}", 'Write {"from": ..., "value": ...}')
    speaker, text = _either(row, "from", "role"), _either(row, "value", "content")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise DataError(
            "roles", f"turn {position} is from {quoted(speaker)}", f"Use one of {', '.join(_ROLES)} in 'from'"
        )
    if not isinstance(text, str):
        raise DataError("fields", f"the text of turn {position} is {quoted(text)}", "Write a string in 'value'")
    return Turn(_ROLES[speaker], text)


def _text(fields: Mapping[str, object], key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError("fields", f"{key!r} is {quoted(value)}", "Write a string, or drop it")
    return value


_MAX_COUNT = 1e6  # more annotators than any data set has: references() writes each answer out
_LETTERS = string.ascii_uppercase


def parse_answers(value: object) -> tuple[tuple[str, float], ...]:
    """`answers` of a record, as (text, count); none where the field is absent."""
    if value is None:
        return ()
    counts: dict[str, object] = {}
    if isinstance(value, dict):
        # Parquet gives every row the keys of all rows, null where the row has none.
        counts = {text: count for text, count in value.items() if count is not None}
    elif isinstance(value, list):
        entries = [entry.get("answer") if isinstance(entry, dict) else entry for entry in value]
        texts = [entry for entry in entries if isinstance(entry, str)]
        counts = dict(Counter(texts)) if len(texts) == len(entries) else {}
    answers = tuple((text, float(count)) for text, count in counts.items() if _is_count(count))
    if not counts or len(answers) < len(counts):
        raise DataError(
            "fields", f"'answers' is {quoted(value)}", 'Write {"answer": count} or a list of answers, or drop it'
        )
    return answers


def parse_choices(value: object, answer: str) -> tuple[str, ...]:
    """`choices` of a record, one of which its answer names; none where the field is absent."""
    if value is None:
        return ()
    names = tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
    if not isinstance(value, list) or len(names) < len(value) or not 2 <= len(names) <= len(_LETTERS):
        raise DataError("fields", f"'choices' is {quoted(value)}", "Write 2 to 26 strings, or drop it")
    if option(answer, len(names)) is None:
        problem = f"the answer {quoted(answer)} does not name one of the {len(names)} choices"
        raise DataError("fields", problem, f"Begin it with a letter from A to {_LETTERS[len(names) - 1]}")
    return names


def option(text: str, num_choices: int) -> str | None:
    """The letter of the option that a text names, by LLaVA's rule for ScienceQA: alone, at the start ("B. a magnet"), or
    in the only "The answer is B." of the text.

    None where the text names no option in one of these ways, or a letter beyond the choices.
    """
    text = text.strip()
    letter = text if len(text) == 1 else text[:1] if text[1:3] == ". " else ""
    if not letter:
        sentences = re.findall(r"The answer is ([A-Z]).", text)
        letter = sentences[0] if len(sentences) == 1 else ""
    return letter if letter and letter in _LETTERS[:num_choices] else None


def _is_count(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_COUNT
