"""Scores of your own, for `eval.metrics = ["recipes/my_scores.py:anls_de"]`.

A score is a function of an answer and of the right answers; what it returns is averaged, and higher is better.
"""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

_SPELLINGS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss"})


def anls_de(prediction: str, references: Sequence[str]) -> float:
    """ANLS for German documents: umlauts and their spellings with two letters are the same.

    Args:
        prediction: What the model answered.
        references: Every annotator's answer, as often as it was given.

    Returns:
        From 0 to 1.
    """
    given = prediction.lower().translate(_SPELLINGS)
    wrong = min(Levenshtein.normalized_distance(given, each.lower().translate(_SPELLINGS)) for each in references)
    return 1 - wrong if wrong < 0.5 else 0.0
