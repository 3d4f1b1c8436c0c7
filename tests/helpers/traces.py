"""Traces of a step that tests ask for again and again, each made once, and plans of one GPU."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llava_accel.console.output import Console
from llava_accel.estimate.peak_memory import Layout, Plan, count_weights, plan_for
from llava_accel.estimate.trace import Moment, build_meta, trace_step
from llava_accel.estimate.worst_case import worst_batch
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import open_data

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
    return _once(sorted(shapes.items()), recipe, processing, batch, dtype, is_sharded)


def trace_any_rows(
    recipe: Recipe,
    processing: Processing,
    batch: Mapping[str, Tensor | bool],
    dtype: torch.dtype,
    is_sharded: bool,
) -> tuple[Moment, ...]:
    """The same without the shapes: for tiny models, of which every batch fits."""
    return _once(sorted(batch), recipe, processing, batch, dtype, is_sharded)


def _once(
    rows: object,
    recipe: Recipe,
    processing: Processing,
    batch: Mapping[str, Tensor | bool],
    dtype: torch.dtype,
    is_sharded: bool,
) -> tuple[Moment, ...]:
    what: list[Any] = [processing.base.folder, recipe.model, recipe.train.accumulation_steps, dtype, is_sharded]
    key = repr([*what, rows])
    if key not in _made:
        _made[key] = trace_step(recipe, processing, batch, dtype, is_sharded)
    return _made[key]


def planned_alone(table: Recipe) -> Plan:
    """As `plan` does it, for one GPU and bf16: one trace where that makes two."""
    processing = load_processing(table.model, "pad")
    training, _ = open_data(RunContext(table, Accelerator(cpu=True), Console(False)), processing)
    weights = count_weights(build_meta(table, processing, torch.bfloat16), table)
    kept = trace_step(table, processing, worst_batch(table, training), torch.bfloat16, False)
    return plan_for(Layout("one GPU"), weights, table, kept)
