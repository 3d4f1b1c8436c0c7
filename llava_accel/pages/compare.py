"""Several runs side by side: what they reached, how they differ, and which questions they answer differently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from llava_accel.data.images import Exif
from llava_accel.data.spread import spread
from llava_accel.pages.curves import compared_curves, have_one_loss
from llava_accel.pages.details import differing_environment, differing_keys
from llava_accel.pages.gallery import MOST_CARDS, Question, image_roots, question_fields, verdict
from llava_accel.pages.history import History, Prediction, titles
from llava_accel.pages.html import percent
from llava_accel.pages.outcome import Tile, tiles
from llava_accel.scoring.harmful import Facts, facts
from llava_accel.scoring.metrics import score_title

_RANK = {"right": 2, "partly": 1, "wrong": 0}


@dataclass(frozen=True, kw_only=True)
class ComparedCard(Question):
    """One question with the answers of all runs."""

    replies: list[tuple[str, str]]
    """(prediction, verdict) of each run."""


def comparison(runs: Sequence[History]) -> dict[str, object]:
    """All that the page of several runs shows."""
    names = titles(runs)
    scores = {run.score for run in runs}
    metric = scores.pop() if len(scores) == 1 else None
    cards, num_shared, num_differing = _cards(runs, metric or "exact_match")
    return {
        "titles": names,
        "sentence": _sentence(runs, names, metric),
        "states": [run.status for run in runs],
        "rows": _rows(runs),
        "plots": compared_curves(runs, names),
        "keys": differing_keys(runs),
        "surroundings": differing_environment(runs),
        "cards": cards,
        "num_shared": num_shared,
        "num_differing": num_differing,
    }


def _sentence(runs: Sequence[History], names: Sequence[str], metric: str | None) -> str:
    """Which run is ahead, and by how much; runs that chance alone could put so far apart are equal."""
    key = metric or "loss"
    known = [(run, name) for run, name in zip(runs, names, strict=True) if run.chosen and key in run.chosen["eval"]]
    if len(known) < 2:
        number = f"{len(runs)} runs" if len(runs) > 1 else "One run"
        return f"{number}, of which {len(known) or 'none'} has an evaluation to compare."
    if metric is None and not have_one_loss([run for run, _ in known]):
        return f"{len(runs)} runs without a score in common, and with different losses, which cannot be compared."
    ranked = sorted(known, key=lambda pair: _value(pair[0], key), reverse=metric is not None)
    (first, name), (second, other) = ranked[0], ranked[1]
    margins = [(run, title, _margin(first, run, key)) for run, title in ranked[1:]]
    tied = [each for each in margins if abs(_value(first, key) - _value(each[0], key)) <= each[2]]
    if tied:
        equal = [(first, name), *((run, title) for run, title, _ in tied)]
        return _tie(equal, max(margin for *_, margin in tied), metric)
    if metric is None:
        lowest, next_one = _value(first, key), _value(second, key)
        return f"{name} has the lowest evaluation loss, {lowest:.4f}; {other} follows with {next_one:.4f}."
    ahead = 100 * (_value(first, key) - _value(second, key))
    return f"{name} has the highest {score_title(metric)}, {percent(_value(first, key))}, {ahead:.1f} points above {other}."


def _tie(runs: Sequence[tuple[History, str]], margin: float, metric: str | None) -> str:
    *some, last = (name for _, name in runs)
    values = [_value(run, metric or "loss") for run, _ in runs]
    shown = [f"{value:.4f}" if metric is None else percent(value) for value in values]
    title = score_title(metric) if metric else "evaluation loss"
    equal = f"{', '.join(some)} and {last} are equal"
    if len(set(values)) == 1:
        return f"{equal}: {title} {shown[0]}."
    within = f"{margin:.4f}" if metric is None else f"{100 * margin:.1f} points"
    why = "That is twice the standard error of their difference: more questions would tell them apart"
    return f"{equal} within {within}: {title} {', '.join(shown)}. {why}."


def _value(run: History, key: str) -> float:
    assert run.chosen is not None, "only runs with an evaluation are compared"
    return float(run.chosen["eval"][key])


def _margin(one: History, other: History, key: str) -> float:
    """Twice the standard error of the mean difference over the questions that both answered; 0 where they share none, or
    where questions have no loss of this kind: theirs is that of the answers."""
    if key == "loss" and one.recipe.train.objective != "answers":
        return 0.0
    first, second = (
        {facts(row): float(row[key]) for row in run.predictions(run.chosen["step"]) if row.get(key) is not None}
        for run in (one, other)
        if run.chosen
    )
    differences = [first[question] - second[question] for question in first.keys() & second.keys()]
    return 2 * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def _rows(runs: Sequence[History]) -> list[tuple[str, list[Tile | None]]]:
    """One row for each number that a run's own page has at its top."""
    by_title = [{tile.title: tile for tile in tiles(run)} for run in runs]
    ordered = dict.fromkeys(title for run in sorted(by_title, key=len, reverse=True) for title in run)
    return [(title, [run.get(title) for run in by_title]) for title in ordered]


def _cards(runs: Sequence[History], metric: str) -> tuple[list[ComparedCard], int, int]:
    """Some of the questions that all runs answered and some answered better; how many all answered; how many differ."""
    answered: list[dict[Facts, Prediction]] = []
    for run in runs:
        rows = run.predictions(run.chosen["step"]) if run.chosen else []
        answered.append({facts(row): row for row in rows if metric in row})
    shared = [key for key in answered[0] if all(key in rows for rows in answered[1:])]
    differing = [key for key in shared if len({verdict(rows[key][metric]) for rows in answered}) > 1]
    shown = [differing[place] for place in spread(len(differing), MOST_CARDS)]
    roots = list(dict.fromkeys(root for run in runs for root in image_roots(run.recipe.data)))
    exif = runs[0].recipe.data.exif
    cards = [_card([rows[key] for rows in answered], roots, metric, exif) for key in shown]
    return cards, len(shared), len(differing)


def _card(rows: Sequence[Prediction], roots: list[Path], metric: str, exif: Exif) -> ComparedCard:
    verdicts = [verdict(row[metric]) for row in rows]
    best = max(verdicts, key=_RANK.__getitem__)
    tags = [f"better:{number}" for number, result in enumerate(verdicts) if result == best]
    replies = [(row["prediction"], result) for row, result in zip(rows, verdicts, strict=True)]
    return ComparedCard(**question_fields(rows[0], roots, tags, exif), replies=replies)
