"""Runs that tests ask for, made by processes that wait for them, each made once."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from torch import Tensor

from helpers.forked import Forked
from helpers.runs import MEASURED, PARITY, Tables, distance, metrics, mixed_records, talk, write_records
from helpers.tiny import make_llava

DRIVER = Path(__file__).parent / "driver.py"
LAUNCH = Path(__file__).parents[2] / "launch"
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
GLOBAL_BATCH = 8
NUM_RECORDS = 13
"""Five over one global batch: every second window is short, and not all its micro-batches are equally large."""
STEPS = 3
"""The second is a short one, and the third begins another epoch."""
TOLERANCE = 1e-5
_AFTER_AN_ERROR_S = 60.0


def environment() -> dict[str, str]:
    """One thread a process: several on few cores slow each other down about tenfold."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def launch_command(profile: str, ranks: int, *extra: str) -> list[str]:
    """What a user types, without the script."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    port = ["--main_process_port", "0"]
    return [*launcher, "--config_file", str(LAUNCH / f"{profile}.yaml"), "--num_processes", str(ranks), *port, *extra]


def ranks(launcher: int) -> list[psutil.Process]:
    """The processes that this process has launched, in the order of their ranks."""
    return sorted(psutil.Process(launcher).children(), key=lambda rank: (rank.create_time(), rank.pid))


class Workers:
    """Processes that do one job after the other, together."""

    def __init__(self, folder: Path, ranks: int) -> None:
        folder.mkdir()
        self._folder, self._ranks, self._number = folder, ranks, 0
        script = [str(DRIVER), str(folder), str(os.getpid())]
        command = [sys.executable, *script] if ranks == 1 else [*launch_command("ddp", ranks), *script]
        self._output = (folder / "output.txt").open("w")
        self._process = Forked(command, env=environment(), stdout=self._output, stderr=subprocess.STDOUT)

    def __call__(self, job: dict[str, Any], seconds: float = 300.0) -> list[str]:
        """Do a job; returns what went wrong, a traceback for each rank that has one."""
        self._write(job)
        done = [self._folder / f"{self._number:04d}.{rank}.done" for rank in range(self._ranks)]
        until = time.monotonic() + seconds
        while not all(path.exists() for path in done):
            if any(path.exists() and path.read_text() for path in done):  # the others may wait for it in a reduction
                until = min(until, time.monotonic() + _AFTER_AN_ERROR_S)
            late = time.monotonic() > until
            assert self._process.poll() is None and not late, self._told(job, late)
            time.sleep(0.01)
        self._number += 1
        return [text for path in done if (text := path.read_text())]

    def end(self) -> None:
        """Let them go."""
        if self._process.poll() is None:
            self._write(None)
            self._process.wait(60)
        self._output.close()

    def _write(self, job: dict[str, Any] | None) -> None:
        unfinished = self._folder / "next.tmp"
        unfinished.write_text(json.dumps(job))
        unfinished.rename(self._folder / f"{self._number:04d}.json")

    def _told(self, job: dict[str, Any], late: bool) -> str:
        self._process.terminate()
        told = [path.read_text() for path in self._folder.glob(f"{self._number:04d}.*.done")]
        tail = (self._folder / "output.txt").read_text()[-3000:]
        return "\n".join([f"{job['name']}: {'no end' if late else 'the processes died'}", *told, tail])


class Lab:
    """A tiny LLaVA, a file of records with unequal numbers of targets, and the runs made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._workers: dict[int, Workers] = {}
        self._done: dict[str, list[str]] = {}
        make_llava(folder / "base")
        write_records(folder / "data.json", mixed_records(NUM_RECORDS))
        write_records(folder / "text.json", [talk(n, "Tell me.", "a word " * (1 + n % 5)) for n in range(NUM_RECORDS)])

    def run(
        self, profile: str, ranks: int, micro_batches: int = 1, /, *, name: str = "", mutant: str = "", **changes: Any
    ) -> Path:
        """The folder of a run of `STEPS` steps of 8 records, split over so many ranks and micro-batches.

        Args:
            name: Tells apart runs of equal settings.
            changes: Tables of the recipe that differ.

        Raises:
            AssertionError: the run failed; with its tracebacks.
        """
        key, errors = self._run(profile, ranks, micro_batches, name, mutant, changes)
        assert not errors, "\n".join(errors)
        return self.folder / "runs" / key

    def errors(self, profile: str, ranks: int, micro_batches: int = 1, /, **changes: Any) -> list[str]:
        """The traceback of every rank of a run that fails."""
        return self._run(profile, ranks, micro_batches, "", "", changes)[1]

    def train(self, profile: str, ranks: int, tables: Tables) -> Path:
        """The folder of a run of other tables."""
        job = {"name": tables["run"]["name"], "profile": profile, "tables": tables, "mutant": ""}
        errors = self._do(ranks, job)
        assert not errors, "\n".join(errors)
        return Path(tables["run"]["output_dir"])

    def reference(self, **changes: Any) -> Path:
        """One process with one micro-batch a window."""
        return self.run("cpu", 1, 1, **changes)

    def end(self) -> None:
        """Let all processes go."""
        for workers in self._workers.values():
            workers.end()
        self._workers = {}

    def tables(self, name: str, ranks: int, micro_batches: int, changes: dict[str, dict[str, Any]]) -> Tables:
        """The recipe: fp32, no evaluation, the tower in every step."""
        tables: Tables = {
            "run": {"name": "run", "output_dir": str(self.folder / "runs" / name), "precision": "fp32"},
            "model": {"base": str(self.folder / "base"), "template": "v1"},
            "data": {
                "train": str(self.folder / "data.json"),
                "images": str(PARITY / "images"),
                "cache_dir": str(self.folder / "cache"),
                "cache_features": False,
                "workers": 0,
            },
            "optim": {
                "learning_rate": 2e-3,
                "projector_learning_rate": 2e-3,
                # The first rate is 0: Adam divides a first gradient by itself, and rounding by rounding where it is tiny.
                "warmup_fraction": 0.2,
                # About half of the norms met here: clipping changes every step.
                "max_grad_norm": 1.0,
            },
            "train": {
                "max_steps": STEPS,
                "per_device_batch_size": GLOBAL_BATCH // ranks // micro_batches,
                "accumulation_steps": micro_batches,
            },
            "eval": {"at_start": False, "every": 1000, "max_new_tokens": 3, "train_limit": 0},
            "checkpoint": {"every": 1000, "verify": False},
        }
        for table, keys in changes.items():
            tables.setdefault(table, {}).update(copy.deepcopy(keys))
        if tables["model"].get("train", "lora") == "lora":
            tables["model"].setdefault("lora", {"rank": 4, "alpha": 8, "dropout": 0.0})
        return tables

    def _run(
        self, profile: str, ranks: int, micro_batches: int, name: str, mutant: str, changes: dict[str, Any]
    ) -> tuple[str, list[str]]:
        settings = json.dumps([profile, ranks, micro_batches, name, mutant, changes], sort_keys=True)
        if settings not in self._done:
            key = f"{len(self._done):03d}-{profile}-{ranks}x{micro_batches}{name}"
            job = {"name": key, "profile": profile, "tables": self.tables(key, ranks, micro_batches, changes)}
            self._done[settings] = [key, *self._do(ranks, job | {"mutant": mutant})]
        return self._done[settings][0], self._done[settings][1:]

    def _do(self, ranks: int, job: dict[str, Any]) -> list[str]:
        if ranks not in self._workers:
            self._workers[ranks] = Workers(self.folder / f"jobs-{ranks}-{time.monotonic_ns()}", ranks)
        try:
            return self._workers[ranks](job)
        except AssertionError:
            del self._workers[ranks]  # others will do the next job
            raise


def trains(what: str, **model: Any) -> dict[str, Any]:
    """The [model] table that trains this."""
    return {"model": {"train": what, **model}}


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an export or a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def difference(one: Path, other: Path) -> float:
    """The largest relative distance of two trained tensors of the same name."""
    return distance(weights(one / "export"), weights(other / "export"))


def flat_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl with the evaluation's values among the others.

    Less what a clock decides, and less the share of padding, in which the splits differ by their nature.
    """
    lines = [{**line, **line.get("eval", {})} for line in metrics(run)]
    return [{k: v for k, v in line.items() if k not in ("eval", "padding", *MEASURED)} for line in lines]


def assert_same_metrics(one: Path, other: Path) -> None:
    """Line by line, within the tolerance."""
    ours, reference = flat_metrics(one), flat_metrics(other)
    assert len(ours) == len(reference)
    for line, expected in zip(ours, reference, strict=True):
        assert line == pytest.approx(expected, rel=TOLERANCE)
