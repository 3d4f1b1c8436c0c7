"""Kills runs at random moments and holds what they end with against a run that nobody killed, bit for bit.

    python tests/bench/soak.py [--kills 50] [--engine none ddp zero3] [--seed 0] [--fork] [--background]

The model is that of the quick start, 4-bit, with dropout, evaluation and a worker. Each run gets SIGKILL (all of its
processes at once, by surprise) at a moment drawn evenly between its first sign of life and its end: while it reads the
data, in a step, in an evaluation, in a save, in the export. The same command then goes on. Every line of
metrics.jsonl but for the clock, and every tensor of the export, of best/ and of the last checkpoint have to be the same.

With --fork the processes of a run are forks of this one, which has imported the package: the same program under the same
variables that the launcher sets, without the seconds of importing before every kill and after it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))

import llava_accel.train  # noqa: F401  once for all the processes that are forked
from helpers.driver import profile_environment
from helpers.jobs import weights
from helpers.runs import metrics, without_times
from llava_accel.console import command_line
from llava_accel.recipe.toml import to_toml

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "yellow", "black")
PATIENCE_S = 600.0  # no run takes so long: what does hangs


def make_data(folder: Path) -> Path:
    """Images of one shape each, and two questions on each."""
    folder.mkdir()
    records = []
    for number in range(35):
        colour, is_round = COLOURS[number % len(COLOURS)], number % 3 == 0
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if is_round else draw.rectangle)((12, 12, 52, 52), fill=colour)
        image.save(folder / f"{number}.png")
        asked = {"What colour is it?": colour, "What shape is it?": "circle" if is_round else "rectangle"}
        for place, (question, answer) in enumerate(asked.items()):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{number}-{place}", "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records[:61]))  # the last window of an epoch is a short one
    (folder / "eval.json").write_text(json.dumps(records[61:]))
    return folder


def write_recipe(folder: Path, data: Path, ranks: int, background: bool) -> Path:
    """A recipe whose run is `folder / "run"`: 8 steps of two epochs, saved and evaluated out of time with each other.

    Args:
        background: Checkpoints are written while the next steps run, and the model is trained in full, by all ranks.
    """
    folder.mkdir(parents=True)
    tables = {
        "run": {"name": "soak", "output_dir": str(folder / "run")},
        "model": {
            "base": str(ROOT / "llava_accel/quickstart/base"),
            "quantization": {"bits": 4},
            "lora": {"rank": 8, "alpha": 16, "dropout": 0.2},
        },
        "data": {
            "train": str(data / "train.json"),
            "eval": str(data / "eval.json"),
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
        "train": {"epochs": 2, "per_device_batch_size": 8 // ranks, "accumulation_steps": 2},
        "eval": {"every": 3, "metric": "vqa_accuracy", "max_new_tokens": 2, "blind_limit": 0},
        "checkpoint": {"every": 2, "background": background},
    }
    if background:
        tables["model"] = {"base": tables["model"]["base"], "train": "full"}
    (folder / "recipe.toml").write_text(to_toml(tables))
    return folder / "recipe.toml"


class Run(Protocol):
    """What is needed of a started run: of `subprocess.Popen`, or of forks."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def start(recipe: Path, engine: str, fork: bool) -> Run:
    """The command of a user, as a process group of its own."""
    if fork:
        return Forks(recipe, engine)
    verb = ["-m", "llava_accel.train", str(recipe)]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"launch/{engine}.yaml")]
    command = verb if engine == "none" else [*launcher, "--num_processes", "2", "--main_process_port", "0", *verb]
    with (recipe.parent / "log").open("ab") as log:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


class Forks:
    """A run whose ranks are forks: one leader of the group, which forks the ranks and ends as they do."""

    def __init__(self, recipe: Path, engine: str) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        log = os.open(recipe.parent / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        children = []
        for rank in range(1 if engine == "none" else 2):
            if not (child := os.fork()):
                self._be(rank, recipe, engine)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in children]
        os._exit(max(map(abs, codes)))

    def _be(self, rank: int, recipe: Path, engine: str) -> None:
        code = 1
        try:
            if engine != "none":
                os.environ.update(profile_environment(engine))
                port = 20_000 + os.getpgrp() % 40_000
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
            os.chdir(ROOT)
            sys.argv = ["train", str(recipe)]
            command_line.start("train")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        limit = time.monotonic() + (timeout or PATIENCE_S)
        while self.poll() is None:
            if time.monotonic() > limit:
                raise TimeoutError(f"the run takes longer than {timeout} s")
            time.sleep(0.01)
        assert self._code is not None
        return self._code


