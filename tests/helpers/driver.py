"""Many short runs in one start of the processes: a start costs more than ten runs of five steps on a tiny model.

    accelerate launch --config_file launch/ddp.yaml --num_processes 2 tests/helpers/driver.py FOLDER PID

Every rank takes FOLDER/0000.json, 0001.json and so on as they appear, and leaves what went wrong, or nothing, in
0000.RANK.done. A job is {"name", "profile", "tables", "mutant"}: a recipe under the environment that `accelerate launch`
makes of launch/PROFILE.yaml. They end with a job of null, or when the process PID, who wants the jobs done, is gone.
"""

import gc
import importlib.metadata
import json
import os
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import llava_accel.train as train_module
from llava_accel.model import chat_template, trial
from llava_accel.pages import write
from llava_accel.recipe import make_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import mutants

LAUNCH = Path(__file__).parents[2] / "launch"
_linear = F.linear


def profile_environment(name: str) -> dict[str, str]:
    """The variables that the launcher sets for a profile, apart from those of ranks and ports."""
    arguments = ["--config_file", str(LAUNCH / f"{name}.yaml"), "--num_processes", "2", "script.py"]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args([*arguments]))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ""
        _, found = prepare_deepspeed_cmd_env(parsed)
    else:
        found = prepare_multi_gpu_env(parsed)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def run_job(job: dict[str, Any]) -> None:
    """One run, from its recipe to its export."""
    for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[key]
    os.environ.update(profile_environment(job["profile"]))
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.compiler.reset()  # a run of another process would know nothing of what was compiled here
    F.linear = _linear  # ZeRO-3 puts its own in its place, and the next job may be of another engine
    with mutants.applied(job["mutant"]):
        train_module.train(make_recipe(job["tables"]))
    gc.collect()
    gc.freeze()  # of what the engine has imported, too: collecting what a job has left is quick then


def main(folder: Path, parent: int) -> None:
    """Do the jobs of a folder."""
    rank = os.environ.get("RANK", "0")
    # A run takes its process group down at the end, and a second one would wait for it at the same store for ever.
    PartialState.destroy_process_group = lambda self, group=None: None
    write.report_end = lambda *_: None  # half of the time of so short a run
    importlib.metadata.metadata = cache(importlib.metadata.metadata)  # accelerate reads it from a file at each save
    # What was found good stays so: no job changes a base.
    _once(trial, "check_tokenizer", 0)
    _once(chat_template, "check_template", 1)  # of the template and its source: the tokenizer is read anew for each job
    gc.freeze()
    number = 0
    while (job := _wait_for(folder / f"{number:04d}.json", parent)) is not None:
        error = ""
        try:
            run_job(job)
        except Exception:
            error = traceback.format_exc()
        unfinished = folder / f"{number:04d}.{rank}.tmp"
        unfinished.write_text(error)
        unfinished.rename(unfinished.with_suffix(".done"))
        number += 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _once(module: ModuleType, name: str, first: int) -> None:
    """Let a check that says nothing be made once for its arguments from the first on."""
    check, passed = getattr(module, name), set[tuple[object, ...]]()

    def checked(*arguments: object) -> None:
        if arguments[first:] not in passed:
            check(*arguments)
            passed.add(arguments[first:])

    setattr(module, name, checked)


def _wait_for(path: Path, parent: int) -> dict[str, Any] | None:
    while not path.exists():
        if not Path(f"/proc/{parent}").exists():
            return None
        time.sleep(0.01)
    return json.loads(path.read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
