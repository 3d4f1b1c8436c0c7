"""The scores of a set of answers by name: each answer's own, that of the whole with its 95 % interval, and that of the
commonest answer, always given.

Works on texts; `held_out.py` makes the predictions. Higher is better, and 1 is the maximum, except for CIDEr.
"""

import difflib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_accel.data.annotations import LETTERS, option
from llava_accel.data.records import as_given
from llava_accel.exceptions import UserError
from llava_accel.own_code import file_of, is_own, load_own, mended_by_user
from llava_accel.scoring.captions import bleu_counts, bleu_of, cider, rouge_l
from llava_accel.scoring.classes import Weights, class_numbers, macro_f1, says_yes, yes_and_no
from llava_accel.scoring.documents import anls, relaxed_accuracy, token_f1
from llava_accel.scoring.vqa import exact_match, vqa_accuracy
from llava_accel.sources.problems import quoted

Prediction = dict[str, Any]
"""One answered question: "prediction", "answers" (text -> annotators), "image", "num_choices" where it has choices."""
_RESAMPLES = 1000  # of the bootstrap


class Judged(NamedTuple):
    """An answer and what it is compared with."""

    prediction: str
    references: tuple[str, ...]
    """Every annotator's answer, as often as it was given."""
    num_choices: int
    """0 where the question has none."""


@dataclass(frozen=True)
class Measured:
    """The scores of a set of answers by one metric."""

    rows: Sequence[float | None]
    """The score of each answer alone; None where the metric does not apply."""
    whole: Callable[[Weights], Mapping[str, float]]
    """The score of all answers, given how often each counts: "" is the metric itself, other names are further figures."""


class Metric(NamedTuple):
    """A way to score answers."""

    title: str
    measure: Callable[[Sequence[Judged]], Measured | None]
    """None if it applies to no answer."""


def average(score: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[Judged]], Measured | None]:
    """A metric that is the mean of a score of each answer.

    Args:
        score: A function of the answer and the references, see `Judged`; higher is better.
    """

    def measure(answers: Sequence[Judged]) -> Measured | None:
        return mean_of([float(score(each.prediction, each.references)) for each in answers])

    return measure


def mean_of(scores: Sequence[float | None]) -> Measured | None:
    """The mean of the scores that apply; None where none does."""
    counted = np.array([score is not None for score in scores], dtype=bool)
    values = np.array([score or 0.0 for score in scores], dtype=np.float64)
    if not counted.any():
        return None

    def whole(weights: Weights) -> dict[str, float]:
        number = float(weights @ counted)
        return {"": float(weights @ values) / number if number else float("nan")}

    return Measured(scores, whole)


def _multiple_choice(answers: Sequence[Judged]) -> Measured | None:
    def score(each: Judged) -> float | None:
        if not each.num_choices:
            return None
        return float(option(each.prediction, each.num_choices) == option(each.references[0], each.num_choices))

    return mean_of([score(each) for each in answers])


def _classification(answers: Sequence[Judged]) -> Measured:
    given, true = class_numbers([each.prediction for each in answers], [each.references[0] for each in answers])
    return Measured((given == true).astype(np.float64).tolist(), lambda weights: {"": macro_f1(given, true, weights)})


def _pope(answers: Sequence[Judged]) -> Measured:
    given = np.array([says_yes(each.prediction) for each in answers], dtype=bool)
    true = np.array([says_yes(each.references[0]) for each in answers], dtype=bool)

    def whole(weights: Weights) -> dict[str, float]:
        rates = yes_and_no(given, true, weights)
        return {"": rates.pop("f1"), **rates}

    return Measured((given == true).astype(np.float64).tolist(), whole)


def _bleu(answers: Sequence[Judged]) -> Measured:
    counts = np.stack([bleu_counts(each.prediction, each.references) for each in answers])
    return Measured([bleu_of(each) for each in counts], lambda weights: {"": bleu_of(weights @ counts)})


def _cider(answers: Sequence[Judged]) -> Measured | None:
    return mean_of(cider([each.prediction for each in answers], [each.references for each in answers]))


