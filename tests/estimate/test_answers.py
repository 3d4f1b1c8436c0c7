"""An evaluation takes what is planned for it, and answers as many questions at once as then fit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from helpers.runs import mixed_records, recipe, talk, write_records
from llava_accel.console.output import Console
from llava_accel.estimate import answers
from llava_accel.estimate.answers import (
    answered_at_once,
    largest_questions,
    plan_answers,
    questions_at_once,
    trace_answers,
)
from llava_accel.estimate.peak_memory import CONTEXT_BYTES, GIB, Layout, Plan
from llava_accel.estimate.trace import Moment
from llava_accel.inference.answering import answer_batch
from llava_accel.measurement.probe import peak_of
from llava_accel.model.processing import load_processing
from llava_accel.plan import plan
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import open_data

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def prepared(folder: Path, **evaluation: Any) -> tuple[Recipe, RunContext, Any, Any]:
    records = [talk(number, "What do you see? " * 9, "a", f"t{number % 8}.png") for number in range(24)]
    data = write_records(folder / "data.json", records)  # few targets, as PyTorch copies logits where nobody sees it
    settings = recipe(folder, data, data={"eval": str(data), "cache_features": False}, eval=evaluation)
    run, processing = (
        RunContext(settings, Accelerator(cpu=True), Console(False)),
        load_processing(settings.model, "pad"),
    )
    _, part = open_data(run, processing)
    return settings, run, processing, part


@pytest.mark.parametrize("max_new_tokens", [1, 100], ids=["the prompts are the peak", "the answers are"])
def test_the_plan_is_near_to_what_an_evaluation_takes(tmp_path: Path, max_new_tokens: int) -> None:
    settings, run, processing, part = prepared(tmp_path, max_new_tokens=max_new_tokens)
    ((batch, questions),) = largest_questions(settings, part)
    planned = trace_answers(settings, processing, batch, questions, torch.float32, False)
    objective = build_objective(run, processing)[0].eval()

    def compute() -> None:
        answer_batch(objective, batch, questions, stop_ids=frozenset(), max_new_tokens=max_new_tokens)

    with torch.no_grad():
        measured = peak_of(compute, 0, CPU)
    assert max(moment.by_rows + moment.by_weights for moment in planned) == pytest.approx(measured, rel=0.15)
    last_is_the_peak = planned[-1].by_rows == max(moment.by_rows for moment in planned)
    assert last_is_the_peak == (max_new_tokens > 1)


def test_as_many_questions_are_answered_at_once_as_fit(tmp_path: Path) -> None:
    settings = prepared(tmp_path)[0]  # micro-batches of 8: at most 16 questions
    step = Plan(Layout("one GPU"), 4 * GIB, 0, 2 * GIB, GIB, GIB, ())
    evaluation = plan_answers(step, (Moment(activations=16 * GIB),))
    assert (evaluation.standing, evaluation.total) == (6 * GIB, 22 * GIB)
    assert [answered_at_once(evaluation, size * 1e9, settings) for size in (80, 24, 16, 8)] == [16, 14, 7, 0]
    assert plan_answers(step, (), trains=False).standing == 4 * GIB


def test_the_number_is_planned_on_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run, processing, part = prepared(tmp_path)
    assert questions_at_once(run, processing, part) == 16
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    gpu = SimpleNamespace(total_memory=CONTEXT_BYTES * 1.2)
    monkeypatch.setattr(answers, "total_bytes", lambda _: gpu.total_memory)
    monkeypatch.setattr(answers, "resolve_precision", lambda *_: torch.float32)
    assert 1 < questions_at_once(run, processing, part) <= 16
    gpu.total_memory = 1.0
    assert questions_at_once(run, processing, part) == 1


def test_plan_shows_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(8))
    plan(recipe(tmp_path, data, data={"eval": str(data)}), 24.0, 4, probe=False)
    said = capsys.readouterr().out
    assert "evaluation: questions that are answered at once" in said and "at once on 24 GB" in said
