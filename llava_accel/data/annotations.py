"""Fields of a row that describe its answers besides the conversation: annotators' answers, and options to choose from."""

import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import TypeGuard

from llava_accel.sources.problems import DataError, quoted

MOST_ANSWERS = 10_000
"""Limit on the annotators of a question, above that of any data set: scores list an answer as often as it was given."""
LETTERS = string.ascii_uppercase
LETTER_REQUEST = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's line below the options of a question."""


def parse_answers(value: object, name: str = "answers") -> tuple[tuple[str, float], ...]:
    """The (text, count) pairs of a record's answers, which the user wrote in the field `name`; empty if the field is
    absent, DataError if it has another form."""
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
    if not counts or len(answers) < len(counts) or sum(count for _, count in answers) > MOST_ANSWERS:
        remedy = f'Write {{"answer": count}} or a list of answers, of at most {MOST_ANSWERS:,} annotators'
        raise DataError("fields", f"{name!r} is {quoted(value)}", remedy)
    return answers


def parse_choices(value: object, answer: str) -> tuple[str, ...]:
    """The options of a record's `choices`, empty if the field is absent; DataError if `answer` names none of them."""
    if value is None:
        return ()
    names = tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
    if not isinstance(value, list) or len(names) < len(value) or not 2 <= len(names) <= len(LETTERS):
        raise DataError("fields", f"'choices' is {quoted(value)}", "Write 2 to 26 strings, or drop it")
    if option(answer, len(names)) is None:
        problem = f"the answer {quoted(answer)} does not name one of the {len(names)} choices"
        raise DataError("fields", problem, f"Begin it with a letter from A to {LETTERS[len(names) - 1]}")
    return names


def with_options(question: str, choices: Iterable[str]) -> str:
    """The question with its options below, as LLaVA-1.5 learns them."""
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))])


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
    return letter if letter and letter in LETTERS[:num_choices] else None


def _is_count(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_ANSWERS
