"""One optimizer step over a window of micro-batches: one count, one synchronisation of gradients, one seed.

`train`, `bench` and `plan --probe` all take this step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from llava_accel.data.collate import collate
from llava_accel.data.loader import Loaded, moved, tensor
from llava_accel.loop.optimizer import learning_rates
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import whole_value
from llava_accel.runtime.signals import NEVER, Interruption
from llava_accel.setup.state import seed_step


@dataclass(frozen=True, slots=True)
class Step:
    """What a step says of itself. Its tensors stay on the device until a log line is due."""

    losses: list[Float[Tensor, ""]]
    """Summed over the targets of each micro-batch of this rank; detached."""
    divisors: list[Float[Tensor, ""]]
    """What each of them is divided by; then their sum over all ranks is the loss of the step."""
    grad_norm: float
    """Of the whole gradient over all ranks, before it was clipped."""
    learning_rates: dict[str, float]
    """Of each part of the model, as the update used them."""


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
        window: Empty where the process was asked to end while it waited for its data. The other ranks cannot know it yet,
            and this one computes padding with them; then no rank makes an update.
        step: Optimizer steps taken before this one.
        guard: Whether the update may be made.
        enter: Told the phase of the step that begins, for the clock of the run (`runtime/timing.py`).
        interruption: Learns whether a rank has been asked to end.

    Returns:
        None where a rank had no data: the step was not taken.
    """
    recipe, accelerator = run.recipe, run.accelerator
    seed_step(recipe.run.seed, step, accelerator.process_index)
    flags = interruption.flags(accelerator.device, has_data=bool(window))
    window = window or _padding(recipe.train.accumulation_steps, accelerator.device)
    divisors, flags = loss_divisors(window, recipe.train.loss, accelerator, flags)
    losses = []
    for micro_batch, divisor in zip(window, divisors, strict=True):
        with gradient_sync(accelerator, prepared.model, enabled=micro_batch is window[-1]):
            enter("forward")
            loss = prepared.model(**micro_batch, enter=enter)
            enter("backward")
            # Every backend averages gradients over ranks; the last factor makes that average a sum again.
            accelerator.backward(loss / divisor * accelerator.num_processes)
        losses.append(loss.detach())
    # DeepSpeed has clipped and made its update by now, within the last `backward` above: there, the next lines read the
    # norm, and `optimizer.step` does nothing. Where the norm was not finite it made no update.
    enter("optimizer")
    rates = learning_rates(prepared.optimizer)
    grad_norm = clip_gradients(accelerator, prepared.model, recipe.optim.max_grad_norm)
    # The one point where a step waits for the device: the update must not run before the norm is known to be finite.
    found = [grad_norm, divisors[0], guard.watched_loss(losses, divisors), *flags]
    norm, divisor, total, *sums = torch.stack([one.double() for one in found]).tolist()
    interruption.heard(sums)
    if math.isnan(divisor):
        prepared.optimizer.zero_grad()
        return None
    if guard.allows(window, norm, total, has_targets=divisor > 0):
        prepared.optimizer.step()
    prepared.scheduler.step()
    prepared.optimizer.zero_grad()
    return Step(losses, divisors, norm, rates)


def _padding(count: int, device: torch.device) -> list[Loaded]:
    """Micro-batches of nothing, with which a rank takes part in the collective operations of a step."""
    return [moved(collate([], {}, (3, 1, 1)), device) for _ in range(count)]


def loss_divisors(
    window: Sequence[Loaded], loss: str, accelerator: Accelerator, flags: Float[Tensor, "flags"]
) -> tuple[list[Float[Tensor, ""]], Float[Tensor, "flags"]]:
    """What the summed loss of each micro-batch is divided by, and the sum of the ranks' flags. All stay on the device.

    Divisors are 0 only if no record of the window could be loaded; then the loss is 0 / 0, and `UpdateGuard` says so.

    Args:
        loss: The recipe's `train.loss`: "tokens" divides by the weight of all targets; "micro_batch_mean" by the weight of
            the micro-batch's own, and by the number of micro-batches with targets over the window and all ranks.
        flags: Of `Interruption.flags`: they take no reduction of their own. The first is NaN where a rank has no data,
            and so are all divisors then.
    """
    weights = [tensor(micro_batch, "target_weights").sum() for micro_batch in window]
    number, flags = count_over_ranks(weights if loss == "tokens" else [own > 0 for own in weights], flags, accelerator)
    if loss == "tokens":
        return [number] * len(window), flags
    return [torch.where(own > 0, own, 1.0) * number for own in weights], flags


def count_over_ranks(
    own: Sequence[Tensor], flags: Float[Tensor, "flags"], accelerator: Accelerator
) -> tuple[Float[Tensor, ""], Float[Tensor, "flags"]]:
    """The sum of these values, and of each flag, over all ranks. With unit weights the first is the number of targets."""
    count = sum(own, torch.zeros((), device=accelerator.device))
    assert isinstance(count, Tensor)
    total = accelerator.reduce(torch.cat([count[None], flags]), reduction="sum")
    assert isinstance(total, Tensor)
    return total[0] + total[1], total[1:]


@contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Sum gradients over ranks in this backward pass only when `enabled`: once a window, at its last micro-batch.

    DeepSpeed takes the end of a step from the same flag. `accelerator.accumulate` is not used: with a loader that reads
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
