"""One optimizer step over a window of micro-batches: one count, one synchronisation of gradients, one seed.

`train`, `bench` and `plan --probe` all take this step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from llava_accel.data.collate import collate
from llava_accel.data.loader import Loaded, moved
from llava_accel.loop.optimizer import learning_rates
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import take_loss_scale, unscale_gradients, whole_value
from llava_accel.runtime.signals import NEVER, Interruption
from llava_accel.setup.state import seed_step


@dataclass(frozen=True, slots=True)
class Step:
    """The results of a step. Its tensors stay on the device until a log line is due."""

    losses: list[Float[Tensor, "*terms"]]
    """This rank's, one per micro-batch: summed over its targets, detached. An objective with several terms gives [terms]."""
    divisors: list[Float[Tensor, "*terms"]]
    """What each loss is divided by; the sum of the quotients over all ranks is the loss of the step."""
    measured: list[dict[str, Float[Tensor, ""]]]
    """What the objective measured in each micro-batch besides its loss, already divided."""
    grad_norm: float
    """Norm of the whole gradient over all ranks, before it was clipped."""
    learning_rates: dict[str, float]
    """By part of the model, as the update used them."""


def train_step(
    run: RunContext,
    prepared: Prepared,
    window: Sequence[Loaded],
    step: int,
    guard: UpdateGuard,
    enter: Callable[[str], None],
    interruption: Interruption = NEVER,
) -> Step | None:
    """Forward and backward passes over the window, and one update of what is trained. Every rank must call it.

    Args:
        window: Empty if the process was asked to end while it waited for its data. The other ranks cannot know that yet,
            so this rank computes padding along with them; then none makes an update.
        step: Optimizer steps taken before this one.
        guard: Decides whether the update may be made.
        enter: Told the phase of the step that begins, for the clock of the run (`runtime/timing.py`).
        interruption: Learns whether a rank has been asked to end.

    Returns:
        None if a rank had no data: the step was not taken.
    """
    recipe, accelerator = run.recipe, run.accelerator
    given = window or _padding(1, accelerator.device)
    flags = interruption.flags(accelerator.device, len(window))
    divisors, flags = loss_divisors(given, prepared.objective.count, recipe.train.loss, accelerator, flags)
    if not window:  # the last window of an epoch may be short: all ranks must run backward equally often
        window = _padding(interruption.micro_batches_of_others(flags), accelerator.device)
        divisors *= len(window)
    while True:  # once, unless fp16 overflows: see loss_scale.py
        seed_step(recipe.run.seed, step, accelerator.process_index)
        factor = take_loss_scale(accelerator, prepared.optimizer, guard.loss_scale.value)
        losses, measured = backward_passes(run, prepared, window, divisors, factor, enter)
        # DeepSpeed has clipped and made its update by now, within the last backward pass: there, the next lines read the
        # norm, and `optimizer.step` does nothing. Where the norm was not finite it made no update.
        enter("optimizer")
        rates = learning_rates(prepared.optimizer)
        unscale_gradients(prepared.optimizer, factor)
        grad_norm = clip_gradients(accelerator, prepared.model, recipe.optim.max_grad_norm)
        # The one point where a step waits for the device: the update must not run before the norm is known to be finite.
        scalars = [grad_norm, divisors[0].sum(), guard.watched_loss(losses, divisors), *flags]
        norm, divisor, total, *sums = torch.stack([one.double() for one in scalars]).tolist()
        if not (divisor > 0 and guard.loss_scale.repeats(losses, norm)):
            break
        prepared.optimizer.zero_grad()
    interruption.heard(sums)
    if math.isnan(divisor):
        prepared.optimizer.zero_grad()
        return None
    if guard.allows(window, norm, total, has_targets=divisor > 0):
        prepared.optimizer.step()
    prepared.scheduler.step()
    prepared.optimizer.zero_grad()
    return Step(losses, divisors, measured, norm, rates)


