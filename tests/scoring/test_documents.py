"""Scores of documents and charts, on values worked out by hand from the rules of their papers."""

import pytest

from llava_accel.scoring.documents import anls, relaxed_accuracy, token_f1


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("Harvard University", ["harvard  university"], 1.0),
        ("Havard University", ["Harvard University"], 1 - 1 / 18),
        ("12.3.1997", ["12.3.1998", "March 12"], 1 - 1 / 9),  # the nearest counts
        ("abcd", ["abxy"], 0.5),  # as in the official evaluation
        ("abcde", ["abxyz"], 0.0),  # more than half of it wrong is another answer
        ("abcde", ["abxye"], 1 - 2 / 5),
        ("", ["x"], 0.0),
    ],
)
def test_anls(prediction: str, references: list[str], score: float) -> None:
    assert anls(prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("95", "100", 1.0), ("94.9", "100", 0.0), ("-105", "-100", 1.0), ("105.1", "100", 0.0),
        ("52%", "0.5", 1.0), ("52%", "50%", 1.0), ("52", "50%", 0.0),
        ("0", "0", 1.0), ("0.0", "0", 0.0), ("0.01", "0", 0.0),
        ("Germany", "germany", 1.0), ("Germany.", "Germany", 0.0), ("2009", "2010", 1.0), ("yes", "3", 0.0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction: str, reference: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [reference]) == score
    assert relaxed_accuracy(prediction, ["nothing like it", reference]) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("The Eiffel tower.", ["eiffel tower"], 1.0),
        ("in Paris", ["Paris"], 2 / 3),
        ("red red blue", ["red blue blue"], 4 / 6),  # a word counts as often as both have it
        ("London", ["Paris", "London, England"], 2 / 3),
        ("the", ["an"], 1.0),  # nothing is left of either
        ("the", ["cat"], 0.0),
    ],
)
def test_token_f1(prediction: str, references: list[str], score: float) -> None:
    assert token_f1(prediction, references) == pytest.approx(score)
