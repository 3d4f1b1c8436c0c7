"""What a run says when the GPU's memory is used up: which records, what was planned, and what would fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, shown, tensor, where
from llava_accel.estimate.peak_memory import GIB, Layout, count_weights, plan_for
from llava_accel.estimate.trace import build_meta, trace_step
from llava_accel.exceptions import UserError
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import is_sharded, resolve_precision


@contextmanager
def out_of_memory_explained(
    run: RunContext, window: Sequence[Loaded], corpus: Corpus, processing: Processing
) -> Iterator[None]:
    """Around a step: an out-of-memory error names the records of the largest micro-batch and the nearest remedy.

    Raises:
        UserError: instead of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        largest = max(window, key=lambda micro_batch: tensor(micro_batch, "input_ids").numel())
        raise UserError(_message(run, largest, corpus, processing)) from error


def _message(run: RunContext, micro_batch: Loaded, corpus: Corpus, processing: Processing) -> str:
    recipe, accelerator = run.recipe, run.accelerator
    ids = where([micro_batch], corpus)
    tokens, targets = tensor(micro_batch, "input_ids"), tensor(micro_batch, "target_ids")
    dtype, shares = resolve_precision(recipe.run.precision, accelerator.device), is_sharded(accelerator)
    layout = Layout("run", accelerator.num_processes, divides_weights=shares, divides_moments=shares)
    planned = plan_for(
        layout,
        count_weights(build_meta(recipe, processing, dtype), recipe),
        recipe,
        trace_step(recipe, processing, micro_batch, dtype, shares),
    )
    text = (
        f"out of memory in a micro-batch of {tokens.shape[0]} rows of {tokens.shape[1]} tokens with {len(targets)} "
        f"targets: {shown(ids)}. Planned: {planned.standing / GIB:,.2f} GiB stay, "
        f"{(planned.total - planned.standing) / GIB:,.2f} GiB for this step"
    )
    return f"{text}. {_remedy(planned.largest_batch(_device_bytes(accelerator), len(ids)), recipe, len(ids))}"


def _device_bytes(accelerator: Accelerator) -> float:
    on_gpu = accelerator.device.type == "cuda"
    return float(torch.cuda.get_device_properties(accelerator.device).total_memory) if on_gpu else 0.0


def _remedy(largest: int, recipe: Recipe, batch: int) -> str:
    train, model = recipe.train, recipe.model
    if largest >= batch:  # it was planned to fit: the allocator, or another process
        largest = batch - 1
    if largest:
        return (
            f"Set train.per_device_batch_size = {largest} and raise train.accumulation_steps from "
            f"{train.accumulation_steps} so that their product stays"
        )
    if model.gradient_checkpointing is not True:
        return "Set model.gradient_checkpointing = true"
    if model.train == "lora" and model.quantization.bits > 4:
        return "Set model.quantization.bits = 4"
    return "Divide the model among several GPUs: --config_file launch/zero3.yaml"
