"""What a step holds beside weights and moments, found without weights: it runs on fake tensors, which have shapes alone."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_accel.model.build import final_config
from llava_accel.model.lora import prepare_trainable, without_starting_values
from llava_accel.model.memory import enable_checkpointing, lighten_dropout
from llava_accel.model.objective import LOGITS_AT_ONCE, Objective
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.run.ledger import Ledger, Moment, highest


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    return sdpa_attention_forward(module, query, key, value, None, **settings)


AttentionInterface.register("llava_accel_plan", _causal)


def build_meta(recipe: Recipe, processing: Processing, dtype: torch.dtype) -> nn.Module:
    """The recipe's model on the meta device, trainable as in the run; its adapter is new, whatever the recipe says."""
    config = copy.deepcopy(final_config(processing))
    table = without_starting_values(recipe.model).model_copy(update={"adapter": ""})
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(dtype)  # pyright: ignore[reportArgumentType]
        prepared = prepare_trainable(model, recipe.model_copy(update={"model": table}))
    enable_checkpointing(model, recipe.model.gradient_checkpointing)
    lighten_dropout(prepared)
    return prepared


def trace_step(
    recipe: Recipe, processing: Processing, batch: Mapping[str, Tensor | bool], dtype: torch.dtype, is_sharded: bool
) -> tuple[Moment, ...]:
    """The moments of forward and backward pass that can be the peak, on one rank.

    Where the recipe accumulates it is those of two micro-batches: gradients of the first are there during the second.

    Args:
        batch: A real one; only its shapes count.
        dtype: The type that is computed in.
        is_sharded: Whether ranks share each weight; logits are then made at once.
    """
    model = build_meta(recipe, processing, dtype)
    with FakeTensorMode(), torch.device("cpu"):
        # On the meta device itself there is no autocast, and its copies of the weights are not small.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        objective = Objective(model.train(), processing.vocab_size, tower_on_every_rank=recipe.model.train_vision)
        objective.is_sharded = is_sharded
        with Ledger(objective, [processing.vocab_size, objective.llava.lm_head.out_features]) as ledger:
            fields = _fake(batch, objective)
            for _ in range(min(2, recipe.train.accumulation_steps)):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = objective(**fields)
                loss.backward()
    return highest(ledger.moments)


def trace_layouts(
    recipe: Recipe, processing: Processing, batch: Mapping[str, Tensor | bool], dtype: torch.dtype
) -> dict[bool, tuple[Moment, ...]]:
    """`trace_step` by whether ranks share each weight, which makes a difference where logits are many."""
    targets = batch["target_ids"]
    assert isinstance(targets, Tensor)
    alone = trace_step(recipe, processing, batch, dtype, False)
    is_split = len(targets) * processing.vocab_size > LOGITS_AT_ONCE
    return {False: alone, True: trace_step(recipe, processing, batch, dtype, True) if is_split else alone}


def _fake(batch: Mapping[str, Tensor | bool], objective: Objective) -> dict[str, Any]:
    fields: dict[str, Any] = {
        key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    if not fields["branched"]:
        # transformers makes no mask for a kernel that it does not know; for its own it looks at values, which are not there.
        objective.llava.model.language_model.config._attn_implementation = "llava_accel_plan"
    return fields
