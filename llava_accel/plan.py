"""What a run will take, before it is launched: memory on each GPU by kind, operations, steps, and the largest batch.

No weight is loaded: the model is built on PyTorch's meta device. The longest records of the data decide, or those whose
images have most tiles. If the base is not here, its published sizes are used.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("plan")  # before the imports below, so that help and mistakes are answered at once


import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from llava_accel.advice.cards import show_cards
from llava_accel.advice.stand_in import with_known_base
from llava_accel.console.output import Console
from llava_accel.data.loader import Loaded, tensor
from llava_accel.estimate.answers import answered_at_once, plan_answers, trace_evaluation
from llava_accel.estimate.flops import Work, costs
from llava_accel.estimate.peak_memory import (
    CONTEXT_BYTES,
    GIB,
    MIB,
    USABLE,
    Plan,
    count_weights,
    layouts,
    plan_for,
    unit_of,
    verified_bytes,
)
from llava_accel.estimate.remedies import backend_of, checkpointing, fewer_bits, smaller_state
from llava_accel.estimate.saved import checkpoint_line
from llava_accel.estimate.trace import Moment, build_meta
from llava_accel.estimate.worst_case import image_layouts, num_tiles, planned_dtype, trace_worst, worst_batches
from llava_accel.loop.machine import check_machine
from llava_accel.measurement.probe import measure_step
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.devices import bf16_remark
from llava_accel.runtime.engines import build_accelerator
from llava_accel.runtime.launch_profile import read_profile
from llava_accel.scoring.held_out import most_at_once
from llava_accel.setup.datasets import Part, build_order, open_data
from llava_accel.setup.vision_cache import may_park


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
    if probe:
        check_machine(recipe, accelerator.device)
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
    if not on_gpu and (remark := bf16_remark(recipe.run.precision)):
        console.line(remark)
    _show_steps(console, recipe, processing, training, model)
    _show_memory(console, plans, batch)
    console.line(checkpoint_line(weights, recipe, accelerator.num_processes))
    if recipe.model.compile:
        console.line(
            "model.compile: the activations are those of layers that are not compiled; how much compiled ones keep is known "
            "only once they run"
        )
    if recipe.model.kernels == "liger":
        console.line('model.kernels = "liger": the activations are those of "native", which keeps fewer')
    if gpu_gb is not None:
        for each in plans:
            console.line(verdict(each, gpu_gb, recipe))
    if held_out is not None:
        _show_evaluation(console, recipe, plans, trace_evaluation(recipe, processing, held_out, dtype), gpu_gb)
    if recipe.checkpoint.verify:
        console.line(_verification(verified_bytes(weights, recipe, dtype), gpu_gb))
    if probe:
        planned = next(each for each in plans if each.layout.name == profile.layout)
        measured = measure_step(run, processing, training.corpus, batch)
        console.line(
            f"{planned.layout.name} x {planned.layout.ranks}: measured {measured / MIB:,.1f} MiB at most, "
            f"planned {planned.total / MIB:,.1f} ({planned.total / measured - 1:+.1%})"
        )
        accelerator.end_training()
    return plans


def verdict(plan: Plan, gpu_gb: float, recipe: Recipe) -> str:
    """Says whether a plan fits a GPU, and the largest batch that does, or which settings of this recipe take less."""
    batch = recipe.train.per_device_batch_size
    largest = plan.largest_batch(gpu_gb * 1e9, batch)
    ranks = f" on {plan.layout.ranks} GPUs" if plan.layout.ranks > 1 else ""
    if largest >= batch:
        return f"{plan.layout.name}{ranks}: fits {gpu_gb:g} GB with batch {batch}; largest batch {largest}"
    if largest:
        remedy = f"train.per_device_batch_size = {largest} fits; raise train.accumulation_steps to keep the product"
    else:
        backend = backend_of(plan.layout.name)
        settings = [remedy(recipe, backend) for remedy in (checkpointing, fewer_bits, smaller_state)]
        chosen = " or ".join(setting for setting in settings if setting)
        remedy = f"no batch fits: {f'set {chosen}, or ' if chosen else ''}use more GPUs"
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


def _show_evaluation(
    console: Console,
    recipe: Recipe,
    plans: list[Plan],
    moments: dict[bool, tuple[Moment, ...]],
    gpu_gb: float | None,
) -> None:
    """Print what an evaluation takes and, for a GPU of `gpu_gb`, how many questions it answers at once."""
    answers = [plan_answers(plan, moments[plan.layout.divides_weights]) for plan in plans]
    unit, name = unit_of(max(plan.total for plan in answers))
    most = most_at_once(recipe)
    columns = ["", f"{name} with up to {most} at once"] + ([f"at once on {gpu_gb:g} GB"] if gpu_gb else [])
    rows = [
        [
            f"{plan.layout.name} x {plan.layout.ranks}",
            f"{plan.total / unit:,.2f}",
            *([_up_to(answered_at_once(plan, gpu_gb * 1e9, recipe))] if gpu_gb else []),
        ]
        for plan in answers
    ]
    console.table("evaluation: questions that are answered at once", columns, rows)


def _up_to(number: int) -> str:
    """How many questions are answered at once: many batches hold fewer, as they keep those on an image together."""
    return f"up to {number}" if number else "none: lower eval.max_new_tokens or use more GPUs"


def _verification(size: int, gpu_gb: float | None) -> str:
    """What the check of an export takes: it loads the model once more, in a process of its own."""
    text = f"checkpoint.verify: when the run has ended, a second copy of the model takes {size / GIB:,.2f} GiB of a GPU"
    if gpu_gb is None:
        return text
    fits = size + CONTEXT_BYTES <= USABLE * gpu_gb * 1e9
    return f"{text}, {'which fits' if fits else 'which does not fit: it goes to main memory'}"


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel plan RECIPE`."""
    if arguments.cards:
        show_cards(arguments.loaded, arguments.gpus, Console())
        return
    with tempfile.TemporaryDirectory() as spare:
        recipe, assumed = with_known_base(arguments.loaded, Path(spare))
        if assumed:
            Console().line(assumed)
        plan(recipe, arguments.gpu, arguments.gpus, arguments.probe)
