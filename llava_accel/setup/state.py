"""How far a run is. The step decides everything: data order and randomness are functions of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llava_accel.data.sampler import Order
from llava_accel.recipe import TrainTable

NUM_SUMS = 6
"""Loss, targets, tokens, examples, padding and positions: what `meter.Meter` adds up between two log lines. What the
objective measures besides follows, and where the data has several sources, the examples of each."""


@dataclass
class TrainState:
    """All that a resumed run has to know besides weights and optimizer state; every checkpoint holds it."""

    num_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    data: str = ""
    """Identifies the data: see `Order.fingerprint`, and `datasets.content` for the records and images."""
    step: int = 0
    """Optimizer steps taken."""
    best: float | None = None
    """Value of the recipe's metric in the best evaluation so far."""
    best_step: int = 0
    evaluations_without_gain: int = 0
    evaluated_step: int = -1
    """The step of the last evaluation that was completed."""
    num_lines: int = 0
    """Lines of metrics.jsonl."""
    logged_step: int = 0
    """The step of the last of these lines that is about training."""
    num_nonfinite: int = 0
    """Steps whose update was left out because a loss or gradient was not finite."""
    loss_scale: float = 2.0**16
    """What losses are multiplied by in fp16; no other type uses it."""
    steps_without_overflow: int = 0
    """Steps since the scale was changed."""
    num_overflows: int = 0
    """How often a step was computed once more, as a gradient was larger than fp16 holds."""
    is_stopped: bool = False
    """Whether the run ends before its last step, because evaluations no longer improve."""
    recent_losses: list[float] = field(default_factory=list)
    """The losses of the last steps, which a spike is compared with."""
    unlogged: Tensor = field(default_factory=lambda: torch.zeros(NUM_SUMS, dtype=torch.float64))
    """This rank's sums since the last log line."""

    @classmethod
    def of(cls, train: TrainTable, order: Order, content: str = "") -> "TrainState":
        """The state before the first step: as many steps as the recipe says, or as its epochs have."""
        steps, data = count_steps(train, order), f"{order.fingerprint()} {content}"
        return cls(num_steps=steps, steps_per_epoch=order.steps_per_epoch, data=data)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Plain values; `unlogged`, which differs between ranks, is stored apart."""
        return {key: value for key, value in vars(self).items() if key != "unlogged"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The length of the run is the recipe's business: with a constant rate, training longer may go on from here.
        vars(self).update({key: state[key] for key in state if key not in ("num_steps", "steps_per_epoch")})


def count_steps(train: TrainTable, order: Order) -> int:
    """Optimizer steps of the whole run."""
    return train.max_steps or train.epochs * order.steps_per_epoch


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and on the last one, happens after `step` steps."""
    return step == last or step % every == 0


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the randomness of a step (dropout) a function of (seed, step, rank), so that resuming needs no replay."""
    # Far apart for neighbouring steps and ranks; torch takes 64 bits.
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % (1 << 63))
