"""Scores are the official evaluator's: a table that it computed, and its rules stated again."""

import json
import random
import re
from pathlib import Path

import pytest

from llava_accel.exceptions import UserError
from llava_accel.scoring.vqa import (
    CONTRACTIONS,
    answer_list,
    exact_match,
    normalize,
    vqa_accuracy,
)

# [rule, {answer: annotators}, prediction, accuracy]: the last computed by the official evaluator, 6 decimals.
GOLDEN = json.loads((Path(__file__).parent / "vqa_accuracy_golden.json").read_text(encoding="utf-8"))
RULES = sorted({row[0] for row in GOLDEN})


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_scores_as_the_official_evaluator(rule: str) -> None:
    rows = [row for row in GOLDEN if row[0] == rule]
    assert rows
    wrong = [row for row in rows if vqa_accuracy(row[2], row[1]) != pytest.approx(row[3], abs=1e-6)]
    assert not wrong


def test_the_golden_table_reaches_every_rule_and_every_contraction() -> None:
    assert len(GOLDEN) >= 600 and len(RULES) == 12
    scored = {answer for rule, answers, *_ in GOLDEN for answer in answers if rule == "contraction"}
    assert set(CONTRACTIONS) <= scored and len(CONTRACTIONS) == 120
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= {row[3] for row in GOLDEN}


def _restated(prediction: str, answers: list[str]) -> float:
    """The rules once more, step by step with nothing folded; only the contractions are shared."""
    number_words = "none zero one two three four five six seven eight nine".split()
    digits: dict[str, str] = dict(zip(number_words, "00123456789", strict=True))
    digits["ten"] = "10"

    def clean(text: str) -> str:
        pattern = re.compile(r"(\d)(\,)(\d)")
        for mark in [*';/[]"{}()=+', "\\", *"_-><@`,?!"]:
            alone = mark + " " in original[text] or " " + mark in original[text]
            working[text] = working[text].replace(mark, "" if alone or pattern.search(original[text]) else " ")
        spoken = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", working[text], count=32).lower().split()
        kept = [digits.get(word, word) for word in spoken if word not in ("a", "an", "the")]
        return " ".join(CONTRACTIONS[word] if word in CONTRACTIONS else word for word in kept)

    prediction, *answers = [text.replace("\n", " ").replace("\t", " ").strip() for text in [prediction, *answers]]
    original = {text: text for text in [prediction, *answers]}
    working = dict(original)
    if any(answer != answers[0] for answer in answers):
        cleaned = {text: clean(text) for text in original}
        prediction, answers = cleaned[prediction], [cleaned[answer] for answer in answers]
    scores = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        scores.append(min(1.0, sum(other == prediction for other in others) / 3))
    return sum(scores) / len(scores)


def test_a_second_statement_of_the_rules_agrees_on_generated_answers() -> None:
    rng = random.Random(0)
    words = [
        *CONTRACTIONS,
        *CONTRACTIONS.values(),
        *"The a AN one None TEN 3.5 5. .5 1,000 St. u.s.a. t-shirt".split(),
    ]
    words += [*"café ÉCOLE 東京 ٣,٤ x&y 5:30 it's ½ yes no red zero".split(), "." * 35]
    joints = [
        " ",
        " ",
        "  ",
        "\n",
        "\t",
        "",
        "-",
        ", ",
        ",",
        ". ",
        ".",
        "/",
        " / ",
        "\u00a0",
        "'",
        ":",
        "(",
        ") ",
    ]

    def text() -> str:
        parts = [rng.choice(words) + rng.choice(joints) for _ in range(rng.randint(0, 3))]
        return rng.choice(["", "", "", " ", "!"]) + "".join(parts)

    def variant(base: str) -> str:
        changed = [
            base,
            base,
            base.upper(),
            f"the {base}",
            f"{base}.",
            base.replace("'", ""),
            base.replace("-", " "),
        ]
        return rng.choice(changed) if rng.random() < 0.7 else text()

    partial = 0
    for _ in range(1200):
        base = text()
        count = rng.choice([2, 3, 10, 10])
        answers = [base] * count if rng.random() < 0.1 else [variant(base) for _ in range(count)]
        prediction = variant(base)
        expected = _restated(prediction, answers)
        assert vqa_accuracy(prediction, answers) == pytest.approx(expected, abs=1e-9), (prediction, answers)
        partial += 0.0 < expected < 1.0
    assert partial > 100


def test_a_single_answer_scores_by_equality_after_normalisation() -> None:
    assert vqa_accuracy("Two.", ["2"]) == 1.0
    assert vqa_accuracy("the dog", {"dog": 1}) == 1.0
    assert vqa_accuracy("dog", ["cat"]) == 0.0


def test_normalisation_keeps_what_the_official_one_keeps() -> None:
    assert normalize(" The dog's 2.5 & 5:30,\n") == "dog's 2.5 & 5:30"


@pytest.mark.parametrize(
    "answers",
    [
        ["red", "red", "pink"],
        {"red": 2, "pink": 1},
        {"red": 2.0, "pink": 1.0},
        [{"answer": "red", "answer_id": 1}] * 2 + [{"answer": "pink"}],
    ],
)
def test_answers_may_come_in_all_forms(answers: object) -> None:
    assert answer_list(answers) == ["red", "red", "pink"]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], "is empty"),
        ({}, "is empty"),
        ("red", "a list of strings"),
        (None, "a list of strings"),
        ([1, 2], "as a string"),
        ([{"text": "red"}], "as an object"),
        ({"red": 0}, "number of annotators"),
        ({"red": True}, "number of annotators"),
        ({"red": 1.5}, "number of annotators"),
        ({"red": float("nan")}, "number of annotators"),
        ({"red": float("inf")}, "number of annotators"),
    ],
)
def test_unusable_answers_are_refused_with_the_remedy(answers: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        answer_list(answers)


def test_exact_match_looks_past_case_and_outer_space_only() -> None:
    assert exact_match(" STRASSE\n", ["Straße", "road"]) == 1.0
    assert exact_match("the road", ["road"]) == 0.0
    assert exact_match("road.", ["road"]) == 0.0


def test_an_article_counts_for_exact_match_alone() -> None:
    answers = ["red", "red", "Pink"]
    assert vqa_accuracy("the red", answers) == pytest.approx(4 / 9)
    assert exact_match("the red", answers) == 0.0
    assert exact_match("pink", answers) == 1.0


@pytest.mark.parametrize("answers", [{"red": 1e300}, {"red": 9_999, "pink": 2}, {str(n): 9_000 for n in range(2)}])
def test_counts_that_would_fill_the_memory_are_refused(answers: dict[str, float]) -> None:
    with pytest.raises(UserError, match="at most 10,000 in all"):
        answer_list(answers)
