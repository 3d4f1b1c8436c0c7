"""Which keys make another run of a recipe."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from llava_accel.checkpoint import resume
from llava_accel.checkpoint.progress import own_code, read_position, write_position
from llava_accel.checkpoint.resume import differences, find_checkpoint
from llava_accel.exceptions import UserError
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.setup.state import TrainState

SMALLEST = '[run]\nname = "r"\n[model]\nbase = "b"\n[data]\ntrain = "t.jsonl"\n'


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.columns.image=photo", 'data.columns.image: not set -> "photo"'),
        ("data.labels=original", 'data.labels: "answers" -> "original"'),
        ("data.image_placement=start_if_single", 'data.image_placement: "auto" -> "start_if_single"'),
        ("data.missing_image_mark=start", 'data.missing_image_mark: "error" -> "start"'),
        ("optim.decay=original", 'optim.decay: "weights" -> "original"'),
        ("train.loss=micro_batch_mean", 'train.loss: "tokens" -> "micro_batch_mean"'),
    ],
)
def test_another_number_makes_another_run(tmp_path: Path, override: str, says: str) -> None:
    (tmp_path / "r.toml").write_text(SMALLEST)
    before, now = (load_recipe(tmp_path / "r.toml", some, warns=False) for some in ([], [override]))
    assert differences(before, now) == [says] and differences(now, now) == []


@pytest.mark.parametrize("key", ["train.per_device_batch_size", "train.accumulation_steps"])
def test_how_a_batch_is_split_is_free_where_no_number_depends_on_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "r.toml").write_text(SMALLEST)
    for loss, expected in (("tokens", []), ("micro_batch_mean", [f"{key}: 2 -> 4"])):
        before, now = (load_recipe(tmp_path / "r.toml", [f"train.loss={loss}", f"{key}={size}"]) for size in (2, 4))
        assert differences(before, now) == expected


def test_other_kernels_are_no_other_run_and_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(SMALLEST)
    now = load_recipe(tmp_path / "recipe.toml", ["run.deterministic=true"])
    monkeypatch.setattr(resume, "_find", lambda recipe, say: tmp_path)
    said: list[str] = []
    assert find_checkpoint(now, said.append) == tmp_path
    assert len(said) == 1 and said[0].startswith(f"run.deterministic is true from {tmp_path.name} on")
    assert find_checkpoint(load_recipe(tmp_path / "recipe.toml"), said.append) == tmp_path and len(said) == 1


def test_other_questions_of_evaluations_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.toml").write_text(SMALLEST)
    now = load_recipe(tmp_path / "recipe.toml", ["eval.limit=7", "eval.every=3"], warns=False)
    monkeypatch.setattr(resume, "_find", lambda recipe, say: tmp_path)
    said: list[str] = []
    assert find_checkpoint(now, said.append) == tmp_path
    assert len(said) == 1 and said[0].startswith(f"eval.limit = 7 (before: 0): scores from {tmp_path.name} on")


def write_scores(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text("def f(prediction, references):\n    return 1.0\n")
    (folder / "r.toml").write_text(SMALLEST)


def refused_after_a_change(folder: Path, before: Recipe, now: Recipe, says: str) -> None:
    """A checkpoint of `before` resumes as `now`, and no longer once mine.py has changed."""
    accelerator, state = Accelerator(cpu=True), TrainState(num_steps=4, steps_per_epoch=2, step=1)
    (engine := folder / "engine").mkdir()
    write_position(engine, before, accelerator, state, own_code(before), state.unlogged[None])
    found = TrainState(num_steps=4, steps_per_epoch=2)
    read_position(engine, now, accelerator, found)
    assert found.step == 1
    (folder / "mine.py").write_text("def f(prediction, references):\n    return 2.0\n")
    with pytest.raises(UserError, match=says):
        read_position(engine, now, accelerator, found)


def test_a_score_that_chose_the_best_checkpoint_may_not_change(tmp_path: Path) -> None:
    write_scores(tmp_path, "mine")
    chosen = [f"eval.metric={tmp_path / 'mine.py'}:f", "data.eval_fraction=0.5"]
    now = load_recipe(tmp_path / "r.toml", chosen)
    refused_after_a_change(tmp_path, now, now, r"the file of eval\.metric has changed since")


def test_a_score_that_was_measured_may_not_change_and_another_may_be_added(tmp_path: Path) -> None:
    write_scores(tmp_path, "mine", "new")
    before, now = (
        load_recipe(
            tmp_path / "r.toml",
            [f"eval.metrics={json.dumps([f'{tmp_path / name}.py:f' for name in names])}"],
            warns=False,
        )
        for names in (["mine"], ["mine", "new"])
    )
    refused_after_a_change(tmp_path, before, now, r"the file of eval\.metrics = '.*mine\.py:f' has changed since")
