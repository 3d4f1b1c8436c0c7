"""The part of a checkpoint that only training needs: optimizer state and position, for any backend and number of ranks.

`progress.json` holds the position; `optimizer.safetensors`, or several such files, hold each tensor of the optimizer state
in full under `PARAMETER//KEY`, however the backend had divided it. The schedule is a function of the step, and not stored.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from safetensors import safe_open
from torch import Tensor

from llava_accel.exceptions import UserError
from llava_accel.kernels.matmul import matmul_in_use
from llava_accel.own_code import digest, is_own
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import resolve_precision
from llava_accel.setup.state import TrainState
from llava_accel.storage.run_weights import PROGRESS, read_progress
from llava_accel.storage.tensor_files import Files, Share, into_files

_FILE_BYTES = 2 << 30
_SEPARATOR = "//"


def optimizer_files(shares: Iterable[tuple[str, str, Share]]) -> Files:
    """The files of (parameter, key, share of the tensor), each of about 2 GiB."""
    named = {f"{name}{_SEPARATOR}{key}": share for name, key, share in shares}
    return into_files(named, "optimizer{suffix}.safetensors", _FILE_BYTES)[0]


def read_optimizer_state(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, key, tensor) of such files, one at a time and memory-mapped: only what is used is read."""
    for path in sorted(folder.glob("optimizer*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for entry in file.keys():
                name, _, key = entry.partition(_SEPARATOR)
                yield name, key, file.get_tensor(entry)


def own_code(recipe: Recipe) -> dict[str, str]:
    """Key -> hash of the user's file, for each that decides a run's steps, which of them is best, or what a score means."""
    named = {
        "train.objective": recipe.train.objective,
        "optim.optimizer": recipe.optim.optimizer,
        "eval.metric": recipe.eval.metric,
    } | {f"eval.metrics = {name!r}": name for name in recipe.eval.measured if name != recipe.eval.metric}
    return {key: digest(name) for key, name in named.items() if is_own(name)}


def write_position(
    folder: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    state: TrainState,
    own: Mapping[str, str],
    sums: Tensor,
) -> None:
    """Write the position of the run, and the settings that its steps depend on.

    Args:
        own: `own_code` when the run began: the files may have changed since, and the run still uses what they were.
        sums: (ranks, sums) `state.unlogged` of every rank.
    """
    facts = {
        "state": state.state_dict(),
        "unlogged": sums.tolist(),
        "global_batch_size": _global_batch_size(recipe, accelerator.num_processes),
        "optimizer": recipe.optim.optimizer,
        "precision": str(resolve_precision(recipe.run.precision, accelerator.device)),
        "matmul": matmul_in_use() if accelerator.device.type == "cpu" else "native",
        "own_code": dict(own),
        "written_by": {"engine": accelerator.distributed_type.value, "num_processes": accelerator.num_processes},
    }
    (folder / PROGRESS).write_text(json.dumps(facts, indent=2) + "\n")


def read_position(folder: Path, recipe: Recipe, accelerator: Accelerator, state: TrainState) -> None:
    """Set `state` to the position that was written; UserError as from `check_position`."""
    facts = check_position(folder, recipe, accelerator.device, state.data, accelerator.num_processes)
    state.load_state_dict(facts["state"])
    of_ranks = torch.tensor(facts["unlogged"], dtype=torch.float64, device=state.unlogged.device)
    if len(of_ranks) == accelerator.num_processes:
        state.unlogged = of_ranks[accelerator.process_index]
    elif accelerator.is_main_process:
        state.unlogged = of_ranks.sum(0)


def check_position(folder: Path, recipe: Recipe, device: torch.device, data: str, ranks: int = 0) -> dict[str, Any]:
    """What `write_position` wrote, if this recipe's steps are the same.

    Args:
        data: Identifies the data: see `TrainState.data`.
        ranks: 0 = as many as wrote it.

    Raises:
        UserError: the folder has another format, or a step of this launch would be another portion of the data, or have
            another precision, optimizer, code of the user's or data.
    """
    run = folder.parent
    if not (facts := read_progress(run)):
        raise UserError(f"run.resume: {folder} has no {PROGRESS}. To start from its weights alone, set model.adapter")
    ranks = ranks or facts["written_by"]["num_processes"]
    size, then = _global_batch_size(recipe, ranks), facts["global_batch_size"]
    if size != then:
        raise _another_run(
            f"{run} counts steps of {then} examples, and {ranks} ranks x "
            f"train.accumulation_steps = {recipe.train.accumulation_steps} x train.per_device_batch_size = "
            f"{recipe.train.per_device_batch_size} make {size}: step {facts['state']['step']} would be another place in the "
            f"data. Choose them so that their product is {then}"
        )
    if facts["optimizer"] != recipe.optim.optimizer:
        raise _another_run(
            f"{run} holds the state of optim.optimizer = {facts['optimizer']!r}, not of {recipe.optim.optimizer!r}. "
            "Set it back"
        )
    precision = str(resolve_precision(recipe.run.precision, device))
    if facts["precision"] != precision:
        raise _another_run(
            f"{run} was computed in {facts['precision']}, and run.precision = {recipe.run.precision!r} means {precision} "
            "here. Set it to the former"
        )
    now, known = own_code(recipe), facts["own_code"]
    new_scores = {key for key in now.keys() - known.keys() if key.startswith("eval.metrics")}
    if changed := [key for key, content in now.items() if content != known.get(key) and key not in new_scores]:
        raise _another_run(
            f"the file of {changed[0]} has changed since {run}, so the steps before and after would not belong to one run. "
            "Set it back"
        )
    if facts["state"]["data"] != data:
        raise _another_run(
            f"the data has changed since {run} was written: its records, their images or how data.reader reads them. "
            "Restore the files"
        )
    return facts


def _another_run(problem: str) -> UserError:
    return UserError(f"run.resume: {problem}, or start a new run from its weights with model.adapter")


def _global_batch_size(recipe: Recipe, ranks: int) -> int:
    """Examples of one step over all ranks and micro-batches."""
    return recipe.train.per_device_batch_size * recipe.train.accumulation_steps * ranks


def advance(scheduler: AcceleratedScheduler, steps: int) -> None:
    """Advance the schedule of a new run by `steps` steps."""
    with warnings.catch_warnings():
        # torch warns of a schedule that steps before the optimizer does. Here that is right.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()
