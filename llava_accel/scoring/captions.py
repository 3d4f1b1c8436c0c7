"""Scores of longer texts: ROUGE-L of each one, BLEU and CIDEr-D of all of them together.

Words are what is left when case and punctuation are dropped. The COCO server splits texts with a tokenizer in Java, and
its scores differ in the third digit.
"""

import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rapidfuzz.distance import LCSseq
from sacrebleu.metrics.bleu import BLEU

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of CIDEr-D: the words by which a caption may differ in length
NGram = tuple[str, ...]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, with the nearest of the references (Lin 2004), in 0..1."""
    return max(_common(_words(prediction), _words(each)) for each in references)


def _common(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return 0.0
    return 2 * LCSseq.similarity(given, wanted) / (len(given) + len(wanted))


def bleu_counts(prediction: str, references: Sequence[str]) -> Float[np.ndarray, "counts"]:
    """The counts that a text adds for BLEU: n-grams of 1 to 4 words that a reference has, n-grams in all, and the lengths
    of the text and of the nearest reference."""
    statistics = BLEU(effective_order=True).sentence_score(prediction, list(references))
    return np.array([*statistics.counts, *statistics.totals, statistics.sys_len, statistics.ref_len], dtype=np.float64)


def bleu_of(counts: Float[np.ndarray, "counts"]) -> float:
    """BLEU of all texts whose counts were added up, in 0..1, as sacrebleu computes it (Post 2018, arXiv:1804.08771)."""
    whole = [round(count) for count in counts]
    return BLEU.compute_bleu(whole[:_LONGEST], whole[_LONGEST:-2], whole[-2], whole[-1]).score / 100


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each text, from 0; 1 is a good caption, and the most is 10 (Vedantam et al. 2015, arXiv:1411.5726).

    An n-gram counts more, the fewer images have it in a reference: the score of a text depends on the others that are
    scored with it.
    """
    wanted = [[_n_grams(each) for each in texts] for texts in references]
    log_number = math.log(max(len(wanted), 1))
    rarity: defaultdict[NGram, float] = defaultdict(lambda: log_number)
    for gram, number in Counter(gram for texts in wanted for gram in {gram for each in texts for gram in each}).items():
        rarity[gram] = log_number - math.log(number)
    return [
        10 * mean(_similarity(_weighed(_n_grams(given), rarity), _weighed(each, rarity)) for each in texts)
        for given, texts in zip(predictions, wanted, strict=True)
    ]


class _Weighed(NamedTuple):
    """The n-grams of a text by their length, how often each occurs times how rare it is."""

    values: list[dict[NGram, float]]
    norms: list[float]
    num_pairs: int


def _weighed(grams: Counter[NGram], rarity: Mapping[NGram, float]) -> _Weighed:
    values: list[dict[NGram, float]] = [{} for _ in range(_LONGEST)]
    for gram, number in grams.items():
        values[len(gram) - 1][gram] = number * rarity[gram]
    norms = [math.hypot(*each.values()) for each in values]
    return _Weighed(values, norms, sum(number for gram, number in grams.items() if len(gram) == 2))


def _similarity(given: _Weighed, wanted: _Weighed) -> float:
    """Mean cosine of both, over the lengths of n-grams, each n-gram clipped to how often the reference has it; lower where
    the texts differ in length."""
    cosines = [
        sum(min(value, other[gram]) * other[gram] for gram, value in one.items() if gram in other) / norm
        for one, other, norm in zip(
            given.values, wanted.values, map(operator.mul, given.norms, wanted.norms), strict=True
        )
        if norm
    ]
    return sum(cosines) / _LONGEST * math.exp(-((given.num_pairs - wanted.num_pairs) ** 2) / (2 * _SIGMA**2))


def _n_grams(text: str) -> Counter[NGram]:
    words = _words(text)
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, _LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
