"""Signals that ask a run to end: a scheduler's (SIGTERM, SIGUSR1 and 2, SIGXCPU), a closed terminal, Ctrl-C.

While a run reads its data and loads its model, there is nothing to save, and it ends at once. Later a handler only takes
note. All ranks agree in every step, or between two batches of an evaluation, on whether one of them has been asked; then
all of them save and end together. In a step this needs no reduction and no wait of its own: each rank's flags are summed
with the count of targets (`loop/step.py`).
"""

import math
import signal
import time
from collections.abc import Sequence
from types import FrameType

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from llava_accel.console.output import Bar
from llava_accel.exceptions import SIGNALS, Interrupted, end_at_once

# A launcher passes on the Ctrl-C that the terminal has sent to its workers already: that is not a second one.
_SAME_CTRL_C_S = 0.5
_BEFORE_SIGNALS = 3
"""Flags of a rank: NaN where it has no window, the micro-batches of its window, and whether it has one."""


class Interruption:
    """Whether the run has been asked to end. Until `listen` is called, nothing asks it."""

    def __init__(self) -> None:
        self._is_built = False
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._agreed: signal.Signals | None = None

    def listen(self) -> "Interruption":
        """Obey signals from now on. Ctrl-C a second time ends the process at once."""
        for wanted in SIGNALS:
            if signal.getsignal(wanted) != signal.SIG_IGN:  # as nohup does, and shells do for background jobs
                signal.signal(wanted, self._note)
        return self

    def saves_from_now_on(self) -> "Interruption":
        """From now on the run saves before it ends: signals are taken note of."""
        self._is_built = True
        return self

    @property
    def is_asked(self) -> bool:
        """Whether this process has been asked; the other ranks may not know it yet."""
        return self._received is not None

    def flags(self, device: torch.device, micro_batches: int = 1) -> Float[Tensor, "flags"]:
        """This rank's terms in the sum over all ranks; made without waiting for the device.

        Args:
            micro_batches: Those of its window. With 0 it cannot take part in the step: its first flag, so the sum, is NaN.
        """
        flags = torch.zeros(_BEFORE_SIGNALS + len(SIGNALS), device=device)
        if not micro_batches:
            flags[0].fill_(math.nan)
        flags[1].fill_(float(micro_batches))
        flags[2].fill_(float(micro_batches > 0))
        if self._received is not None:
            flags[_BEFORE_SIGNALS + SIGNALS.index(self._received)].fill_(1.0)
        return flags

    @staticmethod
    def micro_batches_of_others(sums: Float[Tensor, "flags"]) -> int:
        """Micro-batches in each window of the ranks with data, from the sum of all flags; 1 if no rank has data."""
        return round(float(sums[1] / sums[2].clamp(min=1))) or 1

    def heard(self, sums: Sequence[float]) -> None:
        """Take note of the sum of all ranks' flags, which is the same on every rank."""
        if self._agreed is None:
            self._agreed = next(
                (one for one, count in zip(SIGNALS, sums[_BEFORE_SIGNALS:], strict=True) if count), None
            )

    def ends_before_the_next_step(self, accelerator: Accelerator) -> bool:
        """Whether all ranks know by now that the run is to end; without asking them."""
        return self._agreed is not None or (accelerator.num_processes == 1 and self.is_asked)

    def agreed(self, accelerator: Accelerator) -> signal.Signals | None:
        """The signal that ends the run, the same on every rank. Every rank must call it at the same point."""
        if accelerator.num_processes == 1:  # nobody to ask, and no reason to wait for the device
            self._agreed = self._agreed or self._received
        elif self._agreed is None:
            sums = accelerator.reduce(self.flags(accelerator.device), reduction="sum")
            assert isinstance(sums, Tensor)
            self.heard(sums.tolist())
        return self._agreed

    def check(self, accelerator: Accelerator) -> None:
        """Raise Interrupted on every rank if one was asked to end. All must call it at the same point."""
        if (received := self.agreed(accelerator)) is not None:
            raise Interrupted(received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._is_built:
            end_at_once(signal.Signals(number), "ended before its next step; the same command starts it again")
        now, again = time.monotonic(), self._received == signal.SIGINT == number
        if again and now - self._since > _SAME_CTRL_C_S:
            raise KeyboardInterrupt
        if not again:
            self._received, self._since = signal.Signals(number), now


class CheckedBar:
    """A bar whose `advance` raises Interrupted, on all ranks, if the run is to end; all advance theirs equally often."""

    def __init__(self, bar: Bar, interruption: Interruption, accelerator: Accelerator) -> None:
        self._bar, self._interruption, self._accelerator = bar, interruption, accelerator

    def advance(self, count: int = 1, note: str = "") -> None:
        """Advance by `count`; the note stays until the next one."""
        self._bar.advance(count, note)
        self._interruption.check(self._accelerator)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


NEVER = Interruption()
"""For runs that nothing interrupts but the end of the process."""
