"""Short answers to questions: the VQA organisers' normalisation and accuracy, and exact match.

Scores lie in 0..1. The official evaluator prints percentages; apart from that factor, `vqa_accuracy` gives its numbers.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_accel.data.annotations import MOST_ANSWERS
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import quoted

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
            left = MOST_ANSWERS - len(texts)
            whole = isinstance(count, int | float) and 1 <= count <= left and float(count).is_integer()
            if not isinstance(answer, str) or isinstance(count, bool) or not whole:
                raise UserError(
                    f"`answers` holds {quoted(answer)}: {quoted(count)}. Give each answer its number of annotators, such as "
                    f'{{"red": 7, "pink": 3}}, at most {MOST_ANSWERS:,} in all.'
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
