"""Shared by all converters: they check the fields of a published row, and make a record of them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_accel.data.annotations import LETTERS
from llava_accel.data.conversation import IMAGE
from llava_accel.sources.problems import DataError, quoted

SHORT = "Answer the question using a single word or phrase."
"""LLaVA-1.5's line below a question with a short answer."""

Rows = Iterable[dict[str, object] | DataError]
"""Records in the order of their file, with the error in place of one that cannot be used."""
AGAIN = "Download the official file again, or correct this entry"


def make_record(
    *,
    record_id: str,
    images: Sequence[str],
    question: str,
    answers: Mapping[str, int],
    suffix: str = "",
    prompt: str = "",
    target: str = "",
    **more: str | Sequence[str],
) -> dict[str, object]:
    """One question as `records.py` reads it, with one `<image>` for each image.

    Args:
        images: Names relative to the recipe's data.images; there may be none.
        answers: Answer -> number of annotators, in the order of the file. The most frequent one is trained on, the
            first of equals; blank ones are kept for scoring, but never trained on.
        suffix: A line put below the question, such as how to answer.
        prompt: Replaces the question in the conversation.
        target: Replaces the most frequent answer as the one that is trained on.
        more: `question_type`, `answer_type`, `choices`; empty ones are left out.

    Raises:
        DataError: question or answer is blank, or holds `<image>`. Without file and row.
    """
    if not question.strip():
        raise DataError("empty", "the question is blank", "Fill it in, or remove it from the file")
    given = [answer for answer in answers if answer.strip()]
    if not given:
        problem = "every answer is blank" if answers else "there is no answer"
        raise DataError("empty", problem, "Fill one in, or remove the question from the file")
    target = target or max(given, key=answers.__getitem__)
    for text in (question, prompt, target):
        if IMAGE in text:
            remedy = f"Take it out: every image gets one {IMAGE}, and nothing else does"
            raise DataError("image_count", f"{quoted(text)} holds {IMAGE}", remedy)
    lines = [*[IMAGE] * len(images), prompt or question, suffix]
    image = {} if not images else {"image": images[0] if len(images) == 1 else list(images)}
    return {
        "id": record_id,
        **image,
        "conversations": [
            {"from": "human", "value": "\n".join(filter(None, lines))},
            {"from": "gpt", "value": target},
        ],
        "question": question,
        "answers": dict(answers),
        **{name: value if isinstance(value, str) else list(value) for name, value in more.items() if value},
    }


def lettered(choices: Sequence[str], correct: object) -> str:
    """The letter of the option with the number `correct`, from 0; DataError without file and row if there is none."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError("fields", f"there are {len(choices)} choices", "Write 2 to 26, or remove the question")
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(choices):
        raise DataError("fields", f"the right option is {quoted(correct)}, not a number below {len(choices)}", AGAIN)
    return LETTERS[correct]


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A field that must be a text; DataError without file and row if it is not."""
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError("fields", f"it needs a text {key!r}, but has {quoted(value)}", AGAIN)
    return value


def texts_of(row: Mapping[str, Any], key: str) -> list[str]:
    """A field that must be a list of texts, or of objects with a text "answer"; else DataError without file and row."""
    value = row.get(key)
    if not isinstance(value, list) or not value:
        raise DataError("fields", f"it needs a list {key!r}, but has {quoted(value)}", AGAIN)
    texts: list[str] = []
    for entry in value:
        text = entry.get("answer") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise DataError("fields", f"{key!r} holds {quoted(entry)}, which is not a text", AGAIN)
        texts.append(text)
    return texts


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: with the file and `remedy`.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("json", "there is no such file", remedy, file=str(path)) from None
    except IsADirectoryError:
        raise DataError("json", "this is a folder", remedy, file=str(path)) from None
    except (ValueError, RecursionError) as error:  # malformed JSON, and bytes that are not UTF-8
        raise DataError("json", f"not valid JSON ({error})", remedy, file=str(path)) from None


def without_repeats(rows: Rows, file: str) -> Iterator[dict[str, object] | DataError]:
    """The rows, with a DataError in place of a record whose id has occurred before."""
    seen: set[object] = set()
    for row in rows:
        if isinstance(row, dict) and row["id"] in seen:
            remedy = "Name each file once, and files without questions in common"
            row = DataError("duplicate_id", "the question occurs twice", remedy, file=file, id=str(row["id"]))
        elif isinstance(row, dict):
            seen.add(row["id"])
        yield row


def placed(error: DataError, file: Path, record_id: str | None = None, row: int | None = None) -> DataError:
    """The error with file, id and row, as far as it does not have them yet."""
    return replace(error, file=error.file or str(file), id=error.id or record_id, row=error.row or row)
