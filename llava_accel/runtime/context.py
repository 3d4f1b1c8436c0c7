"""What every part of a run needs of it, under one name."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import extract_model_from_parallel
from torch import nn

from llava_accel.console.output import Console
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RunContext:
    """A run as its parts see it: what is wanted, the processes that do it, and the person who watches."""

    recipe: Recipe
    accelerator: Accelerator
    console: Console


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `accelerator.prepare` returns: all that a step changes."""

    model: nn.Module
    """The objective, in the backend's wrapper or not."""
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler

    @property
    def objective(self) -> Objective:
        """The model without the wrapper."""
        objective = extract_model_from_parallel(self.model)
        assert isinstance(objective, Objective)
        return objective
