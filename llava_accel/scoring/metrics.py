"""How good an answer is: the VQA organisers' normalisation and accuracy, exact match, scores by type and of whole files.

Works on texts alone; `held_out.py` makes the predictions. Scores lie in 0..1. The official evaluator prints percentages;
apart from that factor, `vqa_accuracy` gives its numbers.
"""

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_accel.data.annotations import option
from llava_accel.data.records import as_given
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import quoted
from llava_accel.storage.jsonl import write_json_lines

SCORES = {"vqa_accuracy": "VQA accuracy", "exact_match": "exact match", "multiple_choice": "multiple choice"}
"""Scores of an answer, 0..1, under the names that people read; the last only for records with choices."""
Answers = Sequence[str] | Mapping[str, int] | Mapping[str, float] | Sequence[Mapping[str, object]]

# Removed or replaced by a space one after the other. Apostrophe, colon, full stop and `&` are not among them.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")

# The evaluator's pattern is `(?!<=\d)(\.)(?!\d)`. Its first group was meant as a look-behind, but is a
# look-ahead that always holds at a full stop, so "5." loses its full stop as "st." does; only one before a
# digit stays.
_PERIOD = re.compile(r"\.(?!\d)")
# The evaluator hands `re.UNICODE` (32) to `sub` in the place of the count: from the 33rd on, full stops stay.
_MAX_PERIODS = int(re.UNICODE)

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_ARTICLES = frozenset({"a", "an", "the"})

CONTRACTIONS = dict(line.split() for line in Path(__file__).with_name("contractions.txt").read_text().splitlines())
"""Spelling -> what the evaluator makes of it. "somebody'd" loses its apostrophe where its neighbours gain one, "let's" and
"she's" stand for themselves, and the four spellings with a capital I can never match, as words are lowered first."""


def cell(key: str, value: Any) -> str:
    """What an evaluation measured as text: scores in percent, counts and losses as numbers; None is empty."""
    if value is None:
        return ""
    if key.startswith("num_"):
        return f"{round(value):,}"
    if key.removeprefix("blind_").removeprefix("common_") in SCORES:
        return f"{100 * value:.1f} %"
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


def trim(text: str) -> str:
    """The step that every answer gets: line feeds and tabs become spaces, the ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def process_punctuation(text: str) -> str:
    """Drop or space out punctuation.

    A mark that touches a space anywhere in the text is dropped throughout, any other is replaced by a space;
    with a comma between two digits anywhere, all marks are dropped.
    """
    drop_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if drop else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def process_words(text: str) -> str:
    """Lower the words, write numbers up to ten as digits, drop the articles, and mend contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@functools.lru_cache(maxsize=1 << 16)
def normalize(text: str) -> str:
    """The form in which answers are compared when the annotators do not all agree."""
    return process_words(process_punctuation(trim(text)))


def answer_list(answers: object) -> list[str]:
    """The annotators' answers, one string an annotator, from any form that they come in.

    Args:
        answers: A list of strings, a mapping from answer to the number of annotators who gave it, or a list
            of `{"answer": str, ...}` objects, as in the official annotation files.

    Raises:
        UserError: if there is no answer, or `answers` has another form.
    """
    texts: list[str] = []
    if isinstance(answers, Mapping):
        for answer, count in answers.items():
            whole = isinstance(count, int | float) and count >= 1 and float(count).is_integer()
            if not isinstance(answer, str) or isinstance(count, bool) or not whole:
                raise UserError(
                    f"`answers` holds {quoted(answer)}: {quoted(count)}. "
                    'Give each answer its number of annotators, such as {"red": 7, "pink": 3}.'
                )
            texts += [answer] * int(count)
    elif isinstance(answers, Sequence) and not isinstance(answers, str):
        for item in answers:
            answer = item.get("answer") if isinstance(item, Mapping) else item
            if not isinstance(answer, str):
                raise UserError(
                    f"`answers` holds {quoted(item)}. "
                    'Write every answer as a string, or as an object with the string "answer".'
                )
            texts.append(answer)
    else:
        raise UserError(f"`answers` is {quoted(answers)}. Make it a list of strings, one an annotator.")
    if not texts:
        raise UserError("`answers` is empty. Give at least one answer to score against.")
    return texts


def vqa_accuracy(prediction: str, answers: Answers) -> float:
    """The official VQA accuracy of one prediction, 0..1.

    Each annotator in turn is left out, the prediction scores min(1, agreeing others / 3), and the mean is
    taken. Texts are normalised only when the annotators do not all give the same answer: against ten times
    "yes", "Yes" scores 0.

    With fewer than ten answers the same formula is taken over those given, so that two equal answers give at
    most 1/3. A single answer would leave nobody to agree with and always score 0; instead, it scores by
    equality after normalisation.

    Raises:
        UserError: as `answer_list`.
    """
    truths = [trim(answer) for answer in answer_list(answers)]
    if len(truths) == 1:
        return float(normalize(prediction) == normalize(truths[0]))
    if len(set(truths)) > 1:
        prediction, truths = normalize(prediction), [normalize(truth) for truth in truths]
    agreeing = truths.count(trim(prediction))
    # Leaving out one who agrees leaves agreeing - 1 of them, else all. Integers make the sum exact.
    thirds = agreeing * min(3, agreeing - 1) + (len(truths) - agreeing) * min(3, agreeing)
    return thirds / (3 * len(truths))


