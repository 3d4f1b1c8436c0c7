"""A run that broke off goes on to the same numbers, bit for bit."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers import drive_crash, forked
from helpers.interrupted import (
    STEPS,
    STEPS_PER_EPOCH,
    Killed,
    assert_same_run,
    checkpoints,
    newest,
    settings,
    train,
    train_until,
)
from helpers.runs import PARITY, metrics, trained
from llava_accel.checkpoint import store as checkpoint
from llava_accel.exceptions import UserError
from llava_accel.model.save import step_saved
from llava_accel.recipe import make_recipe
from llava_accel.recipe.toml import to_toml, toml_value
from llava_accel.storage.atomic import is_complete

pytestmark = pytest.mark.slow


def test_the_uninterrupted_run_is_what_these_tests_need(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines if "eval" in line] == [0, 3, 6, 8]
    assert [line["num_examples"] for line in lines if "loss" in line] == [4, 4, 4, 1] * 2


@pytest.mark.parametrize("last", [1, 3, STEPS_PER_EPOCH, 5, 7])
def test_a_run_that_breaks_off_ends_at_the_same_numbers(data: Path, whole: Path, tmp_path: Path, last: int) -> None:
    run = train_until(settings(tmp_path, data), last)
    assert not (run / "export").exists()
    assert_same_run(train(settings(tmp_path, data)), whole)


def test_a_killed_process_with_workers_ends_at_the_same_numbers(data: Path, whole: Path, tmp_path: Path) -> None:
    recipe = settings(tmp_path, data, data={"workers": 2})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    command = [sys.executable, drive_crash.__file__, str(tmp_path / "recipe.toml"), "7"]
    done = forked.run(command, cwd=PARITY.parents[1])
    assert done.returncode == drive_crash.EXIT_CODE, done.stderr
    assert metrics(tmp_path / "run")[-1]["step"] == 7, "the step behind the last checkpoint was logged"
    assert_same_run(train(recipe), whole)


def test_a_cut_off_line_of_metrics_is_written_anew(data: Path, whole: Path, tmp_path: Path) -> None:
    run = train_until(settings(tmp_path, data), 5)
    file = run / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    assert_same_run(train(settings(tmp_path, data)), whole)


@pytest.fixture(scope="module")
def broken_off(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that broke off behind step 7."""
    return train_until(settings(tmp_path_factory.mktemp("broken_off"), data), 7)


@pytest.mark.parametrize("manifest", ["null", "{"])
def test_a_manifest_that_seals_nothing_is_passed_over_with_a_word(
    data: Path, whole: Path, broken_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str
) -> None:
    run = Path(shutil.copytree(broken_off, tmp_path / "run"))
    (run / "checkpoints" / "step-000006" / "manifest.json").write_text(manifest)
    shutil.rmtree(run / "checkpoints" / "step-000006" / "engine")
    assert_same_run(train(settings(tmp_path, data)), whole)
    said = " ".join(capsys.readouterr().out.split())
    assert "step-000006 is damaged" in said and "is skipped" in said


def test_lines_that_a_power_cut_took_are_said_and_the_others_stay(
    data: Path, broken_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(broken_off, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    train(settings(tmp_path, data))
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"metrics\.jsonl lacks \d of the lines that were written until step 6", said), said
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 7, 8]


def test_lines_are_on_the_disk_before_the_checkpoint_has_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    flush, commit = checkpoint.flush, checkpoint.commit
    monkeypatch.setattr(checkpoint, "flush", lambda path: (seen.append(path.name), flush(path)))
    monkeypatch.setattr(checkpoint, "commit", lambda *a, **k: (seen.append("commit"), commit(*a, **k)))
    train_until(settings(tmp_path, data), 2)
    assert seen == ["metrics.jsonl", "commit"]


def _answers_swapped(folder: Path) -> None:
    records = json.loads((folder / "train.json").read_text())
    one, other = (record["conversations"][-1] for record in records[:2])
    one["value"], other["value"] = "yes", "no"
    for record in records[2:4]:
        record["conversations"][-1]["value"] = "no" if record is records[2] else "yes"
    (folder / "train.json").write_text(json.dumps(records))


def _pictures_swapped(folder: Path) -> None:
    one, other, spare = folder / "images" / "t0.png", folder / "images" / "t1.png", folder / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


@pytest.mark.parametrize("change", [_answers_swapped, _pictures_swapped])
def test_data_of_another_content_is_refused_and_data_that_moved_is_not(
    data: Path, whole: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    own = Path(shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("cache")))
    shutil.copytree(PARITY / "images", own / "images")
    places = {"train": str(own / "train.json"), "images": str(own / "images")}
    train_until(settings(tmp_path, own, data=places), 5)
    moved = own.rename(tmp_path / "moved")
    places = {"train": str(moved / "train.json"), "images": str(moved / "images")}
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert_same_run(train(settings(tmp_path, moved, data=places)), whole)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "kept").rename(tmp_path / "run")
    change(moved)
    with pytest.raises(ValueError, match=r"run\.resume: the data has changed"):
        train(settings(tmp_path, moved, data=places))


@pytest.mark.parametrize("left", ["best", "export"])
def test_a_finished_run_without_checkpoints_keeps_what_it_has(
    data: Path, whole: Path, tmp_path: Path, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / ("export" if left == "best" else "best"))
    with pytest.raises(ValueError, match=rf"run\.resume: .* no checkpoint to go on from.*{left}"):
        train(settings(tmp_path, data))
    assert (tmp_path / "run" / left / "adapter_model.safetensors").is_file()
    train(settings(tmp_path, data, run={"resume": "never"}))
    assert f"removed from an earlier run: {tmp_path / 'run' / left}" in " ".join(capsys.readouterr().out.split())


