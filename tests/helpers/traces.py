"""Traces of a step that tests ask for again and again: each is made once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llava_accel.estimate.trace import Moment, trace_step
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe

_made: dict[str, tuple[Moment, ...]] = {}


def trace_once(
    recipe: Recipe,
    processing: Processing,
    batch: Mapping[str, Tensor | bool],
    dtype: torch.dtype,
    is_sharded: bool,
) -> tuple[Moment, ...]:
    """`trace_step`, from an earlier call where base, [model] and shapes are the same: nothing else counts."""
    shapes = {name: value.shape if isinstance(value, Tensor) else value for name, value in batch.items()}
    what: list[Any] = [processing.base.folder, recipe.model, recipe.train.accumulation_steps, dtype, is_sharded]
    key = repr([*what, sorted(shapes.items())])
    if key not in _made:
        _made[key] = trace_step(recipe, processing, batch, dtype, is_sharded)
    return _made[key]
