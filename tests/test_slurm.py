"""launch/slurm.sh with SLURM's commands played by scripts: what is launched, and when the job is queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "launch" / "slurm.sh"
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" > "$PLAY/requeued"; fi',
    "srun": 'shift; echo $$ > "$PLAY/step"; exec "$@"',
    "scancel": '[ "$*" = "--signal=TERM 7.0" ] && kill -TERM "$(cat "$PLAY/step")"',
    # A training that is asked to end takes a while to save; the launcher makes 1 of its code 75.
    "accelerate": 'echo "$@" > "$PLAY/launched"; trap "sleep 0.5; touch $PLAY/saved; exit 1" TERM; '
    '[ -z "$FAILS" ] || exit 3; for _ in $(seq 100); do sleep 0.1; done',
}


@pytest.fixture
def play(tmp_path: Path) -> Path:
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(play: Path, fails: str = "") -> "subprocess.Popen[str]":
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}
    own = {"PATH": f"{play}:{os.environ['PATH']}", "PLAY": str(play), "FAILS": fails, "SLURM_GPUS_ON_NODE": "8"}
    command = ["bash", str(SCRIPT), "recipe.toml", "train.epochs=2"]
    return subprocess.Popen(command, env=os.environ | slurm | own, text=True)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_to_end_saves_first_and_is_queued_again(play: Path, number: signal.Signals) -> None:
    job = start(play)
    until = time.monotonic() + 10
    while not (play / "launched").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # for the trap
    job.send_signal(number)
    assert job.wait(20) == 0
    assert (play / "saved").exists()
    assert (play / "requeued").read_text() == "requeue 7\n"
    assert (play / "launched").read_text().split() == [
        *("launch", "--config_file", "launch/multinode_zero3.yaml", "--num_machines", "2", "--machine_rank", "1"),
        *("--num_processes", "16", "--main_process_ip", "node-a", "--main_process_port", "20007"),
        *("-m", "llava_accel.train", "recipe.toml", "train.epochs=2"),
    ]


def test_a_job_that_fails_is_not_queued_again(play: Path) -> None:
    assert start(play, fails="yes").wait(20) == 3
    assert not (play / "requeued").exists()
