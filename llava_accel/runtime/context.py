"""What every part of a run needs, under one name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn

from llava_accel.console.output import Console
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe

OnLog = Callable[[dict[str, Any]], object]
"""Called on the main process with each line of metrics.jsonl, of steps and of evaluations, once it is written.

An exception that it raises, Ctrl-C too, ends the run and reaches its caller; the same call then goes on from the last
checkpoint.
"""


@dataclass(frozen=True, slots=True)
class RunContext:
    """A run as its parts see it: what is wanted, the processes that do it, and the person who watches."""

    recipe: Recipe
    accelerator: Accelerator
    console: Console
    on_log: OnLog | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `accelerator.prepare` returns: all that a step changes."""

    model: nn.Module
    """The objective, in the backend's wrapper or not."""
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler
    objective: Objective
    """The model without the wrapper."""
