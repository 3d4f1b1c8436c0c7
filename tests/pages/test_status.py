"""The report says what has become of a run, of one that was stopped or killed too, and what its data are."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llava_accel.train as verb
from helpers.interrupted import train_until
from helpers.report_run import write_run
from helpers.runs import PARITY, mixed_records, tables, talk, write_records
from llava_accel.exceptions import Interrupted, UserError
from llava_accel.loop import step as step_file
from llava_accel.pages import details
from llava_accel.pages.history import Status, read_run
from llava_accel.pages.write import write_report
from llava_accel.recipe import make_recipe
from llava_accel.runtime.signals import Interruption
from llava_accel.setup.run_folder import ENDED
from llava_accel.setup.state import TrainState
from llava_accel.storage.folder_lock import LOCK, FolderLock


def status(run: Path, state: TrainState | None = None) -> Status | None:
    return read_run(run, state).status


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, num_steps=50, num_questions=20)


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        ({"how": "finished"}, "finished", "finished"),
        ({"how": "patience"}, "finished", "stopped early at step 50 of 90"),
        ({"how": "signal", "detail": "SIGTERM"}, "stopped", "stopped by SIGTERM at step 50 of 90; the same command goes on"),
        ({"how": "error", "detail": "no room"}, "failed", "ended by an error at step 50 of 90: no room"),
        (None, "failed", "broke off at step 50 of 90: no process runs it any more"),
    ],
)  # fmt: skip
def test_the_note_of_a_run_decides(run: Path, end: dict[str, str] | None, kind: str, said: str) -> None:
    if end:
        (run / ENDED).write_text(json.dumps({"detail": ""} | end))
    assert status(run, TrainState(num_steps=90, steps_per_epoch=90)) == Status(kind, said)


def test_a_lock_that_is_held_says_that_it_runs_and_one_that_is_left_behind_does_not(run: Path) -> None:
    state, lock = TrainState(num_steps=90, steps_per_epoch=90), FolderLock(run)
    lock.take()
    assert status(run, state) == Status("running", "running: step 50 of 90, when this page was written")
    lock.release()
    gone = {"host": "h", "pid": 2**22 - 1, "since": "", "machine": lock._own.machine, "started": "1", "token": "t"}
    (run / LOCK).write_text(json.dumps(gone))
    found = status(run, state)
    assert found and found.kind == "failed" and "broke off" in found.text


def test_a_folder_that_does_not_tell_has_no_status(run: Path) -> None:
    assert status(run) is None
    assert 'class="badge' not in write_report(run).read_text()


def test_a_note_that_is_damaged_is_said(run: Path) -> None:
    (run / ENDED).write_text("{")
    with pytest.raises(UserError, match=r"ended\.json is damaged"):
        write_report(run)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    data = write_records(tmp_path / "data.json", mixed_records(9))
    evaluation = {"every": 1, "limit": 2, "blind_limit": 0}
    return tables(
        tmp_path, data, data={"eval": str(PARITY / "traj_lora.json")}, eval=evaluation,
        train={"max_steps": 4, "per_device_batch_size": 2}, checkpoint={"every": 1},
    )  # fmt: skip


@pytest.fixture
def handlers() -> Iterator[None]:
    """A process that SIGTERM would end; afterwards all is as it was."""
    known = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, known)


@pytest.mark.slow
@pytest.mark.usefixtures("handlers")
def test_a_stopped_run_says_so_in_its_report_and_a_finished_one_no_more(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_step, run = step_file.seed_step, tmp_path / "run"

    def asked(seed: int, step: int, rank: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(seed, step, rank)

    with monkeypatch.context() as patch:
        patch.setattr(step_file, "seed_step", asked)
        with pytest.raises(Interrupted):
            verb.train(make_recipe(settings), Interruption().listen())
    assert "stopped by SIGTERM at step 3 of 4; the same command goes on" in (run / "report.html").read_text()
    verb.train(make_recipe(settings))
    assert status(run) == Status("finished", "finished")
    assert '<span class="badge finished">finished</span>' in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_an_error_ends_says_which_and_goes_on_afterwards(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = train_until(settings, 2)
    assert status(run) == Status("failed", "ended by an error at step 2 of 4: Killed")
    (run / ENDED).unlink()  # as after a kill
    assert status(run) == Status("failed", "broke off at step 2 of 4: no process runs it any more")
    verb.train(make_recipe(settings))
    assert status(run) == Status("finished", "finished")


@pytest.mark.slow
def test_a_start_that_is_refused_leaves_the_note_of_the_run_that_goes_on(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run").mkdir()
    lock.take()
    with pytest.raises(UserError, match="is being written"):
        verb.train(make_recipe(settings))
    assert not (tmp_path / "run" / ENDED).exists()
    lock.release()


@pytest.mark.usefixtures("plots")
@pytest.mark.slow
def test_the_report_shows_the_data_and_the_mix_that_was_trained_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    other = write_records(tmp_path / "other.json", [talk(n, f"Q{n}", "always <b>so</b>") for n in range(3)])
    sources = [{"path": settings["data"]["train"]}, {"path": str(other), "weight": 3.0}]
    settings["data"] |= {"train": sources}
    settings["train"] = {"per_device_batch_size": 2}
    settings["eval"]["every"] = 1000
    verb.train(make_recipe(settings))
    run = read_run(tmp_path / "run")
    assert details.source_rows(run) == [("data.json", 9, 0.5, 0.5), ("other.json", 3, 0.5, 0.5)]
    assert ("always <b>so</b>", 3, 0.25) in details.common_answers(run)
    assert details.data_rows(run)[0] == ("records", ["12", "8"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The mix of sources" in page and "always &lt;b&gt;so&lt;/b&gt;" in page
    assert page.count("Lengths of the") >= 2 and "50.0\u00a0%" in page


def test_a_run_without_figures_has_no_section_of_them(run: Path) -> None:
    assert 'id="data"' not in write_report(run).read_text()


def test_no_percent_sign_can_stand_alone_at_the_start_of_a_line(run: Path) -> None:
    body = write_report(run).read_text().split("<body>")[1].split("<script>")[0]
    sentences = [part.split("</")[0] for tag in ('class="sentence">', "<li>", "<dd>") for part in body.split(tag)[1:]]
    assert any("\u00a0%" in text for text in sentences) and not any(" %" in text for text in sentences)
