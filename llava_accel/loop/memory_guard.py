"""Explains running out of GPU memory: what used it up, what was planned, and what would fit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, tensor, where
from llava_accel.estimate.peak_memory import GIB, Plan, Weights, plan_run
from llava_accel.estimate.remedies import checkpointing, fewer_bits, smaller_state
from llava_accel.estimate.worst_case import num_tiles, num_tokens, trace_worst
from llava_accel.exceptions import UserError
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.devices import free_bytes, total_bytes
from llava_accel.runtime.engines import is_sharded, resolve_precision
from llava_accel.runtime.launch_profile import read_profile
from llava_accel.sources.problems import some

_MORE_GPUS = "Divide the model among several GPUs: --profile launch/zero3.yaml"


@contextmanager
def _explained(say: Callable[[], str]) -> Iterator[None]:
    """In the block an out-of-memory error becomes a UserError with this message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(say()) from error


def loading_explained(run: RunContext, processing: Processing) -> AbstractContextManager[None]:
    """Around the loading of a model: an out-of-memory error says what its weights take, and the nearest remedy."""
    return _explained(lambda: _loading_message(run, processing))


def out_of_memory_explained(
    run: RunContext, window: Sequence[Loaded], corpus: Corpus, processing: Processing, phase: Callable[[], str]
) -> AbstractContextManager[None]:
    """Around a step: an out-of-memory error names the records of the largest micro-batch and the nearest remedy; in the
    update, what the optimizer keeps.

    Args:
        phase: The phase of the step, one of `timing.PHASES`.
    """

    def say() -> str:
        by_size = [max(window, key=measure) for measure in (num_tokens, num_tiles)]
        dtype = resolve_precision(run.recipe.run.precision, run.accelerator.device)
        largest, moments = trace_worst(run.recipe, processing, by_size[: 1 + (by_size[0] is not by_size[1])], dtype)
        planned, weights = plan_run(run, processing, moments[is_sharded(run.accelerator)])
        if phase() == "optimizer":
            return _update_message(run.recipe, planned, weights)
        return _step_message(run, largest, corpus, planned)

    return _explained(say)


def evaluation_explained(save: Callable[[], str] | None = None) -> AbstractContextManager[None]:
    """Around an evaluation, which runs out of memory only after it has halved its batches down to a single question.

    Args:
        save: Saves what would be lost, and says how to go on.
    """
    return _explained(
        lambda: (
            "out of memory in an evaluation, with one question at a time. Leave the longest records out of data.eval, "
            "lower eval.max_new_tokens, or divide the model among several GPUs: --profile launch/zero3.yaml."
            f"{f' {save()}.' if save else ''}"
        )
    )


def _step_message(run: RunContext, micro_batch: Loaded, corpus: Corpus, planned: Plan) -> str:
    ids = where([micro_batch], corpus)
    tokens, targets = tensor(micro_batch, "input_ids"), tensor(micro_batch, "target_ids")
    text = (
        f"out of memory in a micro-batch of {tokens.shape[0]} rows of {tokens.shape[1]} tokens with {len(targets)} "
        f"targets: {some(ids, 8)}. Planned: {planned.standing / GIB:,.2f} GiB stay, "
        f"{(planned.total - planned.standing) / GIB:,.2f} GiB for this step"
    )
    largest = planned.largest_batch(total_bytes(run.accelerator.device), len(ids))
    return f"{text}. {_step_remedy(largest, run.recipe, len(ids))}"


def _update_message(recipe: Recipe, planned: Plan, weights: Weights) -> str:
    return (
        f"out of memory in the optimizer's step, where the first one makes the optimizer's state of {weights.trained:,} "
        f"trained weights. Planned: {(planned.standing - planned.optimizer) / GIB:,.2f} GiB of weights, "
        f"{planned.gradients / GIB:,.2f} GiB of gradients, {planned.optimizer / GIB:,.2f} GiB of the optimizer's state and "
        f"{planned.update / GIB:,.2f} GiB of working memory. {_update_remedy(recipe)}"
    )


def _loading_message(run: RunContext, processing: Processing) -> str:
    recipe, accelerator = run.recipe, run.accelerator
    planned, weights = plan_run(run, processing, ())
    there = ""
    if whole := total_bytes(accelerator.device):
        free = free_bytes(accelerator.device) + torch.accelerator.memory_reserved(accelerator.device)
        there = f" The GPU has {whole / GIB:,.2f} GiB; other processes leave {free / GIB:,.2f} GiB of it."
    return (
        f"out of memory while the model was loaded: its {weights.total:,} weights take "
        f"{(planned.weights + planned.quantised) / GIB:,.2f} GiB.{there} {_loading_remedy(recipe)}"
    )


def _step_remedy(largest: int, recipe: Recipe, batch: int) -> str:
    train = recipe.train
    if largest >= batch:  # by the plan it fits: the allocator or another process takes more
        largest = batch - 1
    if largest:
        return (
            f"Set train.per_device_batch_size = {largest} and raise train.accumulation_steps from "
            f"{train.accumulation_steps} so that their product stays"
        )
    if setting := checkpointing(recipe, read_profile().backend):
        return f"Set {setting}"
    return _loading_remedy(recipe)


def _update_remedy(recipe: Recipe) -> str:
    model = recipe.model
    if setting := smaller_state(recipe, read_profile().backend):
        return f"Set {setting}, whose state is smaller"
    if model.train == "lora" and model.lora.rank > 1:
        return f"Set a smaller model.lora.rank, such as {max(1, model.lora.rank // 2)}"
    return _loading_remedy(recipe)


def _loading_remedy(recipe: Recipe) -> str:
    setting = fewer_bits(recipe, read_profile().backend)
    return f"Set {setting}" if setting else _MORE_GPUS
