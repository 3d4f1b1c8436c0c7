"""Traces of a step that tests ask for again and again, each made once, and plans of one GPU."""

from collections.abc import Callable, Mapping
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

Batch = Mapping[str, Tensor | bool]
_made: dict[str, tuple[Moment, ...]] = {}


def _remembering(of_rows: Callable[[Batch], object]) -> Callable[..., tuple[Moment, ...]]:
    """`trace_step`, from an earlier call where base, [model] and what `of_rows` takes of a batch are the same."""

    def trace(
        recipe: Recipe, processing: Processing, batch: Batch, dtype: torch.dtype, is_sharded: bool
    ) -> tuple[Moment, ...]:
        model: list[Any] = [processing.base.folder, recipe.model, recipe.train.accumulation_steps]
        key = repr([*model, dtype, is_sharded, of_rows(batch)])
        if key not in _made:
            _made[key] = trace_step(recipe, processing, batch, dtype, is_sharded)
        return _made[key]

    return trace


def _shapes(batch: Batch) -> object:
    return sorted((name, value.shape if isinstance(value, Tensor) else value) for name, value in batch.items())


trace_once = _remembering(_shapes)
"""By the shapes of a batch: nothing else of it counts."""
trace_any_rows = _remembering(sorted)
"""By the names of its fields alone: for tiny models, of which every batch fits."""


def planned_alone(table: Recipe) -> Plan:
    """As `plan` does it, for one GPU and bf16: one trace where that makes two."""
    processing = load_processing(table.model, "pad")
    training, _ = open_data(RunContext(table, Accelerator(cpu=True), Console(False)), processing)
    weights = count_weights(build_meta(table, processing, torch.bfloat16), table)
    kept = trace_step(table, processing, worst_batch(table, training), torch.bfloat16, False)
    return plan_for(Layout("one GPU"), weights, table, kept)
