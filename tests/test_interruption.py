"""A run that is asked to end saves, says so by its exit code, and goes on to the same numbers."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.forked import Forked
from helpers.interrupted import STEPS, assert_same_run, checkpoints, newest, settings, train
from helpers.jobs import Lab, launch_command, ranks
from helpers.kinds import ALL_KINDS
from helpers.runs import PARITY, Tables, metrics, tables, talk, trained, write_records
from llava_accel.checkpoint import store as checkpoint
from llava_accel.console import command_line as cli
from llava_accel.data.pixels import ImageReader
from llava_accel.data.tiling import ImageView
from llava_accel.exceptions import SIGNALS, Interrupted
from llava_accel.loop import step as step_file
from llava_accel.recipe import make_recipe
from llava_accel.recipe.toml import to_toml
from llava_accel.runtime.signals import Interruption
from llava_accel.scoring import held_out as evaluation

pytestmark = pytest.mark.slow

ROOT = PARITY.parents[1]


@pytest.fixture(autouse=True)
def _handlers() -> Any:
    """A process that ignores no signal, as one in the background of a shell does; afterwards all is as it was."""
    known = {one: signal.getsignal(one) for one in SIGNALS}
    for one in SIGNALS:
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
    yield
    for one, handler in known.items():
        signal.signal(one, handler)


def _sent_at(function: Callable[..., Any], call: int, number: signal.Signals) -> Callable[..., Any]:
    """The function, at whose n-th call this process gets a signal."""
    calls = iter(range(1, 1000))

    def sending(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    return sending


def _interrupted(recipe: Tables, number: signal.Signals) -> Interrupted:
    since = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        verb.train(make_recipe(recipe), Interruption().listen())
    assert time.monotonic() - since < 30
    assert caught.value.received == number
    return caught.value


@pytest.mark.parametrize(
    ("place", "call", "number", "steps", "evaluated"),
    [
        ((step_file, "seed_step"), 4, signal.SIGTERM, 4, [0, 3]),
        ((step_file, "seed_step"), 1, signal.SIGUSR1, 1, [0]),
        ((step_file, "seed_step"), 1, signal.SIGUSR2, 1, [0]),
        ((step_file, "seed_step"), 1, signal.SIGXCPU, 1, [0]),
        ((checkpoint, "commit"), 1, signal.SIGTERM, 2, [0]),
        ((evaluation, "answer"), 2, signal.SIGTERM, 3, [0]),
        ((evaluation, "answer"), 3, signal.SIGUSR1, 6, [0, 3]),
        ((step_file, "seed_step"), 5, signal.SIGINT, 5, [0, 3]),
    ],
    ids=[
        "a step",
        "the first step",
        "a notice",
        "no time left",
        "a save",
        "answering",
        "an evaluation that comes with a save",
        "ctrl-c",
    ],
)
def test_a_signal_in(
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[Any, str],
    call: int,
    number: signal.Signals,
    steps: int,
    evaluated: list[int],
) -> None:
    owner, name = place
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _sent_at(getattr(owner, name), call, number))
        interrupted = _interrupted(settings(tmp_path, data), number)
    run = tmp_path / "run"
    assert interrupted.exit_code == (130 if number == signal.SIGINT else 75)
    assert checkpoints(run)[-1] == f"step-{steps:06d}"
    assert [line["step"] for line in metrics(run) if "eval" in line] == evaluated
    assert not (run / "export").exists()
    assert_same_run(train(settings(tmp_path, data)), whole)


def test_a_signal_before_the_first_step_leaves_nothing_to_resume_from(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answer", _sent_at(evaluation.answer, 1, signal.SIGTERM))
        _interrupted(settings(tmp_path, data), signal.SIGTERM)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert_same_run(train(settings(tmp_path, data)), whole)


def test_a_signal_ends_the_wait_for_data(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = ImageReader.load, iter(range(1000))

    def hanging(self: ImageReader, view: ImageView) -> Any:
        if next(calls) == 5:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60)
        return load(self, view)

    unwatched = settings(tmp_path, data, data={"eval": "", "cache_features": False})
    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "load", hanging)
        _interrupted(unwatched, signal.SIGTERM)
    assert 0 < len(metrics(tmp_path / "run")) < STEPS
    weights, expected = trained(train(unwatched) / "export"), trained(newest(whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_ctrl_c_twice_ends_at_once() -> None:
    Interruption().listen().saves_from_now_on()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what the terminal has sent already
    time.sleep(0.6)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_exit_code_asks_for_another_start(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        cli.run(interrupted)
    assert caught.value.code == os.EX_TEMPFAIL == 75
    assert capsys.readouterr().err == ""


def _launched(command: list[str], **environment: str) -> "subprocess.Popen[str]":
    return Forked(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_while_the_data_is_read_ends_the_run_at_once(
    tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    many = [talk(n, f"What is number {n}?", " ".join(str(n + step) for step in range(200))) for n in range(40_000)]
    recipe = tables(tmp_path, write_records(tmp_path / "data.json", many), data={"workers": workers})
    with TemporaryDirectory() as temporary:  # a path that is short enough for sockets
        command = [sys.executable, "-m", "llava_accel.train", _file(tmp_path, recipe)]
        _end_while_data_is_read(_launched(command, TMPDIR=temporary), tmp_path, number)
        assert not list(Path(temporary).glob("pymp-*"))


def _end_while_data_is_read(process: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals) -> None:
    until = time.monotonic() + 120
    while not list((tmp_path / "cache" / "tables").glob("*.arrow")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)  # every record is tokenised now, which takes longer
    since = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - since < 3
    assert process.returncode == (130 if number == signal.SIGINT else 75), output
    assert f"{number.name}: ended before its next step" in output and "Traceback" not in output
    assert not list((tmp_path / "cache").glob("surveys/*"))


def _wait_for_steps(run: Path, count: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count('"loss"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} has not come to {count} steps")


def _long(folder: Path, data: Path, **changes: Any) -> Tables:
    """More steps than a signal takes to arrive; all epochs alike."""
    return settings(folder, data, data={"workers": 1}, train={"epochs": 6, **changes}, eval={"every": 40})


def _file(folder: Path, tables: Tables) -> str:
    (folder / "recipe.toml").write_text(to_toml(tables))
    return str(folder / "recipe.toml")


def test_a_scheduler_that_signals_every_process_of_the_job(data: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, _long(tmp_path, data))
    process = _launched([sys.executable, "-m", "llava_accel.train", file])
    _wait_for_steps(tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGTERM)  # workers that decode images, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "SIGTERM: ended at step" in output and "Traceback" not in output
    assert len(checkpoints(tmp_path / "run")) >= 1


# Of zero3: test_backends.py lets a rank without data take such a step under every engine.
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"] if ALL_KINDS else ["fsdp2"])
def test_one_of_two_ranks_is_asked_and_both_save_and_end(lab: Lab, data: Path, tmp_path: Path, engine: str) -> None:
    """And what they go on to is what two ranks that nothing interrupted come to.

    The rank that is asked takes no more data: all ranks compute a last step with nothing of its own, and throw it away.
    """
    whole, broken = (_long(tmp_path / name, data, per_device_batch_size=1) for name in ("whole", "broken"))
    (tmp_path / "broken").mkdir()
    file = _file(tmp_path / "broken", broken)
    process = _launched([*launch_command(engine, 2), "-m", "llava_accel.train", file])
    _wait_for_steps(tmp_path / "broken" / "run", 3)
    ranks(process.pid)[1].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert "SIGUSR1: ended at step" in output and process.returncode != 0, output
    taken = metrics(tmp_path / "broken" / "run")
    again = lab.train(engine, 2, broken)
    assert metrics(again)[: len(taken)] == taken, "with their times: no step is taken twice"
    assert len(metrics(again)) > len(taken)
    assert_same_run(again, lab.train(engine, 2, whole))
