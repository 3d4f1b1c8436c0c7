"""Every profile from the command that a user types, on two CPU processes: to the end, to a mistake, to a killed rank."""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from helpers.forked import SAY_WHERE, Forked
from helpers.jobs import (
    TOLERANCE,
    Lab,
    assert_same_metrics,
    difference,
    environment,
    flat_metrics,
    launch_command,
    ranks,
)
from helpers.runs import PARITY, metrics
from llava_accel.recipe.toml import to_toml

pytestmark = pytest.mark.slow

MINUTE = 60.0
MULTINODE = "multinode_zero3"


@dataclass
class Launch:
    """A launched training. `text` is all that it has printed."""

    process: subprocess.Popen[str]
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def end(self, seconds: float) -> int:
        """Wait for the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in self._children():
                process.send_signal(SAY_WHERE)
            time.sleep(1)
            raise AssertionError(self.text) from None
        finally:
            for process in (*self._children(), self.process):
                process.kill()

    def _children(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)


class Launches:
    """Starts trainings on the lab's base and data, and ends what a test has left behind."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.run = folder / "run"
        self._started: list[Launch] = []

    def start(self, profile: str, *overrides: str, extra: tuple[str, ...] = (), how: Any = Forked) -> Launch:
        """`accelerate launch --config_file launch/PROFILE.yaml --num_processes 2 -m llava_accel.train RECIPE ...`"""
        tables = self.lab.tables("", 2, 2, {})
        tables["run"]["output_dir"] = str(self.run)
        (self.folder / "recipe.toml").write_text(to_toml(tables))
        command = [*launch_command(profile, 2, *extra), "-m", "llava_accel.train", str(self.folder / "recipe.toml")]
        log = self.folder / f"log-{len(self._started)}.txt"
        with log.open("w") as file:
            process = how([*command, *overrides], stdout=file, stderr=subprocess.STDOUT, text=True, env=environment())
        self._started.append(Launch(process, log))
        return self._started[-1]

    def end(self) -> None:
        """Leave no process behind."""
        for launch in self._started:
            launch.end(0) if launch.process.poll() is not None else launch.process.terminate()
        for launch in self._started:
            launch.end(MINUTE)


@pytest.fixture
def launches(lab: Lab, tmp_path: Path) -> Iterator[Launches]:
    launches = Launches(lab, tmp_path)
    yield launches
    launches.end()


# Every profile is started once in this file, "ddp" in test_start.py too, there to its end by processes that nothing forked.
@pytest.mark.parametrize("profile", ["cpu", "zero2", "zero3_offload"])
def test_a_profile_is_rehearsed_by_the_command_that_a_user_types(launches: Launches, profile: str) -> None:
    launch = launches.start(profile)
    assert launch.end(3 * MINUTE) == 0, launch.text
    assert launch.text.count("rehearsal: ") == 1
    assert_same_metrics(launches.run, launches.lab.reference())
    assert difference(launches.run, launches.lab.reference()) < TOLERANCE


def test_a_killed_rank_ends_the_others_within_a_minute(launches: Launches) -> None:
    launch = launches.start("fsdp2", "train.max_steps=1000000", 'optim.schedule="constant"')
    until = time.monotonic() + 2 * MINUTE
    while not (launches.run / "metrics.jsonl").exists() or len(metrics_so_far(launches.run)) < 3:
        assert launch.process.poll() is None and time.monotonic() < until, launch.text
        time.sleep(0.1)
    ranks(launch.process.pid)[1].send_signal(signal.SIGKILL)
    assert launch.end(MINUTE) != 0
    assert launch.text.count("rehearsal: ") == 1 and "SIGKILL" in launch.text
    # The same steps as with every other profile, up to there.
    expected = [line["num_targets"] for line in metrics(launches.lab.reference())]
    assert [line["num_targets"] for line in metrics_so_far(launches.run)[:3]] == expected[:3]


def metrics_so_far(run: Path) -> list[dict[str, float]]:
    """The whole lines of a file that is being written."""
    text = (run / "metrics.jsonl").read_text()
    (run / "so-far").mkdir(exist_ok=True)
    (run / "so-far" / "metrics.jsonl").write_text(text[: text.rfind("\n") + 1])
    return metrics(run / "so-far")


def test_an_image_that_breaks_on_one_rank_ends_all_with_one_message(launches: Launches, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for file in (PARITY / "images").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    moved = {"images": str(images), "cache_dir": str(tmp_path / "cache")}
    launches.lab.reference(data=moved, train={"max_steps": 1})  # it reads all data through
    broken = images / "t1.png"
    Image.open(broken).save(broken, format="PNG")
    broken.write_bytes(broken.read_bytes()[:-40])
    launch = launches.start("zero3", *(f'data.{key}="{value}"' for key, value in moved.items()))
    assert launch.end(2 * MINUTE) != 0
    (message,) = [line for line in launch.text.splitlines() if line.startswith("error:")]
    assert "data.json, row" in message and "t1.png" in message
    assert "llava_accel/loop" not in launch.text, "another rank had something to add"


def test_a_mistake_that_all_ranks_meet_is_said_once(launches: Launches) -> None:
    launch = launches.start("ddp", "optim.learning_rat=1", how=subprocess.Popen)
    assert launch.end(2 * MINUTE) != 0
    assert launch.text.count("learning_rat = 1") == 1 and "llava_accel/loop" not in launch.text


def test_two_machines_resume_train_and_save_and_one_of_them_writes(launches: Launches, tmp_path: Path) -> None:
    """Between a checkpoint of one machine and one from which it goes on."""
    # A rate that does not depend on the length of the run, so that each part may end sooner than the whole.
    optim = {"schedule": "constant", "warmup_fraction": 0.0, "optimizer": "sgd", "learning_rate": 0.5}
    lab, longer = launches.lab, {"optim": optim, "train": {"max_steps": 5}}
    reference = lab.reference(**longer)
    before = lab.run("zero3", 2, 2, **longer, checkpoint={"every": 2, "keep": 9}) / "checkpoints" / "step-000002"
    common = [f"optim.{key}={json.dumps(value)}" for key, value in optim.items()]
    common += ["train.max_steps=4", f"run.resume={json.dumps(str(before))}"]
    address = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    # The folder is another one on the second machine: what it wrote would be there.
    folders = ([], [f"run.output_dir={json.dumps(str(tmp_path / 'second'))}"])
    first, second = (
        launches.start(MULTINODE, *common, *folder, extra=(*address, "--machine_rank", str(machine)))
        for machine, folder in enumerate(folders)
    )
    for launch in (first, second):
        assert launch.end(3 * MINUTE) == 0, launch.text
    assert not (tmp_path / "second").exists()
    assert [path.name for path in (launches.run / "checkpoints").iterdir()] == ["step-000004"]
    assert first.text.count("rehearsal: ") == 1 and "rehearsal: " not in second.text
    assert "resumed from" in first.text and "resumed from" not in second.text
    expected = {line["step"]: line for line in flat_metrics(reference)}
    ours = {line["step"]: line for line in flat_metrics(launches.run)}
    assert {3, 4} <= ours.keys() and all(
        line == pytest.approx(expected[step], rel=TOLERANCE) for step, line in ours.items()
    )
    after = lab.run("zero3", 2, 2, **longer, run={"resume": str(launches.run / "checkpoints" / "step-000004")})
    assert difference(after, reference) < TOLERANCE


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
