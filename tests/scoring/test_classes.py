"""Scores of classes, worked out by hand."""

import numpy as np
import pytest

from llava_accel.scoring.classes import class_numbers, confusion, macro_f1, says_yes, yes_and_no

TRUE = ["cat", "cat", "cat", "dog", "dog", "fox"]
GIVEN = ["Cat.", "cat", "dog", "dog", "bird", " cat "]


def test_each_class_counts_alike_and_what_is_no_class_counts_against_the_right_one() -> None:
    given, true = class_numbers(GIVEN, TRUE)
    # cat: 2 right, 3 said, 3 are. dog: 1 right, 2 said, 2 are. fox: none.
    assert macro_f1(given, true, np.ones(6)) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    # Without the fox, and each dog twice: cat 2 of 2 said and 3; dog 2 right, 3 said, 4 are.
    assert macro_f1(given, true, np.array([1.0, 1, 1, 2, 2, 0])) == pytest.approx((4 / 5 + 4 / 7) / 2)


def test_who_is_taken_for_whom() -> None:
    assert confusion(GIVEN, TRUE) == (
        ["cat", "dog", "fox", "other"],
        [("cat", [2, 1, 0, 0]), ("dog", [0, 1, 0, 1]), ("fox", [1, 0, 0, 0])],
    )
    columns, rows = confusion(GIVEN, TRUE, most=1)
    assert columns == ["cat", "other"] and rows == [("cat", [2, 1]), ("other", [1, 2])]
    assert confusion(["a"], ["a"]) == (["a"], [("a", [1])])


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        ("Yes, there is.", True), ("yes", True), ("No", False), ("no, there is none", False), ("There is not", False),
        ("I see one. No doubt", True), ("Nobody", True), ("", True),
    ],
)  # fmt: skip
def test_yes_is_what_holds_no_no(text: str, is_yes: bool) -> None:
    assert says_yes(text) == is_yes


def test_popes_figures() -> None:
    true = np.array([True, True, True, False, False])
    given = np.array([True, True, False, True, False])
    found = yes_and_no(given, true, np.ones(5))
    assert found == pytest.approx(
        {"f1": 4 / 6, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "yes_rate": 3 / 5}
    )
    nobody = yes_and_no(np.array([False]), np.array([False]), np.ones(1))
    assert nobody == {"f1": 0.0, "accuracy": 1.0, "precision": 0.0, "recall": 0.0, "yes_rate": 0.0}