def backward_passes(
    run: RunContext,
    prepared: Prepared,
    window: Sequence[Loaded],
    divisors: Sequence[Tensor],
    factor: float,
    enter: Callable[[str], None],
) -> tuple[list[Float[Tensor, "*terms"]], list[dict[str, Float[Tensor, ""]]]]:
    """The losses of the window's micro-batches, and what the objective measured; the gradients, of loss / divisor x factor,
    are summed up in the model."""
    losses, measured, accelerator, model = [], [], run.accelerator, prepared.model
    for micro_batch, divisor in zip(window, divisors, strict=True):
        with gradient_sync(accelerator, model, enabled=micro_batch is window[-1]):
            enter("forward")
            loss = model(**micro_batch, enter=enter)
            enter("backward")
            # Every backend averages gradients over ranks; the number of processes makes that average a sum again.
            accelerator.backward((loss / divisor).sum() * (accelerator.num_processes * factor))
        losses.append(loss.detach())
        measured.append({name: value / divisor.view(-1)[0] for name, value in prepared.objective.measured.items()})
    return losses, measured


def _padding(count: int, device: torch.device) -> list[Loaded]:
    """Empty micro-batches, with which a rank takes part in the collective operations of a step."""
    return [moved(collate([], {}, (3, 1, 1)), device) for _ in range(count)]


def loss_divisors(
    window: Sequence[Loaded],
    count: Callable[[Loaded], Shaped[Tensor, "*terms"]],
    loss: str,
    accelerator: Accelerator,
    flags: Float[Tensor, "flags"],
) -> tuple[list[Float[Tensor, "*terms"]], Float[Tensor, "flags"]]:
    """What the summed loss of each micro-batch is divided by, and the sum of the ranks' flags. All stay on the device.

    Divisors are 0 only if no record of the window could be loaded; then the loss is 0 / 0, and `UpdateGuard` reports it.

    Args:
        count: `Objective.count`: the weight of a micro-batch's targets, or the number of its pairs.
        loss: The recipe's `train.loss`: "tokens" divides by the count over the window and all ranks; "micro_batch_mean" by
            the micro-batch's own, and by the number of micro-batches over the window and all ranks in which it is not 0.
        flags: From `Interruption.flags`: they share this reduction. A NaN among them makes all divisors NaN.
    """
    weights = [count(micro_batch) for micro_batch in window]
    number, flags = count_over_ranks(weights if loss == "tokens" else [own > 0 for own in weights], flags, accelerator)
    if loss == "tokens":
        return [number] * len(window), flags
    return [torch.where(own > 0, own, 1.0) * number for own in weights], flags


def count_over_ranks(
    own: Sequence[Shaped[Tensor, "*terms"]], flags: Float[Tensor, "flags"], accelerator: Accelerator
) -> tuple[Float[Tensor, "*terms"], Float[Tensor, "flags"]]:
    """The sum of these counts, and of each flag, over all ranks. With unit weights the first is the number of targets."""
    count = torch.stack(list(own)).sum(0).to(flags)
    total = accelerator.reduce(torch.cat([count.view(-1), flags]), reduction="sum")
    assert isinstance(total, Tensor)
    counts, flags = total.split([count.numel(), len(flags)])
    return counts.view_as(count) + flags[0], flags


@contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Sum gradients over ranks in this backward pass only when `enabled`: once a window, at its last micro-batch.

    DeepSpeed reads the end of a step from the same flag. `accelerator.accumulate` is not used: with a loader that reads
    ahead it takes every micro-batch of the last window for its end.
    """
    accelerator.sync_gradients = enabled
    with nullcontext() if enabled else accelerator.no_sync(model):
        yield


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_grad_norm: float) -> Float[Tensor, ""]:
    """Norm of the whole gradient over all ranks, after clipping it to `max_grad_norm` (0: measured only)."""
    assert accelerator.sync_gradients, "a window was left before its last micro-batch: the step would do nothing"
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    assert norm is not None
    return whole_value(torch.as_tensor(norm, device=accelerator.device).detach())
