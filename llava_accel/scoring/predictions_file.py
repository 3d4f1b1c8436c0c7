"""Scores a file of predictions, wherever they were made, without a model."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_accel.exceptions import UserError
from llava_accel.recipe.tables import USUAL_METRICS
from llava_accel.scoring.metrics import Prediction, measure
from llava_accel.scoring.vqa import answer_list
from llava_accel.sources.problems import quoted
from llava_accel.storage.jsonl import write_json_lines


def score_file(source: Path, out: Path, metrics: Sequence[str] = USUAL_METRICS) -> dict[str, float]:
    """Score a file of predictions, and write it with the scores added.

    Args:
        source: JSON lines with "prediction" and "answers" (any form that `answer_list` takes), and optionally "image" and
            "choices"; blank lines are left out.
        out: Each line again with its scores, and the first of them as "score". Written whole or not at all; may be
            `source` itself.
        metrics: Names of metrics.

    Returns:
        What `metrics.measure` returns, and "count", the number of lines.

    Raises:
        UserError: for a file or line that cannot be scored, with file, line and remedy.
    """
    if not source.is_file():
        raise UserError(f"{source}: there is no such file. Give the JSON lines that hold the predictions.")
    rows: list[dict[str, Any]] = []
    judged: list[Prediction] = []
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_read(line))
                judged.append(_judged(rows[-1]))
            except ValueError as error:
                raise UserError(f"{source}, line {number}: {error}") from error
    if not rows:
        raise UserError(f"{source}: the file holds no predictions. Give one JSON object a line.")
    measured = measure(judged, metrics)
    write_json_lines([row | _scores(each, metrics) for row, each in zip(rows, judged, strict=True)], out)
    return measured | {"count": float(len(rows))}


def _read(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed JSON, bytes that are not UTF-8, too many brackets
        raise UserError(f"this is not JSON ({error}). Write one JSON object a line, in UTF-8.") from error
    if not isinstance(row, dict):
        raise UserError(f"this is {quoted(row)}, not an object. Write one JSON object a line.")
    if not isinstance(row.get("prediction"), str):
        raise UserError('the string "prediction" is missing. Write the model\'s answer there.')
    if "answers" not in row:
        raise UserError('"answers" is missing. Write the annotators\' answers there, as a list of strings.')
    return row


def _judged(row: dict[str, Any]) -> Prediction:
    """The parts of a line that metrics need."""
    choices = row.get("choices")
    return {
        "prediction": row["prediction"],
        "answers": Counter(answer_list(row["answers"])),
        "image": row.get("image"),
        "num_choices": len(choices) if isinstance(choices, list) else 0,
    }


def _scores(row: Prediction, metrics: Sequence[str]) -> dict[str, float]:
    of_row = {name: row[name] for name in metrics if name in row}
    return of_row | {"score": next(iter(of_row.values()), 0.0)}