def finish(process: Run, recipe: Path) -> None:
    """Wait for the end of a run that nobody disturbs any more."""
    try:
        code = process.wait(PATIENCE_S)
    finally:
        kill(process)
    assert code == 0, f"exit code {code}: {(recipe.parent / 'log').read_text()[-3000:]}"


def kill(process: Run) -> None:
    """All processes of the group, none of which can do anything about it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while True:  # what waits for the disk ends later than the leader
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    except ProcessLookupError:
        return


def first_sign(process: Run, recipe: Path, since: float) -> None:
    """Return as soon as the run has written something that it did not find there."""
    place, limit = recipe.parent / "run" / "environment.json", time.monotonic() + PATIENCE_S
    while not place.exists() or place.stat().st_mtime < since:
        assert process.poll() is None and time.monotonic() < limit, (recipe.parent / "log").read_text()[-3000:]
        time.sleep(0.005)


def run_whole(recipe: Path, engine: str, fork: bool) -> float:
    """An undisturbed run; the seconds from its first sign of life to its end."""
    process = start(recipe, engine, fork)
    first_sign(process, recipe, 0.0)
    since = time.monotonic()
    finish(process, recipe)
    return time.monotonic() - since


def where(run: Path) -> str:
    """How far a killed run has come."""
    lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return f"{lines} lines of metrics, {', '.join(saved) or 'no checkpoint'}{', export' * (run / 'export').exists()}"


def differences(run: Path, whole: Path) -> list[str]:
    """What is not the same in the two run folders."""
    found = []
    if without_times(metrics(run)) != without_times(metrics(whole)):
        found.append("metrics.jsonl")
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    for name in ("export", "best", f"checkpoints/{last}", f"checkpoints/{last}/engine"):
        ours, theirs = weights(run / name), weights(whole / name)
        assert theirs, f"{whole / name} holds nothing"
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in theirs):
            found.append(name)
    if sorted(path.name for path in (run / "checkpoints").iterdir()) != sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    ):
        found.append("the checkpoints that are kept")
    return found


def soak(
    folder: Path, data: Path, engine: str, kills: int, moments: random.Random, *, fork: bool, background: bool
) -> int:
    """Kill `kills` runs of an engine; the number of those that ended like the undisturbed one."""
    ranks = 1 if engine == "none" else 2
    reference = write_recipe(folder / engine / "whole", data, ranks, background)
    seconds = run_whole(reference, engine, fork)
    name = "one process" if engine == "none" else f"two processes, {engine}"
    print(f"{name}: an undisturbed run takes {seconds:.1f} s behind its start", flush=True)
    same = killed = 0
    while killed < kills:
        recipe = write_recipe(folder / engine / "killed", data, ranks, background)
        run, since = recipe.parent / "run", time.time()
        process = start(recipe, engine, fork)
        first_sign(process, recipe, since)
        time.sleep(moments.uniform(0, seconds))
        ended_first = process.poll() is not None
        kill(process)
        state = where(run)
        if not ended_first:
            killed += 1
            finish(start(recipe, engine, fork), recipe)
            found = differences(run, reference.parent / "run")
            same += not found
            verdict = f"DIFFERENT: {', '.join(found)}" if found else "the same"
            print(f"{killed}/{kills} {name}: killed at {state}: {verdict}", flush=True)
            if found:
                shutil.copytree(recipe.parent, folder / engine / f"different-{killed}")
        shutil.rmtree(recipe.parent)
    return same


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="over all engines")
    engines = ("none", "ddp", "zero2", "zero3", "fsdp2")
    parser.add_argument("--engine", nargs="+", choices=engines, default=["none", "ddp"], help="none = one process")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fork", action="store_true", help="without the seconds of importing")
    parser.add_argument("--background", action="store_true", help="train in full, and save behind the steps")
    options = parser.parse_args(arguments)
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
    torch.set_num_threads(1)
    moments, same = random.Random(options.seed), 0
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    data = make_data(folder / "data")
    for place, engine in enumerate(options.engine):
        count = len(range(place, options.kills, len(options.engine)))
        same += soak(folder, data, engine, count, moments, fork=options.fork, background=options.background)
    print(f"{same} of {options.kills} killed runs ended like the undisturbed one, bit for bit")
    if same == options.kills:
        shutil.rmtree(folder)
        return 0
    print(f"what differs is in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