METRICS = {
    "vqa_accuracy": Metric("VQA accuracy", average(vqa_accuracy)),
    "exact_match": Metric("exact match", average(exact_match)),
    "multiple_choice": Metric("multiple choice", _multiple_choice),
    "token_f1": Metric("token F1", average(token_f1)),
    "anls": Metric("ANLS", average(anls)),
    "relaxed_accuracy": Metric("relaxed accuracy", average(relaxed_accuracy)),
    "rouge_l": Metric("ROUGE-L", average(rouge_l)),
    "bleu": Metric("BLEU", _bleu),
    "cider": Metric("CIDEr", _cider),
    "classification": Metric("macro F1", _classification),
    "pope": Metric("POPE F1", _pope),
}
"""Name in a recipe -> metric, in the order of `score_names`."""
PAIR = ("pair_accuracy", "reward_margin")
"""Scores of each pair, whatever the model answers."""


def hardness(prediction: Prediction) -> float | None:
    """How far an answer is from being learned: its loss; of a pair, the reward margin times -1. None where neither is known.

    Each loss of a pair is the higher the lower its margin, while the loss of its chosen answer alone says little.
    """
    margin = prediction.get(PAIR[1])
    return prediction.get("loss") if margin is None else -margin


SCORES = {"pair_accuracy": "pairs right", **{name: metric.title for name, metric in METRICS.items()}} | {
    "pope_accuracy": "POPE accuracy", "pope_precision": "POPE precision", "pope_recall": "POPE recall",
    "pope_yes_rate": "POPE answers that say yes",
}  # fmt: skip
"""Name of a score -> its title."""


def find_metric(name: str) -> Metric:
    """The metric of a recipe's name, which may be a function of the user's: (prediction, references) -> a number.

    Raises:
        UserError: the function cannot be loaded; or, when it is called, it fails or returns something else.
    """
    if not is_own(name):
        return METRICS[name]
    function = load_own("eval.metrics", name)

    def score(prediction: str, references: Sequence[str]) -> float:
        given = f"for {quoted(prediction)} against {quoted(list(references))}"
        with mended_by_user("eval.metrics", file_of(name), of=f", {given}"):
            value = function(prediction, list(references))
        if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            return float(value)
        raise UserError(f"eval.metrics: {name} gives {quoted(value)} {given}. Return a number, higher is better")

    return Metric(score_title(name), average(score))


def score_title(key: str) -> str:
    """The title of a score; one that is not known has its own name."""
    return SCORES.get(key, key.rpartition(":")[2].replace("_", " "))


def score_names(measured: Collection[str]) -> list[str]:
    """The scores among the keys of an evaluation: known ones first, then the user's."""
    beside = ("blind_", "common_", "low_", "high_")
    own = [key for key in measured if is_own(key) and not key.startswith(beside)]
    return [*(key for key in SCORES if key in measured), *sorted(own)]


def main_score(metric: str, measured: Collection[str]) -> str | None:
    """The main score: eval.metric, or if that is the loss, multiple_choice or else the first of `score_names`; None if it
    was not measured."""
    candidates = ("multiple_choice", *score_names(measured)) if metric == "loss" else (metric,)
    return next((score for score in candidates if score in measured), None)


def check_metric(name: str, place: str) -> None:
    """Raise UserError unless there is such a metric."""
    if not is_own(name) and name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise UserError(f"{place}: there is no metric {name!r}. Did you mean {near}? There are {', '.join(METRICS)}")


def judged(row: Mapping[str, Any]) -> Judged:
    """An answer as metrics take it."""
    references = as_given(row["answers"].items()) or list(row["answers"])
    return Judged(row["prediction"], tuple(references), int(row.get("num_choices", 0)))


def measure(rows: Sequence[Prediction], metrics: Iterable[str], *, blind: bool = False) -> dict[str, float]:
    """Score answers, and put each one's own scores into its row.

    Args:
        metrics: Names of metrics.
        blind: The images were blanked.

    Returns:
        Each score of the whole, as "blind_..." with `blind`, without it also "common_...", the score of the answer that is
        most often right, always given; beside each its `intervals`.
    """
    if not rows:
        return {}
    answers = [judged(row) for row in rows]
    once = np.ones(len(rows))
    values: dict[str, float] = {}
    measured: dict[str, Measured] = {}
    for name in metrics:
        metric = find_metric(name)
        if (scored := metric.measure(answers)) is None:
            continue
        key = f"blind_{name}" if blind else name
        measured[key] = scored
        for row, score in zip(rows, scored.rows, strict=True):
            if score is not None:
                row[name] = score
        values |= {f"{key}_{part}" if part else key: value for part, value in scored.whole(once).items()}
        if not blind and (common := metric.measure(_commonest(answers, name))):
            measured[f"common_{name}"] = common
            values[f"common_{name}"] = common.whole(once)[""]
    return values | intervals(measured, images_of(rows))


