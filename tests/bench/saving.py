"""What a checkpoint of a base of 480 M weights that is trained in full costs its run: seconds, main memory, slower steps.

    python tests/bench/memory.py make BASE
    accelerate launch --config_file launch/fsdp2.yaml --num_processes 2 tests/bench/saving.py BASE [--background | --dcp]

A JSON line for each rank. "save_s" is what training waits, "save_cpu_s" the processor's time in it, "written_s" is when the
checkpoint has its name, and "save_mib" is what the process takes in between on top of what it has before. "step_s" is the
median of the steps before, "step_behind_s" that of the first ones after, behind which it may be written. With --dcp
torch.distributed.checkpoint writes instead: weights into safetensors files by rank, joined into whole ones, moments into its
own form; nothing is hashed, flushed or read back. Not part of the suite: a checkpoint takes 5.8 GB of disk.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

import llava_accel.train as verb
from bench.memory import Peak
from helpers.runs import PARITY, talk, write_records
from llava_accel.checkpoint import store
from llava_accel.recipe import Recipe, make_recipe

SAVED_AT, STEPS_BEHIND = 2, 4


class Done(Exception):
    """What is to be measured is measured."""


def recipe(base: Path, folder: Path, background: bool | None) -> Recipe:
    """Steps of two short questions, one on each rank."""
    records = [talk(number, "What do you see?", "a red circle", f"t{number % 8}.png") for number in range(64)]
    checkpoint: dict[str, Any] = {"every": SAVED_AT, "verify": False}
    data = folder / f"data-{os.environ.get('RANK', '0')}.json"
    return make_recipe(
        {
            "run": {"name": "saving", "output_dir": str(folder / "run"), "precision": "fp32", "resume": "never"},
            "model": {"base": str(base), "template": "v1", "train": "full"},
            "data": {
                "train": str(write_records(data, records)),
                "images": str(PARITY / "images"),
                "cache_dir": str(folder / "cache"),
                "workers": 0,
            },
            "train": {"per_device_batch_size": 1, "accumulation_steps": 1},
            "checkpoint": checkpoint | ({} if background is None else {"background": background}),
        }
    )


class Measured:
    """Times and peaks of one run: it saves at one step, takes a few more, and is ended."""

    def __init__(self, folder: Path, *, dcp: bool, behind: bool) -> None:
        self._peak, self._folder, self._dcp, self._is_behind = Peak(), folder, dcp, behind
        self._step, self._save, self._commit = verb.train_step, store.Checkpoints.save, store.commit
        self._before: list[float] = []
        self._behind: list[float] = []
        self._begun = 0.0
        self.found: dict[str, float | int] = {}

    def install(self) -> None:
        """Watch steps and saves from now on."""
        verb.train_step = self._timed_step  # pyright: ignore[reportAttributeAccessIssue]
        store.commit = self._noted_commit
        measured = self
        store.Checkpoints.save = lambda checkpoints, enter: measured._timed_save(checkpoints, enter)  # pyright: ignore[reportAttributeAccessIssue]

    def _timed_step(self, run: Any, prepared: Any, *rest: Any) -> Any:
        self._prepared = prepared
        is_behind, since = bool(self._begun), time.perf_counter()
        step = self._step(run, prepared, *rest)
        (self._behind if is_behind else self._before).append(time.perf_counter() - since)
        if len(self._behind) == STEPS_BEHIND:
            self.found["behind_mib"] = self._peak.take()["own"] - self._own
            raise Done
        return step

    def _timed_save(self, checkpoints: Any, enter: Any) -> bool:
        if self._begun:
            return True
        self._own = _own_now()
        self._peak.take()
        torch.distributed.barrier()
        self._begun, cpu = time.perf_counter(), time.process_time()
        saved = self._save_by_dcp() if self._dcp else self._save(checkpoints, enter)
        self.found["save_s"] = round(time.perf_counter() - self._begun, 1)
        self.found["save_cpu_s"] = round(time.process_time() - cpu, 1)
        self.found["save_mib"] = self._peak.take()["own"] - self._own
        self.found["step_s"] = round(median(self._before), 2)
        if not self._is_behind:
            raise Done
        return saved

    def _noted_commit(self, *arguments: Any, **named: Any) -> None:
        self._commit(*arguments, **named)
        self.found["written_s"] = round(time.perf_counter() - self._begun, 1)

    def _save_by_dcp(self) -> bool:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        weights, moments = get_state_dict(self._prepared.model, self._prepared.optimizer.optimizer)
        whole = HuggingFaceStorageWriter(
            str(self._folder / "weights"), save_distributed=True, enable_consolidation=True
        )
        save(weights, storage_writer=whole)
        save(moments, storage_writer=FileSystemWriter(str(self._folder / "moments"), sync_files=False))
        return True

    def lines(self) -> dict[str, float | int]:
        """What was found, the steps behind included."""
        return self.found | ({"step_behind_s": round(median(self._behind), 2)} if self._behind else {})


def _own_now() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--background", action=argparse.BooleanOptionalAction, help="left out: the key is left out")
    parser.add_argument("--dcp", action="store_true", help="torch.distributed.checkpoint writes")
    arguments = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"saving-{os.environ.get('MASTER_PORT', '0')}"
    folder.mkdir(exist_ok=True)
    measured = Measured(folder, dcp=arguments.dcp, behind=bool(arguments.background))
    measured.install()
    try:
        verb.train(recipe(arguments.base, folder, arguments.background))
    except Done:
        print(json.dumps({"rank": int(os.environ.get("RANK", "0")), **measured.lines()}), flush=True)
    torch.distributed.barrier()
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
