"""Windows of micro-batches: one global target count, one gradient synchronisation, one seed a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from llava_accel.data.loader import Loaded, tensor


def count_targets(window: Sequence[Loaded], accelerator: Accelerator) -> Float[Tensor, ""]:
    """Weight of all targets in the window, over all ranks. With unit weights it is their number.

    It stays on the device. It is 0 only if no record of the window could be loaded; then the loss is 0 / 0, and
    `nonfinite.UpdateGuard` says so.
    """
    local = sum(
        (tensor(micro_batch, "target_weights").sum() for micro_batch in window),
        torch.zeros((), device=accelerator.device),
    )
    total = accelerator.reduce(local, reduction="sum")
    assert isinstance(total, Tensor)
    return total


@contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Reduce gradients over ranks in this backward pass only when `enabled`: once a window, at its last micro-batch.

    DeepSpeed takes its step boundary from the same flag. `accelerator.accumulate` is not used: with a loader that reads
    ahead it takes every micro-batch of the last window for its end.
    """
    accelerator.sync_gradients = enabled
    with nullcontext() if enabled else accelerator.no_sync(model):
        yield


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the randomness of a step (dropout) a function of (seed, step, rank), so that resuming needs no replay."""
    # Far apart for neighbouring steps and ranks; torch takes 64 bits.
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % (1 << 63))
