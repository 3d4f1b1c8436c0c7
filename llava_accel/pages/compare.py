"""Several runs side by side: what they reached, how they differ, and which questions they answer differently."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_accel.data.images import Exif
from llava_accel.pages.curves import compared_curves, score_title
from llava_accel.pages.details import differing_environment, differing_keys
from llava_accel.pages.gallery import MOST_CARDS, Question, image_roots, question_fields, question_key, verdict
from llava_accel.pages.history import History, Prediction, titles
from llava_accel.pages.outcome import Tile, tiles

_RANK = {"right": 2, "partly": 1, "wrong": 0}


@dataclass(frozen=True, kw_only=True)
class ComparedCard(Question):
    """One question with the answers of all runs."""

    replies: list[tuple[str, str]]
    """(prediction, verdict) of each run."""


def comparison(runs: Sequence[History]) -> dict[str, object]:
    """What the page of several runs shows."""
    names = titles(runs)
    scores = {run.score for run in runs}
    metric = scores.pop() if len(scores) == 1 else None
    cards, num_shared, num_differing = _cards(runs, metric or "exact_match")
    return {
        "titles": names,
        "sentence": _sentence(runs, names, metric),
        "rows": _rows(runs),
        "plots": compared_curves(runs, names),
        "keys": differing_keys(runs),
        "surroundings": differing_environment(runs),
        "cards": cards,
        "num_shared": num_shared,
        "num_differing": num_differing,
    }


def _sentence(runs: Sequence[History], names: Sequence[str], metric: str | None) -> str:
    key = metric or "loss"
    chosen = [(run.chosen, name) for run, name in zip(runs, names, strict=True) if run.chosen]
    values = [(line["eval"][key], name) for line, name in chosen if key in line["eval"]]
    if len(values) < 2:
        return f"{len(runs)} runs, of which {len(values) or 'none'} has an evaluation to compare."
    ranked = sorted(values, reverse=metric is not None)
    (first, name), (second, other) = ranked[0], ranked[1]
    if metric is None:
        return f"{name} has the lowest evaluation loss, {first:.4f}; {other} follows with {second:.4f}."
    if first == second:
        return f"{name} and {other} reach the same {score_title(metric)}, {100 * first:.1f} %."
    return (
        f"{name} has the highest {score_title(metric)}, {100 * first:.1f} %, "
        f"{100 * (first - second):.1f} points above {other}."
    )


def _rows(runs: Sequence[History]) -> list[tuple[str, list[Tile | None]]]:
    """One row for each number that a run's own page has at its top."""
    by_title = [{tile.title: tile for tile in tiles(run)} for run in runs]
    ordered = dict.fromkeys(title for run in sorted(by_title, key=len, reverse=True) for title in run)
    return [(title, [run.get(title) for run in by_title]) for title in ordered]


def _cards(runs: Sequence[History], metric: str) -> tuple[list[ComparedCard], int, int]:
    """Some of the questions that all runs answered and some answered better; how many all answered; how many differ."""
    answered: list[dict[str, Prediction]] = []
    for run in runs:
        rows = run.predictions(run.chosen["step"]) if run.chosen else []
        answered.append({question_key(row): row for row in rows if metric in row})
    shared = [key for key in answered[0] if all(key in rows for rows in answered[1:])]
    differing = [key for key in shared if len({verdict(rows[key][metric]) for rows in answered}) > 1]
    # Every so many of them, so that the whole of the data is seen.
    shown = differing[:: max(1, len(differing) // MOST_CARDS)][:MOST_CARDS]
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
