"""The loss scale of fp16: what a loss is multiplied by before its backward pass, so that small gradients do not become 0.

Where a gradient then exceeds what fp16 holds, the scalers of torch and DeepSpeed skip the step: its examples are not
learned, and the schedule has moved on without an update. Here the same window is computed once more, with the same dropout,
at half the scale, until it fits. So a step is one update in fp16 as in every other type, whatever the scale does; it only
takes longer. A scale is a power of two, and changes no bit of a gradient that fits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import resolve_precision
from llava_accel.setup.state import TrainState

_GROWS_AFTER = 2000
"""Steps without an overflow, after which twice the scale is tried."""
_LARGEST = 2.0**24
"""A larger one would keep no further gradient from becoming 0: fp16's smallest numbers are above 2**-25."""


class LossScale:
    """The scale of a run, which its state keeps, so that a resumed run goes on with it.

    Args:
        state: Holds the scale and how often it was lowered.
    """

    def __init__(self, run: RunContext, state: TrainState) -> None:
        self._accelerator, self._console, self._state = run.accelerator, run.console, state
        self.is_used = resolve_precision(run.recipe.run.precision, run.accelerator.device) == torch.float16
        """Only losses in fp16 are scaled."""
        self._before: float | None = None
        """The scale at which the window was computed first, where it overflowed."""

    @property
    def value(self) -> float:
        """What the losses of the next backward passes are multiplied by."""
        return self._state.loss_scale if self.is_used else 1.0

    def repeats(self, losses: Sequence[Tensor], grad_norm: float) -> bool:
        """Whether the window must be computed once more, at the lower scale that is then in force.

        It must if its gradient is not finite, and a lower scale can change that: the losses are finite, and the scale is
        above 1. Otherwise the scale is not to blame, and is set back to what it was. Every rank must call it, and all get
        the same answer.

        Args:
            losses: This rank's, not scaled.
            grad_norm: Over all ranks.
        """
        state = self._state
        if not self.is_used:
            return False
        if math.isfinite(grad_norm):
            self._before = None
            self._count_step()
            return False
        if state.loss_scale <= 1.0 or not self._are_finite(losses):
            state.loss_scale, self._before = self._before or state.loss_scale, None
            return False
        self._before = self._before or state.loss_scale
        state.loss_scale /= 2
        state.num_overflows += 1
        state.steps_without_overflow = 0
        self._console.line(
            f"step {state.step + 1}: a gradient is larger than fp16 holds at a loss scale of {2 * state.loss_scale:,.0f}; "
            f"the step is computed once more at {state.loss_scale:,.0f}, and nothing of it is lost"
        )
        return True

    def _count_step(self) -> None:
        state = self._state
        state.steps_without_overflow += 1
        if state.steps_without_overflow >= _GROWS_AFTER:
            state.loss_scale, state.steps_without_overflow = min(2 * state.loss_scale, _LARGEST), 0

    def _are_finite(self, losses: Sequence[Tensor]) -> bool:
        """Whether the losses of all ranks are finite."""
        bad = torch.stack(list(losses)).isfinite().logical_not().sum()
        total = self._accelerator.reduce(bad, reduction="sum")
        assert isinstance(total, Tensor)
        return not bool(total)