def intervals(measured: Mapping[str, Measured], images: Sequence[object]) -> dict[str, float]:
    """ "low_..." and "high_..." of each score: the 2.5th and 97.5th percentile over draws, with replacement, of as many
    images as there are.

    Images are drawn, not questions: what is asked of one image is right or wrong together. The draws are always the same.

    Returns:
        Nothing if there is only one image.
    """
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    if len(numbers) < 2 or not measured:
        return {}
    of_image = np.array([numbers[image] for image in images])
    generator, totals = np.random.default_rng(0), np.empty((_RESAMPLES, len(measured)))
    for total in totals:
        draw = generator.integers(len(numbers), size=len(numbers))
        weights = np.bincount(draw, minlength=len(numbers))[of_image].astype(np.float64)
        total[:] = [each.whole(weights)[""] for each in measured.values()]
    # A draw may hold no question that counts, and then has no score.
    ends = np.nanquantile(totals, [0.025, 0.975], axis=0)
    return {
        f"{end}_{name}": float(ends[n, at]) for at, name in enumerate(measured) for n, end in enumerate(("low", "high"))
    }


def images_of(rows: Sequence[Mapping[str, Any]]) -> list[object]:
    """A key for the image of each question; a question without an image has one of its own."""
    images = (row.get("image") for row in rows)
    return [(tuple(each) if isinstance(each, list) else each) or number for number, each in enumerate(images)]


def _commonest(answers: Sequence[Judged], metric: str) -> list[Judged]:
    """The answers, had all been the one that is most often right."""
    if metric == "multiple_choice":
        letters = Counter(option(each.references[0], each.num_choices) for each in answers if each.num_choices)
        text = letters.most_common(1)[0][0] or LETTERS[0]
    else:
        tops = Counter(Counter(each.references).most_common(1)[0][0].strip() for each in answers)
        text = tops.most_common(1)[0][0]
    return [each._replace(prediction=text) for each in answers]


def with_interval(measured: Mapping[str, Any], name: str) -> str:
    """A score in percent, with its `margin`: "61.2 ± 2.1 %"."""
    return f"{100 * measured[name]:.1f}{margin(measured, name)} %"


def margin(measured: Mapping[str, Any], name: str) -> str:
    """Half the width of a score's 95 % interval, " ± 2.1"; empty where it is not known."""
    low, high = (measured.get(f"{end}_{name}") for end in ("low", "high"))
    return "" if low is None or high is None else f" ± {50 * (high - low):.1f}"


def cell(measured: Mapping[str, Any], key: str, *, is_short: bool = False) -> str:
    """One of the values of an evaluation as text: a score as `with_interval`, or without it if it `is_short`, counts and
    losses as numbers; empty if it is not among them."""
    value = measured.get(key)
    if value is None:
        return ""
    if key.startswith("num_"):
        return f"{round(value):,}"
    if key.removeprefix("blind_").removeprefix("common_") in SCORES or is_own(key):
        return f"{100 * value:.1f} %" if is_short else with_interval(measured, key)
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"


class TypeScore(NamedTuple):
    """The mean score of the questions of one type, 0..1, and how many there are."""

    mean: float
    num_questions: int


def by_type(rows: Iterable[Mapping[str, object]]) -> dict[str, dict[str, TypeScore]]:
    """Mean "score" of the rows for each "question_type" and each "answer_type", the most frequent type first.

    A row that lacks one of the two fields, or the score, is not counted there; a field that no row has is
    left out.
    """
    scores = {field: defaultdict[str, list[float]](list) for field in ("question_type", "answer_type")}
    for row in rows:
        for field, types in scores.items():
            name, value = row.get(field), row.get("score")
            if isinstance(name, str) and isinstance(value, int | float):
                types[name].append(value)
    return {
        field: {
            name: TypeScore(sum(values) / len(values), len(values))
            for name, values in sorted(types.items(), key=lambda item: (-len(item[1]), item[0]))
        }
        for field, types in scores.items()
        if types
    }