def exact_match(prediction: str, answers: Answers) -> float:
    """1.0 if the prediction equals any of the answers, apart from case and white space at the ends, else 0.0.

    Raises:
        UserError: as `answer_list`.
    """
    wanted = {answer.strip().casefold() for answer in answer_list(answers)}
    return float(prediction.strip().casefold() in wanted)


def commonest_scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the rows would score, in the mean, if all had the answer that is the right one most often: as "common_" and
    the score's name, for the scores that the rows have. A model that has learned anything scores higher."""
    answers = [as_given(row["answers"].items()) or list(row["answers"]) for row in rows]
    tops = Counter(max(row["answers"], key=row["answers"].get).strip() for row in rows)
    text = tops.most_common(1)[0][0] if tops else ""
    scores = {metric: [score(text, each) for each in answers] for metric, score in _OF_TEXTS.items()}
    chosen = [
        option(each[0], _MOST_CHOICES) for row, each in zip(rows, answers, strict=True) if "multiple_choice" in row
    ]
    if chosen:
        letter = Counter(chosen).most_common(1)[0][0]
        scores["multiple_choice"] = [float(one == letter) for one in chosen]
    return {f"common_{metric}": sum(values) / len(values) for metric, values in scores.items() if values}


_OF_TEXTS = {"vqa_accuracy": vqa_accuracy, "exact_match": exact_match}
_MOST_CHOICES = 26


class TypeScore(NamedTuple):
    """The mean score of the questions of one type, 0..1, and how many there are."""

    mean: float
    num_questions: int


def by_type(rows: Iterable[Mapping[str, object]]) -> dict[str, dict[str, TypeScore]]:
    """Mean "score" of the rows for each "question_type" and each "answer_type", the most frequent type first.

    A row that lacks one of the two fields, or the score, is not counted there; a field that no row has is
    left out.
    """
    scores = {field: defaultdict[str, list[float]](list) for field in ("question_type", "answer_type")}
    for row in rows:
        for field, types in scores.items():
            name, value = row.get(field), row.get("score")
            if isinstance(name, str) and isinstance(value, int | float):
                types[name].append(value)
    return {
        field: {
            name: TypeScore(sum(values) / len(values), len(values))
            for name, values in sorted(types.items(), key=lambda item: (-len(item[1]), item[0]))
        }
        for field, types in scores.items()
        if types
    }


def score_file(source: Path, out: Path) -> dict[str, float]:
    """Score a file of predictions, and write it with the scores added.

    Args:
        source: JSON lines with "prediction" and "answers" (any form that `answer_list` takes); blank lines
            are left out.
        out: Each line again with "vqa_accuracy", "exact_match" and "score" (= VQA accuracy). Written whole or
            not at all; may be `source` itself.

    Returns:
        The means "vqa_accuracy" and "exact_match", beside each what the commonest answer alone would score
        ("common_vqa_accuracy"), and "count", the number of lines.

    Raises:
        UserError: for a file or line that cannot be scored, with file, line and remedy.
    """
    if not source.is_file():
        raise UserError(f"{source}: there is no such file. Give the JSON lines that hold the predictions.")
    rows: list[dict] = []
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows += [_score_line(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{source}, line {number}: {error}") from error
    if not rows:
        raise UserError(f"{source}: the file holds no predictions. Give one JSON object a line.")
    write_json_lines(rows, out)
    means = {metric: sum(row[metric] for row in rows) / len(rows) for metric in ("vqa_accuracy", "exact_match")}
    common = commonest_scores([{"answers": Counter(answer_list(row["answers"]))} for row in rows])
    return means | common | {"count": float(len(rows))}


def _score_line(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:  # both malformed JSON and bytes that are not UTF-8
        raise UserError(f"this is not JSON ({error}). Write one JSON object a line, in UTF-8.") from error
    if not isinstance(row, dict):
        raise UserError(f"this is {quoted(row)}, not an object. Write one JSON object a line.")
    if not isinstance(row.get("prediction"), str):
        raise UserError('the string "prediction" is missing. Write the model\'s answer there.')
    if "answers" not in row:
        raise UserError('"answers" is missing. Write the annotators\' answers there, as a list of strings.')
    accuracy, exact = (metric(row["prediction"], row["answers"]) for metric in (vqa_accuracy, exact_match))
    return row | {"vqa_accuracy": accuracy, "exact_match": exact, "score": accuracy}
