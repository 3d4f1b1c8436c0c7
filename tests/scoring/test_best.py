"""The best evaluation, and when a run is said to overfit."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_accel.scoring.best import best_evaluation, overfitting, read_lines

Lines = list[dict[str, Any]]


def lines(evaluations: Sequence[float], training: Sequence[float], start: float | None = None) -> Lines:
    """Metric lines of a run that is evaluated every tenth step; `training` is the loss from one to the next."""
    found: Lines = [] if start is None else [{"step": 0, "eval": {"loss": start}}]
    for number, (evaluation, loss) in enumerate(zip(evaluations, training, strict=True)):
        found += [{"step": 10 * number + step, "loss": loss, "num_targets": 5} for step in range(1, 11)]
        found.append({"step": 10 * number + 10, "eval": {"loss": evaluation}})
    return found


def first_note(evaluations: Sequence[float], training: Sequence[float], patience: int = 0) -> int | None:
    """The number of evaluations after which the note is there for the first time."""
    found = lines(evaluations, training)
    for number, line in enumerate(found):
        if "eval" in line and overfitting(found[: number + 1], patience):
            return line["step"] // 10
    return None


FALLING = [2.0, 1.5, 1.2, 1.0, 0.9, 0.8]


@pytest.mark.parametrize(("patience", "evaluation"), [(0, 5), (3, 5), (2, 4), (1, 3), (4, 6)])
def test_the_note_comes_after_as_many_rising_evaluations_as_there_is_patience(patience: int, evaluation: int) -> None:
    assert first_note([2.0, 1.8, 1.9, 2.0, 2.1, 2.2], FALLING, patience) == evaluation


@pytest.mark.parametrize(
    ("evaluations", "training"),
    [
        ([2.0, 1.8, 1.7, 1.6, 1.5, 1.4], FALLING),
        ([2.0, 1.8, 1.9, 2.0, 2.1, 2.2], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]),
        ([2.0, 1.8, 1.9, 1.7, 1.8, 1.6], FALLING),
        ([2.0, 1.8, 2.2, 2.1, 2.0, 1.9], FALLING),
        ([2.0, 1.8, 1.8, 1.8, 1.8, 1.8], FALLING),
        ([2.0, math.nan, 1.9, 2.0, 2.1, 2.2], FALLING),
    ],
    ids=["both fall", "both rise", "it falls on and off", "it comes back", "it stands still", "not a number"],
)
def test_there_is_no_note_unless_the_two_losses_part(evaluations: list[float], training: list[float]) -> None:
    assert first_note(evaluations, training) is None


def test_a_base_that_was_better_than_all_that_followed_counts() -> None:
    found = overfitting(lines([1.1, 1.2, 1.3], FALLING[:3], start=1.0), 0)
    assert found is not None and "since the start" in found


def test_the_note_names_both_losses_and_where_they_parted() -> None:
    text = str(overfitting(lines([2.0, 1.8, 1.9, 2.0, 2.1], FALLING[:5]), 3))
    assert "since step 20, from 1.8000 to 2.1000 over 3 evaluations" in text
    assert "training loss fell from 1.5000 to 0.9000" in text


def test_without_lines_of_training_between_evaluations_nothing_is_claimed() -> None:
    found = [line for line in lines([2.0, 1.8, 1.9, 2.0, 2.1], FALLING[:5]) if "eval" in line]
    assert overfitting(found, 3) is None


@pytest.mark.parametrize(("metric", "step"), [("loss", 20), ("vqa_accuracy", 30)])
def test_the_best_is_the_first_of_the_best_and_never_the_base(metric: str, step: int) -> None:
    values = [(0, 0.1, 0.9), (10, 2.0, 0.3), (20, 1.0, 0.4), (30, 1.0, 0.5), (40, math.nan, math.nan), (50, 1.5, 0.5)]
    found = [{"step": at, "eval": {"loss": loss, "vqa_accuracy": score}} for at, loss, score in values]
    best = best_evaluation(found, metric)
    assert best is not None and best["step"] == step


def test_lines_that_are_cut_off_or_damaged_are_left_out_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2)]
    path.write_bytes(b"\n".join([lines[0], b"\xff\xfe\0", b"[" * 100_000, lines[1], b'{"step": 2, "lo']))
    assert read_lines(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 1 was not written by a run"):
        read_lines(path)
