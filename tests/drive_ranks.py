"""Trains the jobs of a file in every process of a launch: `accelerate launch ... drive_ranks.py JOBS`.

A job is {"tables": a recipe, "mutant": "" or a name of MUTANTS}. Each rank notes the pictures of each micro-batch.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

import llava_accel.train as verb
from llava_accel.model.objective import Objective
from llava_accel.recipe import make_recipe
from llava_accel.run.accumulation import count_targets

Window = Sequence[dict[str, Any]]


def rank_factor_dropped(window: Window, accelerator: Accelerator) -> Tensor:
    """What is left of the loss without the last factor of the loop."""
    return count_targets(window, accelerator) * accelerator.num_processes


def per_rank_target_count(window: Window, accelerator: Accelerator) -> Tensor:
    """The count of this rank's window alone, times the ranks: right only if all have the same."""
    own = torch.stack([micro_batch["target_weights"].sum() for micro_batch in window]).sum()
    return own.clamp(min=1.0) * accelerator.num_processes


MUTANTS: dict[str, Callable[[Window, Accelerator], Tensor]] = {
    "rank factor dropped": rank_factor_dropped,
    "per-rank target count": per_rank_target_count,
}


def main() -> None:
    """Train every job; a rank's notes go to `pictures-RANK.json` in the run folder."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        recipe, pictures, forward = make_recipe(job["tables"]), [], Objective.forward

        def noting(self: Objective, pictures: list[int] = pictures, **batch: Any) -> Tensor:
            if self.training:
                pictures.append(len(batch["pixel_values"]))
            return forward(self, **batch)  # noqa: B023  # the same function at every turn

        with ExitStack() as stack:
            stack.enter_context(patch.object(Objective, "forward", noting))
            # The end of a run closes the connection between the processes, which the next job needs.
            stack.enter_context(patch.object(Accelerator, "end_training", Accelerator.wait_for_everyone))
            if job["mutant"]:
                stack.enter_context(patch.object(verb, "count_targets", MUTANTS[job["mutant"]]))
            verb.train(recipe)
        rank = PartialState().process_index
        (Path(recipe.run.output_dir) / f"pictures-{rank}.json").write_text(json.dumps(pictures))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
