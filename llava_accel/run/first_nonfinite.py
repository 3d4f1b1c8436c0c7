"""Which module is the first to give a number that is not finite."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from llava_accel.data.loader import Loaded


def first_nonfinite(model: nn.Module, window: Sequence[Loaded], accelerator: Accelerator) -> str:
    """Name of the first module whose output is not finite in this window, on any rank, else of the first such gradient.

    Runs the forward passes of the window once more; every rank must call it, with the seed of the step in force.
    """
    found: list[str] = []
    whole = accelerator.unwrap_model(model)
    assert isinstance(whole, nn.Module)
    with _watched(whole, found), torch.no_grad():
        for micro_batch in window:
            model(**micro_batch)
    if not found:
        gradients = ((name, parameter.grad) for name, parameter in whole.named_parameters())
        found = [
            f"the gradient of {plain(name)}" for name, value in gradients if value is not None and not _finite(value)
        ]
    everywhere: list[str] = gather_object(found[:1])
    return everywhere[0] if everywhere else "the sum over micro-batches or ranks: every module's output is finite"


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Note the names of modules without children whose output is not finite, in the order of the computation."""

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
                found.append(plain(name))

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules() if not any(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain(name: str) -> str:
    """The name that a module has in transformers, without the wrappers around it."""
    return name.removeprefix("model.").removeprefix("base_model.model.")


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all()) if tensor.is_floating_point() else True
