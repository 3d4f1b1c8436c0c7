"""Checkpoints that are written while the next steps run: the same run, whatever comes in between."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.interrupted import Killed, assert_same_run, checkpoints, full_disk, settings, train, train_until
from helpers.runs import metrics, trained
from llava_accel.checkpoint import store
from llava_accel.loop import step as step_file
from llava_accel.recipe import make_recipe
from llava_accel.setup.state import seed_step
from llava_accel.storage.folder_lock import LOCK

pytestmark = pytest.mark.slow

BEHIND = {"checkpoint": {"every": 2, "background": True}}


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def noting_threads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each folder gets its name on the main thread, as it happens."""
    seen: list[bool] = []
    commit = store.commit

    def noted(unfinished: Path, target: Path, **settings: Any) -> None:
        seen.append(on_main_thread())
        commit(unfinished, target, **settings)

    monkeypatch.setattr(store, "commit", noted)
    return seen


def said(captured: pytest.CaptureFixture[str]) -> str:
    return " ".join(captured.readouterr().out.split())


def test_what_is_written_behind_a_step_is_what_was_before_it(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, settled, gate = store.write, store.Checkpoints.settled, threading.Event()
    held: list[str] = []

    def held_back(folder: Path, *arguments: Any, **settings: Any) -> Any:
        if not on_main_thread():
            assert gate.wait(60)
            held.append(folder.name.partition(".")[0])
        return write(folder, *arguments, **settings)

    def let_go(self: store.Checkpoints) -> bool:
        gate.set()
        done = settled(self)
        gate.clear()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", held_back)
        patch.setattr(store.Checkpoints, "settled", let_go)
        run = train(settings(tmp_path, data, **BEHIND))
    assert held == [f"step-{step:06d}" for step in (2, 3, 4, 6, 8)], "each when the next one is due, or the run is over"
    assert_same_run(run, whole)
    assert checkpoints(run) == checkpoints(whole)
    for name in ("best", "checkpoints/step-000006"):
        ours, theirs = trained(run / name), trained(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "not what a later step has made of them"


def test_a_second_save_waits_for_the_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, str]] = []
    commit = store.commit

    def slow(unfinished: Path, target: Path, **settings: Any) -> None:
        seen.append(("begins", target.name))
        threading.Event().wait(0.3)
        commit(unfinished, target, **settings)
        seen.append(("ends", target.name))

    monkeypatch.setattr(store, "_SILENCE_S", 0.01)
    monkeypatch.setattr(store, "commit", slow)
    train(settings(tmp_path, data, eval={"every": 1000, "at_start": False}, **BEHIND))
    assert [what for what, _ in seen] == ["begins", "ends"] * (len(seen) // 2)
    assert "waiting for the last one" in said(capsys)


@pytest.mark.parametrize("last", [3, 7])
def test_a_run_that_ends_in_an_error_finishes_what_it_is_writing(
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: int,
) -> None:
    locked: list[bool] = []
    commit = store.commit

    def slow(unfinished: Path, target: Path, **settings: Any) -> None:
        threading.Event().wait(0.5)
        locked.append((tmp_path / "run" / LOCK).exists())
        commit(unfinished, target, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", slow)
        run = train_until(settings(tmp_path, data, **BEHIND), last)
    assert checkpoints(run)[-1] == f"step-{last - last % 2:06d}" or last == 3
    assert all(locked), "nobody else may write the folder before"
    assert "is being written; waiting" in said(capsys)
    assert_same_run(train(settings(tmp_path, data, **BEHIND)), whole)


def test_a_write_that_never_ends_does_not_hold_a_run_that_has_failed(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate, ended = threading.Event(), threading.Event()

    def stuck(unfinished: Path, target: Path, **settings: Any) -> None:
        gate.wait(5)
        ended.set()
        raise OSError("the file server came back")

    with monkeypatch.context() as patch:
        patch.setattr(store, "commit", stuck)
        patch.setattr(store, "_PATIENCE_S", 0.1)
        run = train_until(settings(tmp_path, data, **BEHIND), 3)
        assert "it is given up, and the older ones stay" in said(capsys)
        assert not [name for name in checkpoints(run) if not name.endswith(".tmp")]
        gate.set()
        assert ended.wait(60)
    assert_same_run(train(settings(tmp_path, data, **BEHIND)), whole)


def test_whoever_presses_ctrl_c_twice_does_not_wait(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(store, "commit", lambda *_, **__: gate.wait(60))

    def pressed(seed: int, step: int, rank: int) -> None:
        if step == 2:
            raise KeyboardInterrupt
        seed_step(seed, step, rank)

    monkeypatch.setattr(step_file, "seed_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, data, **BEHIND))
    assert "waiting" not in said(capsys)
    gate.set()


def test_a_disk_that_fills_up_behind_the_steps_costs_an_interval(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete: Callable[..., None] = store.Checkpoints._complete

    def full_at_four(self: store.Checkpoints, begun: Any, threads: int) -> None:
        if begun.target.name != "step-000004":
            return complete(self, begun, threads)
        with full_disk(20_000):
            return complete(self, begun, threads)

    monkeypatch.setattr(store.Checkpoints, "_complete", full_at_four)
    run = train(settings(tmp_path, data, eval={"every": 3, "at_start": True, "max_new_tokens": 2}, **BEHIND))
    assert "step-000004 could not be written (File too large). The run goes on" in said(capsys)
    assert checkpoints(run) == checkpoints(whole)
    assert_same_run(run, whole)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_of_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store.commit

    def full(unfinished: Path, target: Path, **settings: Any) -> None:
        if target.name == "step-000008":
            raise OSError(28, "No space left on device")
        commit(unfinished, target, **settings)

    monkeypatch.setattr(store, "commit", full)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 8"):
        train(settings(tmp_path, data, **BEHIND))
    assert checkpoints(tmp_path / "run")[-1] == "step-000006"


def test_where_there_is_no_memory_for_a_copy_training_waits_and_it_is_said_once(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_main = noting_threads(monkeypatch)
    monkeypatch.setattr(store, "free_main_memory", lambda: 1000)
    run = train(settings(tmp_path, data, **BEHIND))
    assert said(capsys).count("there is not enough main memory for a copy") == 1 and all(on_main)
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("background", "worth", "on_main"), [("auto", 1, False), ("auto", 1 << 40, True), (False, 1, True)]
)
def test_auto_takes_large_checkpoints_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool | str, worth: int, on_main: bool
) -> None:
    seen = noting_threads(monkeypatch)
    monkeypatch.setattr(store, "WORTH_IT", worth)
    train_until(settings(tmp_path, data, checkpoint={"every": 2, "background": background}), 3)
    assert seen and set(seen) == {on_main}
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3, 3]


def test_what_is_no_fault_of_the_disk_ends_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(store, "commit", wrong)
    with pytest.raises(Killed):
        verb.train(make_recipe(settings(tmp_path, data, **BEHIND)))
