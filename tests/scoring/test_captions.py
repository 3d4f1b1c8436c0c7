"""Scores of captions: a table that the COCO server's own code computed, and values worked out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llava_accel.scoring.captions import bleu_counts, bleu_of, cider, rouge_l

# Computed by pycocoevalcap 1.2, which is the COCO server's code, from these texts divided at spaces.
GOLDEN = json.loads((Path(__file__).parent / "cider_golden.json").read_text())


def test_cider_is_that_of_the_coco_server() -> None:
    found = cider([row["prediction"] for row in GOLDEN], [row["references"] for row in GOLDEN])
    assert found == pytest.approx([row["cider"] for row in GOLDEN], abs=1e-8)
    assert len(GOLDEN) == 12 and min(found) == 0 < 2 < max(found)


def test_cider_ignores_case_and_punctuation_and_is_0_of_nothing() -> None:
    references = [["A red cat.", "One cat, red!"], ["Two dogs run."], ["Nobody is here"]]
    assert cider(["A red cat", "", "x"], references) == cider(["a RED, cat!", "", "x"], references)
    assert cider(["", "two dogs run", ""], references)[::2] == [0.0, 0.0]
    assert cider(["a cat"], [["a cat"]]) == [0.0]  # of one image alone nothing is rare


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("police killed the gunman", ["Police kill the gunman."], 3 / 4),  # Lin 2004, without weights
        ("the gunman kill police", ["police kill the gunman"], 2 / 4),
        ("a b c", ["x", "a c"], 4 / 5),
        ("", ["a"], 0.0),
    ],
)
def test_rouge_l(prediction: str, references: list[str], score: float) -> None:
    assert rouge_l(prediction, references) == pytest.approx(score)


def test_bleu_of_all_texts_is_that_of_their_counts() -> None:
    texts = [("the cat sat on the mat today", ["the cat sat on the mat"]), ("a dog ran far away", ["the dog ran far"])]
    counts = np.sum([bleu_counts(text, references) for text, references in texts], axis=0)
    # n-grams that match, of those there are: 6+3 of 12, 5+2 of 10, 4+1 of 8, 3+0 of 6; longer than the references.
    precisions = (9 / 12, 7 / 10, 5 / 8, 3 / 6)
    assert bleu_of(counts) == pytest.approx(math.exp(sum(map(math.log, precisions)) / 4))
    short = bleu_counts("the cat sat on", ["the cat sat on the mat"])
    assert bleu_of(short) == pytest.approx(math.exp(1 - 6 / 4))  # all match, and the text is too short
