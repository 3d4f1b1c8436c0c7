"""What a run will take, before it is launched: memory on each GPU by kind, operations, steps, and the largest batch.

No weight is loaded: the model is built on PyTorch's meta device. The longest records of the data decide, or those whose
images have most tiles.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("plan")  # before the imports below, so that help and mistakes are answered at once


import argparse
from collections.abc import Callable

import numpy as np
import torch

from llava_accel.console.output import Console
from llava_accel.data.loader import Loaded, tensor
from llava_accel.data.sampler import deal
from llava_accel.estimate.answers import fitting, largest_questions, plan_answers, trace_answers
from llava_accel.estimate.flops import Work, costs
from llava_accel.estimate.peak_memory import MIB, Plan, count_weights, layouts, plan_for, unit_of
from llava_accel.estimate.trace import Moment, build_meta
from llava_accel.estimate.worst_case import (
    image_layouts,
    load_largest,
    num_tiles,
    num_tokens,
    planned_dtype,
    trace_worst,
)
from llava_accel.measurement.probe import measure_step
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.runtime.launch_profile import read_profile
from llava_accel.scoring.held_out import most_at_once
from llava_accel.setup.datasets import Part, build_order, open_data
from llava_accel.setup.vision_cache import may_park

_CANDIDATES = 8


def plan(recipe: Recipe, gpu_gb: float | None, ranks: int, probe: bool) -> list[Plan]:
    """Print the memory that every launch profile takes, and return it.

    Args:
        gpu_gb: Memory of one GPU in GB, for a verdict.
        ranks: GPUs of the profiles that use several.
        probe: Run the worst batch once, on this machine, and print what it took next to what was planned.

    Raises:
        UserError: recipe, data or model cannot be used.
    """
    accelerator = build_accelerator(recipe)
    console = Console(accelerator.is_main_process)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    run = RunContext(recipe, accelerator, console)
    training, held_out = open_data(run, processing)
    profile = read_profile()
    ranks = accelerator.num_processes if profile.is_distributed else ranks
    on_gpu = accelerator.device.type != "cpu" or (gpu_gb is not None and not probe)
    dtype = planned_dtype(recipe.run.precision, on_gpu)
    model = build_meta(recipe, processing, dtype)
    weights = count_weights(model, recipe)
    batch, moments = trace_worst(recipe, processing, worst_batches(recipe, training), dtype)
    plans = [plan_for(layout, weights, recipe, moments[layout.divides_weights], on_gpu) for layout in layouts(ranks)]
    console.line(
        f"{weights.total:,} weights, {weights.trained:,} of them trained ({weights.trained / weights.total:.2%}), "
        f"computed in {str(dtype).removeprefix('torch.')}"
    )
    _show_steps(console, recipe, processing, training, model)
    _show_memory(console, plans, batch)
    if gpu_gb is not None:
        for each in plans:
            console.line(verdict(each, gpu_gb, recipe.train.per_device_batch_size))
    if held_out is not None:
        _show_evaluation(console, recipe, plans, trace_evaluation(recipe, processing, held_out, dtype), gpu_gb)
    if probe:
        planned = next(each for each in plans if each.layout.name == profile.layout)
        measured = measure_step(run, processing, training.corpus, batch)
        console.line(
            f"{planned.layout.name} x {planned.layout.ranks}: measured {measured / MIB:,.1f} MiB at most, "
            f"planned {planned.total / MIB:,.1f} ({planned.total / measured - 1:+.1%})"
        )
        accelerator.end_training()
    return plans


def worst_batches(recipe: Recipe, part: Part) -> list[Loaded]:
    """What a rank must be able to hold: the largest micro-batch, and the one with most tiles where that has more.

    An image of many tiles may have fewer tokens than another, as LLaVA-OneVision shrinks their map.
    """
    longest = worst_batch(recipe, part)
    most_tiled = worst_batch(recipe, part, by_tiles=True)
    return [longest, most_tiled] if num_tiles(most_tiled) > num_tiles(longest) else [longest]


def worst_batch(recipe: Recipe, part: Part, by_tiles: bool = False) -> Loaded:
    """The largest micro-batch, by tokens or by tiles.

    It is that of the largest records. Where records share prefixes it is not, as those of an image come together: then
    it is the largest of the first epoch's micro-batches whose records have most.
    """
    size, survey = recipe.train.per_device_batch_size, part.survey
    sizes = survey.num_tiles if by_tiles else survey.lengths
    longest = part.rows[np.lexsort((-survey.lengths[part.rows], -sizes[part.rows]))]
    candidates = [longest[:size]]
    if recipe.data.share_prefix:
        order = build_order(recipe, part, 1)
        dealt = [
            part.rows[np.array(micro_batch)]
            for batch in order.epoch(0)
            for micro_batch in deal(batch, order.sort_lengths, per_device_batch_size=size, num_ranks=1)[0]
        ]
        candidates = sorted(dealt, key=lambda rows: -int(sizes[rows].sum()))[:_CANDIDATES]
    return load_largest(recipe, part.corpus, part.image_reader, candidates, num_tiles if by_tiles else num_tokens)


def verdict(plan: Plan, gpu_gb: float, batch: int) -> str:
    """Whether it fits, and the largest batch that does."""
    largest = plan.largest_batch(gpu_gb * 1e9, batch)
    ranks = f" on {plan.layout.ranks} GPUs" if plan.layout.ranks > 1 else ""
    if largest >= batch:
        return f"{plan.layout.name}{ranks}: fits {gpu_gb:g} GB with batch {batch}; largest batch {largest}"
    if largest:
        remedy = f"train.per_device_batch_size = {largest} fits; raise train.accumulation_steps to keep the product"
    else:
        remedy = (
            "no batch fits: set model.gradient_checkpointing = true or model.quantization.bits = 4, or use more GPUs"
        )
    return f"{plan.layout.name}{ranks}: does not fit {gpu_gb:g} GB with batch {batch}; {remedy}"


def _show_steps(console: Console, recipe: Recipe, processing: Processing, part: Part, model: torch.nn.Module) -> None:
    order = build_order(recipe, part, 1)
    lengths = part.survey.lengths[part.rows]
    steps = recipe.train.max_steps or recipe.train.epochs * order.steps_per_epoch
    tokens = lengths.mean() * order.global_batch_size
    tiles, targets = int(part.survey.num_tiles[part.rows].sum()), int(part.survey.num_targets[part.rows].sum())
    encoded = tiles if not may_park(recipe) else 0
    epoch = costs(model, processing).of(Work.of_examples(lengths, targets, tiles, encoded))
    console.line(
        f"{steps:,} steps of {order.global_batch_size} examples on one GPU, {tokens:,.0f} tokens a step; "
        f"{epoch / order.steps_per_epoch:.3g} floating-point operations a step, {epoch:.3g} an epoch"
        + ("" if encoded else " once the vision features are cached")
    )


def _show_memory(console: Console, plans: list[Plan], batch: Loaded) -> None:
    kinds: dict[str, Callable[[Plan], float]] = {
        "weights": lambda plan: plan.weights + plan.peak.copies,
        "quantised": lambda plan: plan.quantised,
        "gradients": lambda plan: plan.peak.gradients,
        "optimizer": lambda plan: plan.optimizer,
        "activations": lambda plan: plan.peak.activations,
        "logits": lambda plan: plan.peak.logits,
        "peak": lambda plan: plan.total,
    }
    ids = tensor(batch, "input_ids")
    unit, name = unit_of(max(plan.total for plan in plans))
    rows = [
        [f"{plan.layout.name} x {plan.layout.ranks}", *(f"{value(plan) / unit:,.2f}" for value in kinds.values())]
        for plan in plans
    ]
    what = "tiles" if any(layout.rows for layout in image_layouts(batch)) else "images"
    shape = f"{ids.shape[0]:,} rows of {ids.shape[1]:,} tokens, {num_tiles(batch):,} {what}"
    title = f"{name} on one rank at the moment of its peak, for the worst batch of this data ({shape})"
    console.table(title, ["", *kinds], rows)


def trace_evaluation(
    recipe: Recipe, processing: Processing, part: Part, dtype: torch.dtype
) -> dict[bool, tuple[Moment, ...]]:
    """The moments of an evaluation, by whether ranks share each weight."""
    batch, questions = largest_questions(recipe, part)
    return {shares: trace_answers(recipe, processing, batch, questions, dtype, shares) for shares in (False, True)}


def _show_evaluation(
    console: Console,
    recipe: Recipe,
    plans: list[Plan],
    moments: dict[bool, tuple[Moment, ...]],
    gpu_gb: float | None,
) -> None:
    """What an evaluation takes, and how many questions it answers at once where that is too much."""
    answers = [plan_answers(plan, moments[plan.layout.divides_weights]) for plan in plans]
    unit, name = unit_of(max(plan.total for plan in answers))
    most = most_at_once(recipe)
    columns = ["", f"{name} with {most} at once"] + ([f"at once on {gpu_gb:g} GB"] if gpu_gb else [])
    rows = [
        [
            f"{plan.layout.name} x {plan.layout.ranks}",
            f"{plan.total / unit:,.2f}",
            *([f"{fitting(plan, gpu_gb * 1e9, recipe)}"] if gpu_gb else []),
        ]
        for plan in answers
    ]
    console.table("evaluation: questions that are answered at once", columns, rows)


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel plan RECIPE`."""
    plan(arguments.loaded, arguments.gpu, arguments.gpus, arguments.probe)
