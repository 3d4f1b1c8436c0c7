"""Wherever a run has put its weights, the verbs take that folder: the run, best, a checkpoint, the export, an export of
the export."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from helpers.exported import CPU, assert_same, export, logits, prove_here
from helpers.runs import metrics
from llava_accel.__main__ import main
from llava_accel.inference.origin import find_trained, load_trained

PLACES = ("run", "best", "checkpoint", "export", "peft")


def place(name: str, run: Path, exports: dict[str, Path]) -> Path:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return {"run": run, "checkpoint": newest, "peft": exports["peft"]}.get(name, run / name)


@pytest.mark.parametrize("name", PLACES)
def test_chat_export_and_evaluate_take_it(
    name: str,
    lora_run: Path,
    lora_exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prove_here(monkeypatch)
    folder = place(name, lora_run, lora_exports)
    question = ["--once", "What is it?", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["llava-accel", "chat", "--adapter", str(folder), *question])
    main()
    assert capsys.readouterr().out.strip()
    assert_same(logits(lora_run), logits(export(monkeypatch, folder, "peft", tmp_path / "again")))
    monkeypatch.setattr(
        sys, "argv", ["llava-accel", "evaluate", str(lora_run / "recipe.toml"), "--adapter", str(folder)]
    )
    capsys.readouterr()
    main()
    expected = metrics(lora_run)[-1]["eval"]["loss"]
    assert f"evaluation loss {expected:.4f}" in capsys.readouterr().out


def test_a_merged_model_is_evaluated_as_a_base(
    lora_run: Path, lora_exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f'model.base="{lora_exports["merged"]}"'
    monkeypatch.setattr(sys, "argv", ["llava-accel", "evaluate", str(lora_run / "recipe.toml"), base, "model.adapter="])
    main()
    expected = metrics(lora_run)[-1]["eval"]["loss"]
    assert f"evaluation loss {expected:.4f}" in capsys.readouterr().out


def test_best_stands_alone(lora_run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(lora_run / "best", moved)
    loaded = load_trained(find_trained(str(moved)), dtype=torch.float32, device=CPU)
    assert loaded.objective is not None and not loaded.notes
    assert_same(logits(lora_run), logits(moved))
