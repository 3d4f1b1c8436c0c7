"""The decoders whose layers the package computes its own way, and what a computation keeps for the backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

DECODERS = (
    (LlamaConfig, LlamaModel),
    (MistralConfig, MistralModel),
    (Qwen2Config, Qwen2Model),
    (Qwen3Config, Qwen3Model),
)
"""Of transformers: a config's class and its model's."""


def saved_bytes(run: Callable[[], object], without: Iterable[Tensor]) -> int:
    """Bytes that are kept for the backward pass.

    Args:
        without: What is there anyway, such as weights.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = run()
    assert held is not None
    return sum(kept.values())
