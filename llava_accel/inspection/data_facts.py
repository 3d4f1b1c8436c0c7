"""The records that `check` has read of data.train or data.eval, and facts that follow without reading them again."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from llava_accel.data.corpus import Corpus
from llava_accel.data.survey import Survey
from llava_accel.model.processing import Processing
from llava_accel.setup.datasets import common_answers

_MOST_ANSWERS = 5
_LONG_ANSWER = 1 << 10  # characters that are kept of one
_MOST_BINS = 10
_WIDE = 8  # highest / lowest length from which on each bin is twice as wide as the one before
_EXAMPLES = 3  # of each kind of error


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The records of data.train or data.eval."""

    name: str
    """data.train or data.eval."""
    corpus: Corpus
    survey: Survey
    processing: Processing | None
    """None if nothing could be tokenised: then lengths and targets mean nothing."""
    repeated: dict[int, int]
    """Usable row -> the first usable one of the same file and id."""
    notes: list[str] = field(default_factory=list)

    @property
    def num_different(self) -> int:
        """Different images, by the content of their files."""
        return len(np.unique(self.survey.contents[:, 1]))


@dataclass(frozen=True, slots=True)
class Share:
    """How often something occurs."""

    name: str
    count: int
    share: float


def numbers(checked: Checked) -> dict[str, str]:
    """Counts and lengths by name, without the errors."""
    survey = checked.survey
    shown, tiles = int(survey.num_images.sum()), int(survey.num_tiles.sum())
    rows = {
        "records": f"{len(survey.lengths):,}",
        "usable": f"{len(survey.usable):,}",
        "images": f"{shown:,} shown, {checked.num_different:,} different" if shown else "0",
        **({"tiles of images shown": f"{tiles:,}"} if tiles > shown else {}),
        "turns": f"{int(survey.num_turns.sum()):,}",
        "turns dropped to fit": f"{survey.num_dropped_turns:,}",
        "targets": f"{int(survey.num_targets.sum()):,}" if checked.processing else "not tokenised",
    }
    lengths = survey.lengths[survey.usable]
    if len(lengths) and checked.processing:
        quantiles = np.quantile(lengths, (0.0, 0.5, 0.95, 1.0)).astype(int)
        rows["tokens: least, median, 95 %, most"] = ", ".join(f"{quantile:,}" for quantile in quantiles)
    if checked.repeated:
        rows["usable, with the id of another"] = f"{len(checked.repeated):,}"
    return rows


def examples_of_errors(checked: Checked) -> dict[str, tuple[int, list[str]]]:
    """Kind of error -> how many records have it, and the messages of the first few; the most frequent kind first."""
    kinds: dict[str, tuple[int, list[str]]] = {
        kind: (n, []) for kind, n in checked.survey.errors_by_kind().most_common()
    }
    for error in checked.survey.errors.values():
        messages = kinds[error.kind][1]
        if len(messages) < _EXAMPLES:
            messages.append(str(error))
    return kinds


def answer_shares(checked: Checked) -> tuple[int, list[Share]]:
    """How many different answers the records end in, and the most frequent ones."""
    usable = checked.survey.usable
    number, counted = common_answers(checked.corpus, checked.survey, usable, _MOST_ANSWERS)
    return number, [Share(text[:_LONG_ANSWER], count, count / len(usable)) for text, count in counted]


def length_shares(lengths: Int[np.ndarray, "usable"]) -> list[Share]:
    """A histogram: "12 to 63" and how many records have that many tokens."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    starts = _doubling(low, high) if high >= _WIDE * low else _even(low, high)
    counts = np.histogram(lengths, bins=[*starts, high + 1])[0].tolist()
    ends = [start - 1 for start in starts[1:]] + [high]
    return [
        Share(f"{start:,} to {end:,}" if end > start else f"{start:,}", count, count / len(lengths))
        for start, end, count in zip(starts, ends, counts, strict=True)
    ]


def _even(low: int, high: int) -> list[int]:
    """The starts of bins of one round width."""
    width = next(w for power in range(10) for w in (10**power, 2 * 10**power, 5 * 10**power) if high - low < 9 * w)
    return [low, *range((low // width + 1) * width, high + 1, width)]


def _doubling(low: int, high: int) -> list[int]:
    starts = [low]
    edge = 1 << low.bit_length()
    while edge <= high:
        starts.append(edge)
        edge *= 2
    return [starts[0], *starts[1:][-(_MOST_BINS - 1) :]]
