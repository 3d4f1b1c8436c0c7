"""Which operations a recipe's steps spend their time on: products of matrices, attention, the rest by name.

    OMP_NUM_THREADS=2 python tests/bench/profile_step.py RECIPE [--steps 3] [table.key=value ...]

PyTorch's profiler over the loop of `llava-accel bench`, on steps that it has taken before (features are kept). CPU only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_accel.console.output import Console
from llava_accel.measurement.probe import Job, first_windows, with_own_folders
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import open_data

KINDS = {"mm": "products", "addmm": "products", "bmm": "products", "scaled_dot_product": "attention"}
LEAST = 0.01


def profiled(recipe: Recipe, steps: int) -> dict[str, float]:
    """Kind or name of an operation -> seconds of its own, without what it calls."""
    run = RunContext(recipe, build_accelerator(recipe), Console(False))
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    training, _ = open_data(run, processing)
    objective, _ = build_objective(run, processing)
    job = Job(run, processing, objective, training, first_windows(run, training, steps))
    job.forget_features(0)
    for _ in range(2):  # the first pass fills the cache of features, the second one warms up what is without the tower
        job.loop()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        job.loop()
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::").strip("_")
        kind = next((KINDS[start] for start in KINDS if name.startswith(start)), name)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="table.key=value")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = with_own_folders(load_recipe(arguments.recipe, arguments.overrides), Path(folder))
        seconds = profiled(recipe, arguments.steps)
    whole = sum(seconds.values())
    print(f"{whole / arguments.steps:.2f} s a step, {torch.get_num_threads()} threads")
    large = {kind: spent for kind, spent in seconds.items() if spent >= LEAST * whole}
    for kind, spent in sorted(large.items(), key=lambda item: -item[1]):
        print(f"{spent / whole:7.1%}  {kind}")
    print(f"{1 - sum(large.values()) / whole:7.1%}  what takes less than {LEAST:.0%} each")


if __name__ == "__main__":
    main()
