"""How much of a forward pass is kept for the backward pass: counted on the meta device, without weights.

The objective itself runs, with the shapes of a real batch. Layers of the language model but the last are alike, so one
and two of them are run, and the difference is what each further one adds.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaConfig, LlavaForConditionalGeneration

from llava_accel.model.build import final_config
from llava_accel.model.lora import prepare_trainable, without_starting_values
from llava_accel.model.memory import lighten_dropout
from llava_accel.model.objective import LOGITS_AT_ONCE, Objective
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch on one rank. Everything grows in proportion to its rows but the logits at once."""

    kept: int
    """For the backward pass, with the recipe's gradient checkpointing, without logits."""
    logits: int
    """Logits, their softmax and its gradient, of as many targets as are computed at once."""
    working: int
    """Gradients inside one layer, and what it computes again, while everything before it is still kept."""

    @property
    def peak(self) -> int:
        """The most that is there at one time: at the end of the forward pass, or in the last layer."""
        return self.kept + max(self.logits, self.working)


class _Fused(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # pyright: ignore
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], device=query.device))
        return out


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    out = _Fused.apply(query, key, value)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("llava_accel_plan", _attention)


def build_meta(recipe: Recipe, processing: Processing, dtype: torch.dtype, num_layers: int | None = None) -> nn.Module:
    """The recipe's model on the meta device, trainable as in the run; its adapter is new, whatever the recipe says.

    Args:
        num_layers: Of the language model, where it is to have fewer.
    """
    config = copy.deepcopy(final_config(processing))
    if num_layers is not None:
        config.text_config.num_hidden_layers = num_layers  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    table = without_starting_values(recipe.model).model_copy(update={"adapter": ""})
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(dtype)  # pyright: ignore[reportArgumentType]
        prepared = prepare_trainable(model, recipe.model_copy(update={"model": table}))
    lighten_dropout(prepared)
    return prepared


def activations(
    recipe: Recipe, processing: Processing, batch: Mapping[str, Tensor | bool], dtype: torch.dtype, is_sharded: bool
) -> Activations:
    """What a micro-batch keeps.

    Args:
        batch: A real one; only its shapes count.
        dtype: The type that is computed in.
        is_sharded: Whether ranks share each weight; logits are then made at once.
    """
    one, two = (_saved(recipe, processing, batch, dtype, layers) for layers in (1, 2))
    text, vocabulary = processing.base.text, processing.vocab_size
    ids, targets = batch["input_ids"], batch["target_ids"]
    assert isinstance(ids, Tensor) and isinstance(targets, Tensor)
    layer, others = two - one, int(text.num_hidden_layers) - 1
    every = int(recipe.model.gradient_checkpointing)
    again = -(-others // every) if every else 0
    inputs = ids.numel() * int(text.hidden_size) * dtype.itemsize
    softmax = len(targets) * vocabulary * 4
    kept = one - softmax + (others - again) * layer + again * inputs
    at_once = len(targets) if is_sharded else min(len(targets), max(1, LOGITS_AT_ONCE // vocabulary))
    return Activations(
        kept=max(0, kept),
        logits=3 * at_once * vocabulary * 4,
        # A checkpointed layer is there whole only while its own gradients are computed.
        working=3 * ids.numel() * int(text.intermediate_size) * dtype.itemsize + (layer if again else 0),
    )


def _saved(
    recipe: Recipe, processing: Processing, batch: Mapping[str, Tensor | bool], dtype: torch.dtype, num_layers: int
) -> int:
    model = build_meta(recipe, processing, dtype, num_layers).to(dtype).train()
    objective = Objective(model, processing.vocab_size, tower_on_every_rank=recipe.model.train_vision)
    objective.is_sharded = True  # logits in one piece: they are counted apart
    config = objective.llava.config
    assert isinstance(config, LlavaConfig)
    objective.llava.model.language_model.config._attn_implementation = "llava_accel_plan"
    weights = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
    found: dict[int, Any] = {}  # storages are held, so that none is counted under the number of another

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage
        return tensor

    fields: dict[str, Any] = {
        key: value.to("meta") if isinstance(value, Tensor) else value for key, value in batch.items()
    }
    fields["branched"] = True  # a mask is given: making one looks at the values, which are not there
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(**fields)
    return sum(storage.nbytes() for storage in found.values())
