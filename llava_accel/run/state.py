"""Where a run stands. One number decides everything: data order and randomness are functions of the step."""

from dataclasses import dataclass

from llava_accel.recipe import TrainTable


@dataclass
class TrainState:
    """Registered with Accelerate, so it is saved and loaded with every checkpoint."""

    num_steps: int
    """Optimizer steps of the whole run."""
    steps_per_epoch: int
    step: int = 0
    """Optimizer steps taken."""
    best: float | None = None
    """Value of the recipe's metric in the best evaluation so far."""
    best_step: int = 0
    evaluations_without_gain: int = 0
    num_nonfinite: int = 0
    """Steps whose update was left out because a loss or gradient was not finite."""
    is_stopped: bool = False
    """Whether the run ends before its last step, for want of improvement."""

    @classmethod
    def of(cls, train: TrainTable, steps_per_epoch: int) -> "TrainState":
        """The state before the first step: as many steps as the recipe says, or as its epochs have."""
        return cls(num_steps=train.max_steps or train.epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch)

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.steps_per_epoch

    def state_dict(self) -> dict[str, int | float | None]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int | float | None]) -> None:
        # The length of the run is the recipe's business: training longer may go on from a shorter run's checkpoint.
        vars(self).update({key: state[key] for key in state if key not in ("num_steps", "steps_per_epoch")})


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and on the last one, happens after `step` steps."""
    return step == last or step % every == 0