def test_an_unfinished_checkpoint_is_ignored(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkpoint.commit

    def dying(unfinished: Path, target: Path, **settings: Any) -> None:
        if target.name == "step-000004":
            raise Killed
        commit(unfinished, target, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", dying)
        with pytest.raises(Killed):
            train(settings(tmp_path, data))
    assert [name for name in checkpoints(tmp_path / "run") if re.fullmatch(r"step-000004\.\w+\.tmp", name)]
    assert "step-000004" not in checkpoints(tmp_path / "run")
    run = train(settings(tmp_path, data))
    assert_same_run(run, whole)
    assert not [name for name in checkpoints(run) if name.endswith(".tmp")]


def test_a_finished_run_takes_no_further_step(data: Path, whole: Path) -> None:
    before, weights = (whole / "metrics.jsonl").read_text(), trained(whole / "export")
    state = verb.train(make_recipe(settings(whole.parent, data)))
    assert state.step == STEPS
    assert (whole / "metrics.jsonl").read_text() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained(whole / "export").items())


def test_a_named_checkpoint_is_where_the_run_goes_on(data: Path, whole: Path, tmp_path: Path) -> None:
    named = whole / "checkpoints" / "step-000006"
    run = train(settings(tmp_path, data, run={"resume": str(named)}))
    first, second = trained(newest(run)), trained(newest(whole))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [7, 8]
    best = min((line for line in metrics(run) if "eval" in line), key=lambda line: line["eval"]["loss"])["step"]
    assert step_saved(run / "best") == step_saved(run / "export") == best, "the best of this folder"


@pytest.mark.parametrize("resume", ["auto", "{}"])
def test_a_renamed_checkpoint_is_refused_and_untouched(data: Path, whole: Path, tmp_path: Path, resume: str) -> None:
    renamed = tmp_path / "run" / "checkpoints" / "step-000009"
    shutil.copytree(whole / "checkpoints" / "step-000006", renamed)
    with pytest.raises(UserError, match=r"step-000009 holds step 6, so it was renamed. Name it step-000006 again"):
        train(settings(tmp_path, data, run={"resume": resume.format(renamed)}))
    assert is_complete(renamed)


def test_never_starts_anew_and_leaves_nothing_of_the_old_run_to_resume_from(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run = train_until(settings(tmp_path, data, run={"resume": "never"}), 3)
    steps = [line["step"] for line in metrics(run)]
    assert steps == [0, 1, 2, 3, 3], "the evaluation at the start, three steps, the evaluation of the third"
    assert checkpoints(run) == ["step-000002", "step-000003"]
    assert_same_run(train(settings(tmp_path, data)), whole)


def test_a_kill_between_checkpoint_and_best_is_mended_on_resume(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(self: checkpoint.Checkpoints) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "keep_best", dying)
        with pytest.raises(Killed):
            train(settings(tmp_path, data))
    assert not (tmp_path / "run" / "best").exists()
    run = train_until(settings(tmp_path, data), 4)  # before another evaluation is due
    assert trained(run / "best")


def test_what_no_line_has_told_yet_survives_a_kill(data: Path, tmp_path: Path) -> None:
    """Lines for every third step, checkpoints at every second: the sums in between are part of the checkpoint."""
    sparse = {"log": {"every": 3}, "eval": {"every": 1000, "at_start": False}}
    expected = train(settings(tmp_path / "whole", data, **sparse))
    for until in (5, 7):
        train_until(settings(tmp_path / str(until), data, **sparse), until)
        assert_same_run(train(settings(tmp_path / str(until), data, **sparse)), expected)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("run", "seed", 43),
        ("optim", "learning_rate", 1e-3),
        ("optim", "schedule", "linear"),
        ("train", "epochs", 3),
        ("model", "template", "plain"),
        ("data", "group_by_length", False),
        ("data", "max_length", 1024),
        ("eval", "metric", "exact_match"),
    ],
)
def test_a_recipe_with_other_numbers_is_refused_and_nothing_is_touched(
    data: Path, whole: Path, table: str, key: str, value: object
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    changed = settings(whole.parent, data)
    old = make_recipe(changed).model_dump()[table][key]
    changed[table][key] = value
    with pytest.raises(
        ValueError, match=re.escape(f"{table}.{key}: {toml_value(old)} -> {toml_value(value)}")
    ) as caught:
        train(changed)
    # Another run.name alone would not do where the recipe names a folder.
    assert 'run.resume="never"' in str(caught.value) and "another run.output_dir" in str(caught.value)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_keys_that_change_no_number_may_change(data: Path, whole: Path, tmp_path: Path) -> None:
    train_until(settings(tmp_path, data), 5)
    free = {
        "data": {"workers": 1, "cache_features": False},
        "log": {"every": 1},
        "eval": {"patience": 50},
        "checkpoint": {"every": 3, "keep": 5},
        "train": {"spike_factor": 5.0},
        "model": {"gradient_checkpointing": True},
    }
    assert_same_run(train(settings(tmp_path, data, **free)), whole)


def test_data_that_has_changed_under_the_same_name_is_refused(data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    train_until(settings(tmp_path, own), 5)
    records = json.loads((own / "train.json").read_text())
    records[2]["conversations"][1]["value"] += " and more"
    (own / "train.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"run\.resume: the data has changed since .* was written"):
        train(settings(tmp_path, own))
