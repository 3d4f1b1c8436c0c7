"""Jobs for the driver, and the runs that they leave behind."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runs import PARITY, Tables, mixed_records, write_records
from safetensors.torch import load_file
from tiny import make_llava
from torch import Tensor

DRIVER = Path(__file__).parent / "driver.py"
LAUNCH = Path(__file__).parents[2] / "launch"
GLOBAL_BATCH = 8
NUM_RECORDS = 13
"""Five over one global batch: every second window is short, and not all its micro-batches are equally large."""


def environment() -> dict[str, str]:
    """One thread a process: several on few cores slow each other down about tenfold."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass
class Lab:
    """A tiny LLaVA, a file of records with unequal numbers of targets, and the runs made from them."""

    folder: Path
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_llava(self.folder / "base")
        write_records(self.folder / "data.json", mixed_records(NUM_RECORDS))

    def tables(self, name: str, ranks: int = 1, micro_batches: int = 1, **changes: dict[str, Any]) -> Tables:
        """Five steps of 8 records, split over so many ranks and micro-batches; fp32, no evaluation."""
        tables: Tables = {
            "run": {"name": "run", "output_dir": str(self.folder / "runs" / name), "precision": "fp32"},
            "model": {
                "base": str(self.folder / "base"),
                "template": "v1",
                "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            },
            "data": {
                "train": str(self.folder / "data.json"),
                "images": str(PARITY / "images"),
                "cache_dir": str(self.folder / "cache"),
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
                "max_steps": 5,
                "per_device_batch_size": GLOBAL_BATCH // ranks // micro_batches,
                "accumulation_steps": micro_batches,
            },
            "eval": {"at_start": False, "every": 1000, "max_new_tokens": 3},
            "checkpoint": {"every": 1000},
        }
        for table, keys in changes.items():
            tables.setdefault(table, {}).update(copy.deepcopy(keys))
        return tables

    def add(self, name: str, profile: str, tables: Tables, mutant: str | None = None) -> None:
        """One more job for the next `run`."""
        self.jobs.append({"name": name, "profile": profile, "tables": tables, "mutant": mutant})

    def run(self, ranks: int, launch: Path = LAUNCH, seconds: int = 600) -> None:
        """Run the jobs that were added, in one start of so many processes."""
        path = self.folder / f"jobs{ranks}.json"
        path.write_text(json.dumps({"jobs": self.jobs, "launch": str(launch)}))
        self.jobs = []
        command = [sys.executable, str(DRIVER), str(path)]
        if ranks > 1:
            command = [*launch_command("ddp", ranks), str(DRIVER), str(path)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def output(self, name: str) -> Path:
        """The run folder of a job.

        Raises:
            AssertionError: the job failed; with its traceback.
        """
        for path in self.folder.glob(f"{name}.*.error"):
            raise AssertionError(path.read_text())
        return self.folder / "runs" / name

    def error(self, name: str) -> str:
        """The traceback of a job that failed on the main process."""
        return (self.folder / f"{name}.0.error").read_text()


def launch_command(profile: str, ranks: int, *extra: str) -> list[str]:
    """What a user types, without the script."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    port = ["--main_process_port", "0"]
    return [*launcher, "--config_file", str(LAUNCH / f"{profile}.yaml"), "--num_processes", str(ranks), *port, *extra]


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an export or a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
