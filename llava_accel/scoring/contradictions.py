"""Finds records that answer one question about one image differently, so that one of them teaches something wrong.

Only short answers can be compared: two captions of an image differ and may both be right.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from llava_accel.data.annotations import option
from llava_accel.data.corpus import Corpus
from llava_accel.data.records import Record
from llava_accel.data.survey import Survey
from llava_accel.scoring.vqa import normalize

_SHORT = 3  # words, articles aside
_MOST_ALIKE = 100  # records on one image and question that are compared with each other


def contradictions(corpus: Corpus, survey: Survey, rows: Int[np.ndarray, "rows"]) -> dict[int, int]:
    """Row -> the first other one that contradicts it, in the order of the data.

    Args:
        rows: The rows to compare, all of them usable.
    """
    contradicted: dict[int, int] = {}
    for alike in _alike(survey, rows):
        records = {row: corpus.record(row) for row in alike}
        for row, record in records.items():
            other = next((other for other in alike if other != row and contradict(record, records[other])), None)
            if other is not None:
                contradicted[row] = other
    return dict(sorted(contradicted.items()))


def contradict(one: Record, other: Record) -> bool:
    """Whether two records that ask the same about the same image cannot both be right.

    Records that name several right answers, as of several annotators, contradict each other if they share none; pairs do
    if each prefers what the other rejects.
    """
    if _system(one) != _system(other):
        return False
    if one.rejected is not None and other.rejected is not None:
        preferred = [normalize(each.turns[-1].text) for each in (one, other)]
        return preferred == [normalize(other.rejected), normalize(one.rejected)]
    return any(
        both[0].isdisjoint(both[1]) and all(len(text.split()) <= _SHORT for text in both[0] | both[1])
        for both in zip(_answers(one), _answers(other), strict=False)
    )


def _alike(survey: Survey, rows: Int[np.ndarray, "rows"]) -> Iterator[list[int]]:
    """Groups of rows with the same image and question, where not all of their records are equal."""
    shown = rows[survey.image_keys[rows] != 0]
    shown = shown[np.lexsort((shown, survey.question_keys[shown], survey.image_keys[shown]))]
    keys = np.stack([survey.image_keys[shown], survey.question_keys[shown]])
    edges = np.concatenate([[0], np.nonzero(np.diff(keys, axis=1).any(axis=0))[0] + 1, [len(shown)]])
    for number in np.nonzero(np.diff(edges) > 1)[0].tolist():
        alike = shown[edges[number] : edges[number + 1]][:_MOST_ALIKE]
        if len(np.unique(survey.record_keys[alike])) > 1:
            yield alike.tolist()


def _system(record: Record) -> str:
    return record.turns[0].text if record.turns[0].role == "system" else ""


def _answers(record: Record) -> list[set[str]]:
    """The right answers of each round."""
    rounds = [{turn.text} for turn in record.turns if turn.role == "assistant"]
    rounds[-1] |= {text for text, _ in record.answers}
    return [{_plain(text, record.choices) for text in texts} for texts in rounds]


def _plain(text: str, choices: tuple[str, ...]) -> str:
    """The form in which answers are compared; the option itself where a letter names it."""
    letter = option(text, len(choices))
    return normalize(choices[ord(letter) - ord("A")] if letter else text)
