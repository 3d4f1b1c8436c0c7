"""What a step holds in memory at each moment, read from fake tensors: shapes and types without any numbers."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class Moment:
    """Bytes that are there at one moment of a step, beside weights and the optimizer's state."""

    activations: int = 0
    """Whatever no other field counts: what is kept for the backward pass, and what is worked with."""
    logits: int = 0
    """With their softmax and their gradient."""
    gradients: int = 0
    """Of weights, as far as they have been made."""
    copies: int = 0
    """Weights in the type that is computed in."""

    @property
    def by_rows(self) -> int:
        """What grows with the micro-batch."""
        return self.activations + self.logits

    @property
    def by_weights(self) -> int:
        """What does not."""
        return self.gradients + self.copies


class Ledger(TorchDispatchMode):
    """Counts every tensor's memory from the operation that makes it until nothing refers to it.

    Args:
        module: Its weights and buffers are no part of it; their gradients are.
        vocabulary: Lengths of a row of logits.
    """

    def __init__(self, module: nn.Module, vocabulary: Sequence[int]) -> None:
        super().__init__()
        self._vocabulary = set(vocabulary)
        tensors = [*module.parameters(), *module.buffers()]
        self._weights = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        self._entries: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}
        self._now = Moment()
        self.moments: list[Moment] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not self._is_weight(tensor):
                is_logits = tensor.ndim > 1 and tensor.shape[-1] in self._vocabulary
                self._enter(tensor, "copies" if is_cast else "logits" if is_logits else "activations")
        self.moments.append(self._now)
        return out

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
    """Those that can be the peak, whatever share of the gradients a rank keeps and however many rows there are.

    No other moment has as much of what grows with the rows, of gradients and of copies.
    """
    found: list[Moment] = []
    for moment in sorted(set(moments), key=lambda moment: (-moment.by_rows, -moment.gradients, -moment.copies)):
        if not any(other.gradients >= moment.gradients and other.copies >= moment.copies for other in reversed(found)):
            found.append(moment)
    return tuple(found)
