"""What is kept of a run, and that no checkpoint is taken for what it is not."""

import shutil
from pathlib import Path

import pytest
import torch
from interrupted import STEPS, assert_same_run, checkpoints, settings, train, train_until
from runs import Tables, metrics, trained

import llava_accel.train as verb
from llava_accel.recipe import make_recipe


def test_keep_is_the_number_of_newest_checkpoints(whole: Path) -> None:
    assert checkpoints(whole) == ["step-000006", "step-000008"]


def test_every_checkpoint_can_be_used_as_it_is(whole: Path) -> None:
    usable = {path.name for path in (whole / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= usable
    for folder in ("checkpoints/step-000006", "best"):
        assert usable <= {path.name for path in (whole / folder).iterdir()}


def _damage(folder: Path) -> None:
    """Flip one bit of the weights."""
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_tampered_checkpoint_that_the_recipe_names_is_refused(data: Path, whole: Path, tmp_path: Path) -> None:
    named = shutil.copytree(whole / "checkpoints" / "step-000006", tmp_path / "step-000006")
    _damage(named)
    with pytest.raises(ValueError, match=r"run\.resume: .*step-000006 is no complete checkpoint"):
        train(settings(tmp_path, data, run={"resume": str(named)}))


def test_a_folder_without_a_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.resume: .* is no complete checkpoint"):
        train(settings(tmp_path, data, run={"resume": str(data)}))


def test_a_damaged_newest_checkpoint_is_passed_over(data: Path, whole: Path, tmp_path: Path) -> None:
    run = train_until(settings(tmp_path, data), 7)
    _damage(run / "checkpoints" / checkpoints(run)[-1])
    assert_same_run(train(settings(tmp_path, data)), whole)


@pytest.fixture(scope="module")
def worsening(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose evaluation gets worse and worse, so that patience ends it."""
    return train(_worsening(tmp_path_factory.mktemp("worsening"), data))


def _worsening(folder: Path, data: Path, **train_table: object) -> Tables:
    return settings(
        folder,
        data,
        optim={"learning_rate": 0.5, "projector_learning_rate": 0.5, "schedule": "constant", "warmup_fraction": 0.0},
        eval={"every": 1, "patience": 2, "at_start": False, "limit": 2, "max_new_tokens": 1, "blind_limit": 0},
        checkpoint={"keep": 1},
        train={"per_device_batch_size": 2, "accumulation_steps": 2, "max_steps": 2 * STEPS, **train_table},
    )


def test_the_best_checkpoint_is_kept(data: Path, worsening: Path, tmp_path: Path) -> None:
    evaluated = {line["step"]: line["eval"]["loss"] for line in metrics(worsening) if "eval" in line}
    best = min(evaluated, key=evaluated.__getitem__)
    assert best < max(evaluated), "the test needs a run whose last checkpoint is not its best"
    assert checkpoints(worsening) == [f"step-{max(evaluated):06d}"]
    # With a constant rate a run of that many steps ends at the same weights.
    short = train(_worsening(tmp_path, data, max_steps=best))
    expected, kept = trained(short / "export"), trained(worsening / "best")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_patience_ends_a_run_and_it_stays_ended(data: Path, worsening: Path) -> None:
    evaluated = [line["eval"]["loss"] for line in metrics(worsening) if "eval" in line]
    assert evaluated.index(min(evaluated)) == len(evaluated) - 3, "two evaluations without gain"
    before = (worsening / "metrics.jsonl").read_text()
    state = verb.train(make_recipe(_worsening(worsening.parent, data)))
    assert state.step == len(evaluated) < state.num_steps
    assert (worsening / "metrics.jsonl").read_text() == before


def test_more_patience_lets_a_stopped_run_go_on(data: Path, worsening: Path, tmp_path: Path) -> None:
    shutil.copytree(worsening, tmp_path / "run")
    stopped = metrics(worsening)[-1]["step"]
    recipe = _worsening(tmp_path, data, max_steps=stopped + 1)
    recipe["eval"]["patience"] = 10
    assert verb.train(make_recipe(recipe)).step == stopped + 1
