"""Answers that name one of a few classes: F1 over classes, the confusion matrix, and POPE's yes and no."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Weights = Float[np.ndarray, "questions"]
"""How often each question counts."""


def named_class(text: str) -> str:
    """The class that an answer names: its text without case, and without a full stop at its end."""
    return text.strip().removesuffix(".").strip().casefold()


def class_numbers(
    predictions: Sequence[str], references: Sequence[str]
) -> tuple[Int[np.ndarray, "questions"], Int[np.ndarray, "questions"]]:
    """The class that each answer names, and the right one, as numbers."""
    predicted, wanted = ([named_class(text) for text in texts] for texts in (predictions, references))
    numbers = {name: number for number, name in enumerate(dict.fromkeys([*wanted, *predicted]))}
    given, true = (np.array([numbers[name] for name in names], dtype=np.int64) for names in (predicted, wanted))
    return given, true


def macro_f1(given: Int[np.ndarray, "questions"], true: Int[np.ndarray, "questions"], weights: Weights) -> float:
    """Mean F1 of the classes that are right for some question, each counting alike. `class_numbers` makes the arguments."""
    size, same = int(max(given.max(), true.max())) + 1, given == true
    named, are = (np.bincount(codes, weights, size) for codes in (given, true))
    both = np.bincount(true[same], weights[same], size)
    return float(np.mean(2 * both[are > 0] / (named + are)[are > 0]))


def confusion(
    predictions: Sequence[str], references: Sequence[str], most: int = 12
) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """The confusion matrix: its columns' names, then each right class with how often each column's class was answered.

    Args:
        most: How many classes have a row of their own, the most frequent ones; all others share the row "other".
    """
    predicted, wanted = ([named_class(text) for text in texts] for texts in (predictions, references))
    kept = [name for name, _ in Counter(wanted).most_common(most)]
    pairs = Counter(
        (true if true in kept else "other", given if given in kept else "other")
        for true, given in zip(wanted, predicted, strict=True)
    )
    columns = [*kept, *(["other"] if any("other" in pair for pair in pairs) else [])]
    rows = [(name, [pairs[name, column] for column in columns]) for name in columns]
    return columns, [(name, counts) for name, counts in rows if any(counts)]


def says_yes(text: str) -> bool:
    """Whether an answer says yes, by POPE's rule: its first sentence holds neither "no" nor "not"."""
    words = text.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def yes_and_no(
    given: Bool[np.ndarray, "questions"], true: Bool[np.ndarray, "questions"], weights: Weights
) -> dict[str, float]:
    """POPE's figures, "yes" being what is looked for (Li et al. 2023, arXiv:2305.10355): F1, accuracy, precision, recall,
    and the share of answers that say yes, which shows a model that agrees with whatever it is asked.

    Args:
        given, true: Whether each answer says yes, and whether it should.
    """
    both, named, are = (float(weights[chosen].sum()) for chosen in (given & true, given, true))
    total = float(weights.sum())
    return {
        "f1": 2 * both / (named + are) if named + are else 0.0,
        "accuracy": float(weights[given == true].sum()) / total,
        "precision": both / named if named else 0.0,
        "recall": both / are if are else 0.0,
        "yes_rate": named / total,
    }
