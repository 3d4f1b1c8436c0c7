"""A run writes into its own folder, alone, and into no other."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import llava_accel.train as verb
from helpers.runs import command, recipe
from helpers.verbs import assert_helpful, assert_refused, start, write_recipe
from llava_accel.exceptions import UserError
from llava_accel.setup import run_folder
from llava_accel.setup.run_folder import check_folder
from llava_accel.storage.folder_lock import LOCK, FolderLock

ENVIRONMENT = json.dumps({"packages": {}, "backend": "NO", "num_processes": 1})


def of_a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "environment.json").write_text(ENVIRONMENT)
    return folder


def refused(folder: Path) -> str:
    before = sorted(str(path) for path in folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        check_folder(folder)
    assert sorted(str(path) for path in folder.rglob("*")) == before
    assert_helpful(str(caught.value), ["run.output_dir", str(folder)])
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["notes.txt", "recipe.toml", "best/a.txt", "export/a.txt", "x.tmp/a.txt", "checkpoints/a.txt"]
)
def test_a_folder_that_no_run_has_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    assert name.split("/")[0] in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"name": "my-env"}', "\xff"])
def test_another_file_of_that_name_is_no_mark(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    (tmp_path / "a.txt").write_text("precious")
    refused(tmp_path)


def test_new_empty_and_own_folders_serve(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty")
    check_folder(of_a_run(tmp_path / "run"))
    (tmp_path / "empty" / "skipped.txt").write_text("of `llava-accel cache`")
    check_folder(tmp_path / "empty")


def test_a_lock_marks_a_run_that_was_killed_before_it_wrote_more(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.take()
    (tmp_path / "recipe.toml.0.tmp").write_text("half")
    check_folder(tmp_path)
    lock.release()
    refused(tmp_path)


def test_the_log_that_the_shell_writes_there_is_no_foreign_file(tmp_path: Path) -> None:
    kept = os.dup(1)
    with (tmp_path / "train.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        try:
            check_folder(tmp_path)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
    refused(tmp_path)


@pytest.mark.parametrize("name", ["best", "export", "checkpoints/step-000001"])
@pytest.mark.parametrize("manifest", [None, '{"name": "a web page"}'])
def test_a_foreign_folder_in_the_place_of_a_result_is_refused(tmp_path: Path, name: str, manifest: str | None) -> None:
    run = of_a_run(tmp_path / "run")
    (run / name).mkdir(parents=True)
    if manifest:
        (run / name / "manifest.json").write_text(manifest)
    assert str(run / name) in refused(run)


def test_the_commit_is_that_of_a_clone_and_of_no_project_that_holds_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first"]
    for words in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "llava_accel" / "setup" / "run_folder.py"))
    assert run_folder._git_commit() is None
    (tmp_path / "pyproject.toml").touch()
    assert len(run_folder._git_commit() or "") == 40


@pytest.mark.parametrize("verb", ["check", "train"])
def test_the_verbs_refuse_it_before_anything_is_read(tmp_path: Path, verb: str) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "a.txt").write_text("precious")
    ended = start(verb, str(write_recipe(tmp_path, run={"output_dir": str(tmp_path / "project")})))
    assert_refused(ended, ["run.output_dir", "a.txt"])
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["a.txt"]


def test_a_second_start_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    lock.take()
    assert_refused(start("train", str(write_recipe(tmp_path))), ["run.output_dir", f"process {os.getpid()}"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    lock.release()


@pytest.mark.slow
def test_two_ranks_in_a_folder_that_is_taken_end_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    lock.take()
    done = command(write_recipe(tmp_path), "--num-processes", "2")
    lock.release()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and f"process {os.getpid()}" in done.stderr, done.stderr


@pytest.mark.slow
def test_foreign_files_in_a_runs_folder_outlive_every_start(tmp_path: Path) -> None:
    table = recipe(tmp_path, train={"max_steps": 1})
    verb.train(table)
    run = tmp_path / "run"
    for name in ("best.old", "export.tmp", "scratch.tmp", "data", "checkpoints/step-1.tmp", "checkpoints/keep.old"):
        (run / name).mkdir()
        (run / name / "a.txt").write_text("precious")
    before = {path for path in run.rglob("a.txt")}
    for resume in ("auto", "never"):
        verb.train(table.model_copy(update={"run": table.run.model_copy(update={"resume": resume})}))
    assert {path for path in run.rglob("a.txt")} == before
    assert not (run / LOCK).exists()


@pytest.mark.parametrize("name", ["lost+found/", ".DS_Store", "train.log", "slurm-12.out"])
def test_what_the_system_or_a_log_has_put_there_is_in_nobodys_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    check_folder(tmp_path)
    (tmp_path / "weights.bin").touch()
    assert "weights.bin" in refused(tmp_path)


def test_a_git_that_may_not_be_started_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").touch(mode=0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder._git_commit() is None
