"""Where a run stands."""

import numpy as np
import pytest

from llava_accel.data.sampler import Order
from llava_accel.recipe import TrainTable
from llava_accel.setup.state import TrainState, is_due


def test_max_steps_comes_before_epochs() -> None:
    order = Order(lengths=np.ones(7, np.int64), seed=0, global_batch_size=1)
    assert TrainState.of(TrainTable(epochs=3), order).num_steps == 21
    assert TrainState.of(TrainTable(epochs=3, max_steps=5), order).num_steps == 5


def test_the_epoch_counts_passes_over_the_data() -> None:
    assert [TrainState(num_steps=8, steps_per_epoch=4, step=step).epoch for step in (0, 1, 4, 6)] == [0, 0.25, 1, 1.5]


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])])
def test_what_is_periodic_happens_on_the_last_step_too(every: int, due: list[int]) -> None:
    assert [step for step in range(1, 8) if is_due(step, every, 7)] == due


def test_a_saved_state_comes_back_except_for_the_length_of_the_run() -> None:
    old = TrainState(num_steps=8, steps_per_epoch=4, step=6, best=0.5, best_step=4, evaluations_without_gain=1)
    old.num_nonfinite = 2
    new = TrainState(num_steps=12, steps_per_epoch=4)
    new.load_state_dict(old.state_dict())
    assert new.state_dict() == {**old.state_dict(), "num_steps": 12}
