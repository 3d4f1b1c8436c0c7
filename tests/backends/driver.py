"""Many short runs in one start of the processes: a start costs more than a run of five steps on a tiny model.

    accelerate launch --config_file launch/ddp.yaml --num_processes 2 tests/backends/driver.py JOBS.json

Each job is {"name", "profile", "tables", "mutant"}: a recipe under the environment that `accelerate launch` makes of
launch/PROFILE.yaml. What went wrong with a job is left in JOBS.NAME.RANK.error; the next job is then tried all the same.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from llava_accel import train as train_module
from llava_accel.recipe import make_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
from backends import mutants

LAUNCH = Path(__file__).parents[2] / "launch"


def profile_environment(name: str, folder: Path) -> dict[str, str]:
    """The variables that the launcher sets for a profile, apart from those of ranks and ports."""
    arguments = ["--config_file", str(folder / f"{name}.yaml"), "--num_processes", "2", "script.py"]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if parsed.use_deepspeed:
        parsed.deepspeed_fields_from_accelerate_config = ""
        _, found = prepare_deepspeed_cmd_env(parsed)
    else:
        found = prepare_multi_gpu_env(parsed)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def run_job(job: dict, folder: Path) -> None:
    """One run, from its recipe to its export."""
    for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[key]
    if job["profile"] != "cpu":
        os.environ.update(profile_environment(job["profile"], folder))
    if "TORCHELASTIC_RUN_ID" not in os.environ and job["profile"] != "cpu":
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with mutants.applied(job.get("mutant")):
        train_module.train(make_recipe(job["tables"]))
    gc.collect()


def main(path: Path) -> None:
    rank = os.environ.get("RANK", "0")
    # A run takes its process group down at the end, and a second one would wait for it at the same store for ever.
    PartialState.destroy_process_group = lambda self, group=None: None
    content = json.loads(path.read_text())
    for job in content["jobs"]:
        try:
            run_job(job, Path(content.get("launch", LAUNCH)))
        except Exception:
            path.with_name(f"{job['name']}.{rank}.error").write_text(traceback.format_exc())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
