"""How long the run of a recipe is: its steps and epochs, and, if two steps are taken to measure it, its hours."""

import tempfile
from pathlib import Path

from llava_accel.console.output import Console
from llava_accel.measurement.probe import Job, first_windows, with_own_folders
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, build_order
from llava_accel.setup.state import count_steps

_PROBED = 2  # steps


def length(recipe: Recipe, part: Part) -> str:
    """Steps, epochs and global batch of a run on one process."""
    order = build_order(recipe, part, 1)
    steps, epoch = count_steps(recipe.train, order), order.steps_per_epoch
    epochs = "1 epoch" if steps == epoch else f"{steps / epoch:.4g} epochs"
    return (
        f"{steps:,} steps of {order.global_batch_size:,} examples, which is {epochs} of {epoch:,} "
        "steps, on one process. With N processes a step has N times as many examples"
    )


def hours(recipe: Recipe, processing: Processing, part: Part) -> tuple[float, float]:
    """Take two steps of the run, as train.py takes them, in a temporary folder.

    Returns:
        Seconds of a step, and hours of all steps on this machine by their tokens: without evaluations and saving. If
        features are cached, later epochs are counted at their own, faster rate.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = with_own_folders(recipe, Path(folder))
        accelerator = build_accelerator(own)
        run = RunContext(own, accelerator, Console(False))
        windows = first_windows(run, part, _PROBED)
        objective, _ = build_objective(run, processing)
        job = Job(run, processing, objective, part, windows)
        job.forget_features(0)
        job.loop()  # warms up kernels and the allocator
        job.forget_features(1)
        first = job.loop()
        later = job.loop() if job.has_cache else first
        accelerator.end_training()
    order = build_order(recipe, part, 1)
    steps = count_steps(recipe.train, order)
    # The first windows may be longer or shorter than others.
    tokens_per_step = float(part.survey.lengths[part.rows].mean()) * order.global_batch_size
    share = tokens_per_step * len(windows) / first.num_tokens
    of_first, of_later = (each.seconds / len(windows) * share for each in (first, later))
    of_later = min(of_first, of_later)  # it does less; where it took longer, the machine had other work
    num_first = min(steps, order.steps_per_epoch)
    return of_first, (of_first * num_first + of_later * (steps - num_first)) / 3600
