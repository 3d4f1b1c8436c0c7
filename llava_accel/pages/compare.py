"""Several runs side by side: what they reached, how they differ, and which questions they answer differently."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_accel.pages import details
from llava_accel.pages.curves import compared_curves, score_title
from llava_accel.pages.gallery import (
    MOST_CARDS,
    GalleryImage,
    image_roots,
    question_key,
    ranked_answers,
    show,
    verdict,
)
from llava_accel.pages.history import History, Prediction, titles
from llava_accel.pages.outcome import Tile, tiles


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one run answered."""

    run: int
    prediction: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class ComparedCard:
    """One question with the answers of all runs."""

    id: str
    question: str
    answers: list[tuple[str, float]]
    runs: list[Answer]
    types: dict[str, str]
    images: list[GalleryImage]
    tags: list[str]


def comparison(runs: Sequence[History]) -> dict[str, object]:
    """What the page of several runs shows."""
    names = titles(runs)
    scores = {run.score for run in runs}
    metric = scores.pop() if len(scores) == 1 else None
    found, num_shared, num_differing = _cards(runs, metric or "exact_match")
    return {
        "runs": runs,
        "titles": names,
        "sentence": _sentence(runs, names, metric),
        "rows": _rows(runs),
        "plots": compared_curves(runs, names),
        "keys": details.differing_keys(runs),
        "surroundings": _differing_environment(runs),
        "cards": found,
        "num_shared": num_shared,
        "num_differing": num_differing,
        "score_title": score_title(metric or "exact_match"),
    }


def _sentence(runs: Sequence[History], names: Sequence[str], metric: str | None) -> str:
    key = metric or "loss"
    values = [
        (run.chosen["eval"][key], name)
        for run, name in zip(runs, names, strict=True)
        if run.chosen and key in run.chosen["eval"]
    ]
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
    found = [{tile.title: tile for tile in tiles(run)} for run in runs]
    ordered = dict.fromkeys(title for run in sorted(found, key=len, reverse=True) for title in run)
    return [(title, [run.get(title) for run in found]) for title in ordered]


def _differing_environment(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    found = [dict(details.environment_rows(run)) for run in runs]
    names = dict.fromkeys(name for run in found for name in run)
    rows = [(name, [run.get(name, "not installed or unknown") for run in found]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _cards(runs: Sequence[History], metric: str) -> tuple[list[ComparedCard], int, int]:
    """Questions that all runs answered, those first that they answered differently well; and how many there are."""
    answered: list[dict[str, Prediction]] = []
    for run in runs:
        rows = run.predictions(run.chosen["step"]) if run.chosen else []
        answered.append({question_key(row): row for row in rows if metric in row})
    shared = [key for key in answered[0] if all(key in rows for rows in answered[1:])]
    differing = [key for key in shared if len({verdict(float(rows[key][metric])) for rows in answered}) > 1]
    # Every so many of them, so that the whole of the data is seen.
    shown = differing[:: max(1, len(differing) // MOST_CARDS)][:MOST_CARDS]
    roots = list(dict.fromkeys(root for run in runs for root in image_roots(run.recipe.data)))
    return [_card(key, answered, roots, metric) for key in shown], len(shared), len(differing)


def _card(key: str, answered: Sequence[dict[str, Prediction]], roots: list[Path], metric: str) -> ComparedCard:
    row = answered[0][key]
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    results = [verdict(float(rows[key][metric])) for rows in answered]
    best = {"right": 2, "partly": 1, "wrong": 0}
    top = max(best[result] for result in results)
    types = {name: str(row[name]) for name in ("answer_type", "question_type") if row.get(name)}
    tags = [f"better:{number}" for number, result in enumerate(results) if best[result] == top]
    return ComparedCard(
        id=str(row["id"]),
        question=row["question"],
        answers=ranked_answers(row),
        runs=[
            Answer(run=number, prediction=rows[key]["prediction"], verdict=result)
            for number, (rows, result) in enumerate(zip(answered, results, strict=True))
        ],
        types=types,
        images=[show(name, roots) for name in names],
        tags=[*tags, *(f"{kind}:{value}" for kind, value in types.items())],
    )
