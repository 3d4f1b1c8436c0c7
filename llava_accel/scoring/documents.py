"""Scores of answers read off documents and charts: ANLS, relaxed accuracy, and F1 over words, each in 0..1.

If there are several right answers, the best match counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MOST_WRONG = 0.5
"""Share of wrong characters above which an answer counts as another answer, not as a misread one."""
_RELATIVE_ERROR = 0.05


def anls(prediction: str, references: Sequence[str]) -> float:
    """DocVQA's average normalised Levenshtein similarity, of one answer (Biten et al. 2019, arXiv:1905.13648).

    An answer of which exactly half is wrong scores 0.5, as in the official evaluation; by the paper's formula it scores 0.
    """
    given = " ".join(prediction.lower().split())
    wrong = (Levenshtein.normalized_distance(given, " ".join(each.lower().split())) for each in references)
    return max((1 - share if share <= _MOST_WRONG else 0.0) for share in wrong)


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """ChartQA's: numbers may be off by 5 %, texts must be equal apart from case (Masry et al. 2022, arXiv:2203.10244)."""
    return float(any(_is_near(prediction.strip(), each.strip()) for each in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 over words, without articles, punctuation and case (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    return max(_f1(_words(prediction), _words(each)) for each in references)


def _is_near(given: str, wanted: str) -> bool:
    number, target = _number(given), _number(wanted)
    if number is None or not target:  # nothing is within 5 % of zero: it is compared as a text
        return given.lower() == wanted.lower()
    return abs(number - target) <= _RELATIVE_ERROR * abs(target)


def _number(text: str) -> float | None:
    """A number, or a percentage as a share of one; None for other texts."""
    share = 0.01 if text.endswith("%") else 1.0
    try:
        return float(text.rstrip("%")) * share
    except ValueError:
        return None


def _words(text: str) -> Counter[str]:
    return Counter(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total())
