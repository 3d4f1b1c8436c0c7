"""What is said about the length of a run."""

from pathlib import Path
from typing import Any

import pytest

from helpers.runs import tables
from llava_accel.data.sampler import Order
from llava_accel.inspection import duration
from llava_accel.recipe import load_recipe
from llava_accel.setup.datasets import Part


@pytest.mark.parametrize(("steps", "says"), [(3, "which is 1 epoch of 3 steps"), (6, "which is 2 epochs of 3 steps")])
def test_one_epoch_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, says: str) -> None:
    class ThreeSteps(Order):
        steps_per_epoch: Any = 3
        global_batch_size: Any = 4

        def __init__(self) -> None: ...

    monkeypatch.setattr(duration, "build_order", lambda *_: ThreeSteps())
    recipe = load_recipe(tables(tmp_path, None, train={"max_steps": steps}), warns=False)
    assert says in duration.length(recipe, Part.__new__(Part))
