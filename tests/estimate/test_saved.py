"""What a checkpoint takes is told before a run."""

from dataclasses import replace
from typing import Any

import pytest

from llava_accel.estimate.peak_memory import GIB, Weights
from llava_accel.estimate.saved import checkpoint_bytes, checkpoint_line
from llava_accel.recipe import Recipe, make_recipe

WEIGHTS = Weights(7 * GIB, 7 * GIB, 0, GIB, 0, 0, 0, 0, 0)
"""Seven Gi of weights, all trained, and a frozen tower of one GiB."""


def of(train: str, background: bool | str = "auto", optimizer: str = "adamw") -> Recipe:
    tables: dict[str, Any] = {
        "run": {"name": "r"},
        "model": {"base": "b", "train": train},
        "data": {"train": "t"},
        "optim": {"optimizer": optimizer},
        "checkpoint": {"background": background},
    }
    return make_recipe(tables)


def test_weights_in_fp32_and_two_moments_are_saved_and_of_a_whole_model_the_rest() -> None:
    assert checkpoint_bytes(WEIGHTS, of("full")) == (7 * 12 + 1) * GIB
    assert checkpoint_bytes(WEIGHTS, of("lora")) == 7 * 12 * GIB
    assert checkpoint_bytes(WEIGHTS, of("full", optimizer="sgd")) == (7 * 4 + 1) * GIB


@pytest.mark.parametrize(
    ("background", "trained", "train", "ranks", "is_copied"),
    [
        ("auto", 7 * GIB, "full", 1, True),
        (False, 7 * GIB, "full", 1, False),
        ("auto", 1 << 20, "lora", 1, False),
        (True, 1 << 20, "lora", 1, True),
        ("auto", 64 << 20, "full", 1, True),
        ("auto", 64 << 20, "full", 16, False),  # each rank writes little
        ("auto", 64 << 20, "lora", 16, True),  # one of them writes all
    ],
)
def test_the_copy_in_main_memory_is_told_where_there_will_be_one(
    background: bool | str, trained: int, train: str, ranks: int, is_copied: bool
) -> None:
    line = checkpoint_line(replace(WEIGHTS, trained=trained, frozen_bytes=0), of(train, background), ranks)
    assert line.startswith("a checkpoint takes ") and line.count("iB of the disk") == 1
    assert ("main memory" in line) == is_copied
