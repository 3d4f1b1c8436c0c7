"""Which evaluation is the best, and when there have been enough of them."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.runs import recipe
from llava_accel.console.output import Console
from llava_accel.loop.meter import Meter
from llava_accel.loop.validation import Validation
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.state import TrainState

NAN = float("nan")


def decide(
    monkeypatch: pytest.MonkeyPatch, settings: Recipe, values: Iterable[float], state: TrainState
) -> list[tuple[bool, bool]]:
    """Show the validation one value a step; returns after each whether it is to be kept, and whether the run ends."""
    monkeypatch.setattr(Validation, "_report", lambda *_: None)
    kept: list[int] = []
    validation, meter = object.__new__(Validation), object.__new__(Meter)
    meter.enter = lambda phase: None
    validation._run = RunContext(settings, build_accelerator(settings), Console(False))
    validation._checkpoints = SimpleNamespace(save=lambda _: True, keep_best=lambda: kept.append(state.step))  # pyright: ignore
    decisions = []
    for value in values:
        monkeypatch.setattr(Validation, "_measure", lambda *_, value=value: value)
        state.step += 1
        validation.evaluate(state, meter)
        decisions.append((state.step in kept, state.is_stopped))
    return decisions


def settings(folder: Path, **evaluation: object) -> Recipe:
    data = folder / "data.json"
    return recipe(folder, data, data={"eval": str(data)}, eval=evaluation)


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("loss", [3.0, 2.0, 2.5, 1.9], [True, True, False, True]),
        ("vqa_accuracy", [0.1, 0.3, 0.3, 0.4], [True, True, False, True]),
        ("exact_match", [0.2, 0.1], [True, False]),
        ("loss", [NAN, 2.0, NAN, 1.0], [False, True, False, True]),
    ],
    ids=["a loss falls", "a score rises", "the first is the best so far", "no number is never the best"],
)
def test_the_best_is_chosen_by_the_metric_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, values: list[float], kept: list[bool]
) -> None:
    state = TrainState(num_steps=9, steps_per_epoch=9)
    found = decide(monkeypatch, settings(tmp_path, metric=metric), values, state)
    assert [keep for keep, _ in found] == kept
    assert state.best_step == len(kept) - kept[::-1].index(True)
    assert state.best == values[state.best_step - 1]


def test_patience_counts_evaluations_since_the_last_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(num_steps=9, steps_per_epoch=9)
    found = decide(monkeypatch, settings(tmp_path, patience=2), [3.0, 3.1, 2.0, 2.0, 2.1], state)
    assert [ends for _, ends in found] == [False, False, False, False, True]


def test_without_patience_a_run_never_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(num_steps=9, steps_per_epoch=9)
    assert not any(ends for _, ends in decide(monkeypatch, settings(tmp_path), [1.0, *[2.0] * 7], state))
