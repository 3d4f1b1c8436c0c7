"""Of a run its best checkpoint is taken, else its export, else its newest checkpoint; everywhere the same."""

from pathlib import Path

import pytest

from llava_accel.model.build import find_projector
from llava_accel.model.files import resolve_folder
from llava_accel.storage.atomic import MANIFEST
from llava_accel.storage.run_weights import find_weights

REST = "non_lora_trainables.safetensors"


def make(run: Path, *places: str) -> Path:
    run.mkdir(exist_ok=True)
    (run / "recipe.toml").touch()
    for place in places:
        (run / place).mkdir(parents=True)
        for name in ("recipe.toml", MANIFEST, REST):
            (run / place / name).touch()
    return run


def test_the_best_comes_before_the_export_and_that_before_the_newest_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "checkpoints/step-000002", "checkpoints/step-000010")
    assert find_weights(run) == run / "checkpoints" / "step-000010"
    assert find_weights(make(run, "export")) == run / "export"
    assert find_weights(make(run, "best")) == run / "best"
    assert find_weights(run / "export") == run / "export"


def test_a_checkpoint_without_manifest_is_not_taken(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "checkpoints/step-000002", "checkpoints/step-000003")
    (run / "checkpoints" / "step-000003" / MANIFEST).unlink()
    assert find_weights(run).name == "step-000002"


def test_every_key_that_names_a_folder_takes_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "best")
    assert resolve_folder(str(run), "model.adapter") == run / "best"
    assert find_projector(str(run)) == run / "best" / REST
    assert resolve_folder(str(tmp_path), "model.base") == tmp_path, "no run"


def test_a_run_that_has_saved_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint yet"):
        resolve_folder(str(make(tmp_path / "run")), "model.adapter")
