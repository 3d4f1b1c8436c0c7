"""What a step holds in memory at each moment, read from fake tensors: shapes and types without any numbers."""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava_accel import compat
from llava_accel.model.bases import empty_model
from llava_accel.model.build import final_config
from llava_accel.model.lora import language_model_linears, prepare_trainable, without_starting_values
from llava_accel.model.memory import enable_checkpointing, lighten_dropout
from llava_accel.model.objective import LOGITS_AT_ONCE, Objective
from llava_accel.model.processing import Processing
from llava_accel.model.task import new_objective
from llava_accel.recipe import Recipe


class _Quantised(nn.Linear):
    """Stands for a quantised layer: LoRA layers add to its output, and do not compute that themselves."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes that are there at one moment of a step, on top of weights and the optimizer's state."""

    activations: int = 0
    """All that no other field counts: tensors kept for the backward pass, and working memory."""
    logits: int = 0
    """With their softmax and their gradient."""
    gradients: int = 0
    """Gradients of weights that have been computed by then."""
    copies: int = 0
    """Copies of weights in the type that is computed in."""

    @property
    def by_rows(self) -> int:
        """Bytes that grow with the micro-batch."""
        return self.activations + self.logits

    @property
    def by_weights(self) -> int:
        """Bytes that do not grow with the micro-batch."""
        return self.gradients + self.copies


class Ledger:
    """Counts every tensor's memory from the operation that makes it until nothing refers to it.

    Args:
        module: Its weights and buffers are not counted; their gradients are.
        vocabulary: Lengths of a row of logits.
    """

    def __init__(self, module: nn.Module, vocabulary: Sequence[int]) -> None:
        self._vocabulary = set(vocabulary)
        tensors = [*module.parameters(), *module.buffers()]
        self._weights = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        self._entries: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}
        self._now = Moment()
        self.moments: list[Moment] = []
        self._watch = compat.watch_operations(self._note)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def __enter__(self) -> "Ledger":
        self._watch.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._watch.__exit__(*reason)

    def _note(self, made: list[Tensor], cast: Tensor | None) -> None:
        is_copy = cast is not None and self._is_weight(cast)
        for tensor in made:
            if not self._is_weight(tensor):
                is_logits = tensor.ndim > 1 and tensor.shape[-1] in self._vocabulary
                self._enter(tensor, "copies" if is_copy else "logits" if is_logits else "activations")
        self.moments.append(self._now)

    def _is_weight(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._weights

    def _enter(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        number, size = id(storage), storage.nbytes()
        if number not in self._entries:
            held = weakref.ref(storage, lambda _: self._add(-size, self._entries.pop(number)[2]))
            self._entries[number] = (held, size, kind)
            self._add(size, kind)

    def _add(self, size: int, kind: str) -> None:
        self._now = replace(self._now, **{kind: getattr(self._now, kind) + size})

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        number = id(parameter.grad.untyped_storage())
        held, size, kind = self._entries[number]
        self._entries[number] = (held, size, "gradients")
        self._add(-size, kind)
        self._add(size, "gradients")


def highest(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Moments that can be the peak, whatever share of the gradients a rank keeps and however many rows there are.

    A moment is left out if another has at least as much of all three: what grows with the rows, gradients, copies.
    """
    candidates: list[Moment] = []
    for moment in sorted(set(moments), key=lambda moment: (-moment.by_rows, -moment.gradients, -moment.copies)):
        if not any(o.gradients >= moment.gradients and o.copies >= moment.copies for o in reversed(candidates)):
            candidates.append(moment)
    return tuple(candidates)


def build_meta(recipe: Recipe, processing: Processing, dtype: torch.dtype) -> nn.Module:
    """The recipe's model on the meta device, trainable as in the run; its adapter is new, whatever the recipe says."""
    config = copy.deepcopy(final_config(processing))
    table = without_starting_values(recipe.model).model_copy(update={"adapter": ""})
    with torch.device("meta"):
        model = empty_model(processing.base, config).to(dtype)  # pyright: ignore[reportArgumentType]
        if recipe.model.quantization.bits < 16:
            for name in language_model_linears(model):
                model.get_submodule(name).__class__ = _Quantised
        prepared = prepare_trainable(model, recipe.model_copy(update={"model": table}))
    enable_checkpointing(model, recipe.model.gradient_checkpointing)
    lighten_dropout(prepared)
    return prepared


def trace_step(
    recipe: Recipe, processing: Processing, batch: Mapping[str, object], dtype: torch.dtype, is_sharded: bool
) -> tuple[Moment, ...]:
    """The moments of forward and backward pass that can be the peak, on one rank.

    If the recipe accumulates, two micro-batches are traced: the gradients of the first are there during the second.

    Args:
        batch: A real one; only its shapes count.
        dtype: The type that is computed in.
        is_sharded: Whether ranks share each weight; all logits are then made at once.
    """
    model = build_meta(recipe, processing, dtype).train()
    with traced(model, recipe, processing, batch, dtype, is_sharded) as (objective, fields, ledger):
        for _ in range(min(2, recipe.train.accumulation_steps)):
            objective(**fields).sum().backward()
    return highest(ledger.moments)


@contextmanager
def traced(
    model: nn.Module,
    recipe: Recipe,
    processing: Processing,
    batch: Mapping[str, object],
    dtype: torch.dtype,
    is_sharded: bool,
) -> Iterator[tuple[Objective, dict[str, Any], Ledger]]:
    """A model's objective, a batch with the shapes of `batch`, and the ledger of their memory; in the block tensors have
    no numbers. The other arguments are those of `trace_step`."""
    # On the meta device itself there is no autocast, and its copies of the weights are not small.
    with compat.fake_tensors(model):
        objective = new_objective(recipe, model, processing.vocab_size, dtype)
        objective.is_sharded = is_sharded
        with Ledger(objective, [processing.vocab_size, objective.llava.lm_head.out_features]) as ledger:
            fields = {
                key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            config = objective.llava.model.language_model.config
            if not fields["branched"] and compat.attention_kernel(config) != "eager":
                compat.set_attention_kernel(config, "sdpa")  # the others need values, and take as much memory
            yield objective, fields, ledger


def by_sharing(
    num_targets: int, processing: Processing, trace: Callable[[bool], tuple[Moment, ...]]
) -> dict[bool, tuple[Moment, ...]]:
    """Results of `trace` by whether ranks share each weight, which makes a difference only for many logits."""
    alone = trace(False)
    return {False: alone, True: trace(True) if num_targets * processing.vocab_size > LOGITS_AT_ONCE else alone}
