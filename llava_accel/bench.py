"""How fast a recipe trains here, and where its time goes.

Tokens are those of the user's examples, however few of them had to be computed. MFU is the operations a second, by
estimate/flops.py for what was computed, divided by the rate of large matrix products on the same device.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("bench")  # before the imports below, so that help and mistakes are answered at once


import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from accelerate import Accelerator

from llava_accel.console.output import Console, counted
from llava_accel.estimate.flops import costs
from llava_accel.estimate.trace import build_meta
from llava_accel.loop.machine import check_machine, print_own_code
from llava_accel.measurement.probe import Job, Timed, first_windows, with_own_folders
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator, resolve_precision
from llava_accel.runtime.timing import APART, PHASES, matrix_rate, waiting_note
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import open_data


@dataclass
class Rounds:
    """Measurements, one value per round; `peak` is in bytes, of one pass."""

    cold: list[Timed] = field(default_factory=list)
    """As in a first epoch, which fills the cache of features. Empty if there is no cache."""
    warm: list[Timed] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    peak: int = 0


def bench(recipe: Recipe, steps: int, rounds: int) -> dict[str, float]:
    """Time `rounds` passes over the first `steps` windows of the recipe, and print the results.

    Returns:
        Medians: "tokens_per_s", "examples_per_s", "mfu", "overhead", "peak_bytes".
    """
    accelerator = build_accelerator(recipe)
    console = Console(accelerator.is_main_process)
    check_machine(recipe, accelerator.device)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    with tempfile.TemporaryDirectory() as folder:
        own = with_own_folders(recipe, Path(folder))
        run = RunContext(own, accelerator, console)
        print_own_code(recipe, console, scores=False)
        training, _ = open_data(run, processing)
        windows = first_windows(run, training, steps)
        objective, _ = build_objective(run, processing)
        job = Job(run, processing, objective, training, windows)
        measured = _measure(job, rounds)
    return _report(console, own, processing, accelerator, len(windows), measured)


def _measure(job: Job, rounds: int) -> Rounds:
    measured = Rounds()
    job.forget_features(-1)
    job.loop()  # warms up kernels and the allocator
    measured.peak = job.peak_bytes()
    for number in range(rounds):
        if job.has_cache:
            job.forget_features(number)
            measured.cold.append(job.loop())
        measured.warm.append(job.loop())
        measured.bare.append(job.bare())
        measured.loaded.append(job.loaded())
    return measured


def _report(
    console: Console, recipe: Recipe, processing: Processing, accelerator: Accelerator, steps: int, rounds: Rounds
) -> dict[str, float]:
    warm = rounds.warm
    seconds = median(each.seconds for each in warm)
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    rate = matrix_rate(accelerator.device, dtype)
    operations = costs(build_meta(recipe, processing, dtype), processing).of(warm[0].work)
    medians = {
        "tokens_per_s": warm[0].num_tokens / seconds,
        "examples_per_s": warm[0].num_examples / seconds,
        "mfu": operations / seconds / rate,
        "overhead": median(a / b - 1 for a, b in zip(rounds.loaded, rounds.bare, strict=True)),
        "peak_bytes": float(rounds.peak),
    }
    rows = [
        ["useful tokens/s", f"{medians['tokens_per_s']:,.0f}"],
        ["share of them computed", f"{warm[0].work.tokens / warm[0].num_tokens:.1%}"],
        ["examples/s", f"{medians['examples_per_s']:,.1f}"],
        ["model FLOPs utilisation", f"{medians['mfu']:.1%} of {rate / 1e9:,.0f} GFLOP/s"],
        ["extra time of the loop", f"{medians['overhead']:+.1%}"],
        ["peak memory of tensors", f"{rounds.peak / 2**30:,.2f} GiB"],
        *[[f"  {name.replace('_', ' ')}", f"{share:.1%}"] for name in PHASES if (share := _share(warm, name))],
    ]
    console.table(f"{counted(steps, 'step')}, {counted(len(warm), 'round')}", ["", ""], rows)
    if note := waiting_note({name: _share(warm, name) for name in PHASES if name not in APART}):
        console.line(note)
    return medians


def _share(timed: Sequence[Timed], phase: str) -> float:
    return median(each.phases[phase] / each.seconds for each in timed)


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel bench RECIPE`."""
    bench(arguments.loaded, arguments.steps, arguments.rounds)
