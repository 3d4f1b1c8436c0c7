"""Which evaluation is better, and when a run has begun to overfit: decided from the lines of metrics.jsonl alone.

So a resumed run, a report and the run itself come to the same answer.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_accel.exceptions import UserError
from llava_accel.storage.jsonl import read_json_lines

Line = Mapping[str, Any]
"""One line of metrics.jsonl: about training, or about an evaluation if it has "eval"."""

_DEFAULT_PATIENCE = 3
"""Evaluations that the note waits for in a run that never stops early: one or two may rise by chance."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; the last one of a run that was killed may be cut off, and is left out."""
    lines = read_json_lines(path, may_be_damaged=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{path}: line {number} was not written by a run. Name the folder of a run")
    return lines


def is_better(metric: str, value: float, other: float | None) -> bool:
    """Whether an evaluation with `value` gains on one with `other`; a value that is not a number never does."""
    if math.isnan(value):
        return False
    return other is None or (value < other if metric == "loss" else value > other)


def best_evaluation(lines: Sequence[Line], metric: str) -> Line | None:
    """The evaluation that `best/` comes from: the best one, the first of equals; the base's (step 0) does not count."""
    best: Line | None = None
    for line in lines:
        if line["step"] == 0 or metric not in line.get("eval", {}):
            continue
        if is_better(metric, line["eval"][metric], best["eval"][metric] if best else None):
            best = line
    return best


def is_out_of_patience(lines: Sequence[Line], metric: str, patience: int) -> bool:
    """Whether as many evaluations as `patience` (0: never) have come since the best one."""
    steps = [line["step"] for line in lines if line["step"] > 0 and metric in line.get("eval", {})]
    best = best_evaluation(lines, metric)
    return 0 < patience <= sum(step > (best["step"] if best else 0) for step in steps)


def overfitting(lines: Sequence[Line], patience: int) -> str | None:
    """A sentence about overfitting, or None if the lines so far show none.

    They show it when each of the last `patience` evaluations (0: three) lies above the lowest before them, the last one
    above the first of them, and training loss, averaged from one evaluation to the next, has fallen since the lowest.
    """
    patience = patience or _DEFAULT_PATIENCE
    losses = [(line["step"], line["eval"]["loss"]) for line in lines if "loss" in line.get("eval", {})]
    if len(losses) <= patience or any(not math.isfinite(loss) for _, loss in losses):
        return None
    lowest_step, lowest = min(losses, key=lambda pair: pair[1])
    later = [pair for pair in losses if pair[0] > lowest_step]
    if len(later) < patience or later[-1][1] < later[-patience][1] or later[-1][1] <= lowest:
        return None
    steps = [step for step, _ in losses]
    number = max(1, steps.index(lowest_step))  # no training comes before the base: the first interval is used
    then = _training_loss(lines, steps[number - 1], steps[number])
    now = _training_loss(lines, steps[-2], steps[-1])
    if then is None or now is None or not now < then:
        return None
    since = f"step {lowest_step:,}" if lowest_step else "the start"
    return (
        f"overfitting: evaluation loss has risen since {since}, from {lowest:.4f} to {losses[-1][1]:.4f} over "
        f"{len(later)} evaluations, while training loss fell from {then:.4f} to {now:.4f}. More data, fewer epochs or a "
        "lower learning rate help; eval.patience stops such a run"
    )


def _training_loss(lines: Sequence[Line], after: int, until: int) -> float | None:
    """Mean loss per target of the steps in (after, until]; None where no line falls into them."""
    pairs = [(line["loss"], line["num_targets"]) for line in lines if "loss" in line and after < line["step"] <= until]
    total = sum(count for _, count in pairs)
    return sum(loss * count for loss, count in pairs) / total if total else None
