"""The last layer's MLP, run only where something is learned from its output.

An MLP treats each position by itself, and behind the last layer only positions that predict a target are read: of a
question on an image some three of hundreds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn


@contextmanager
def last_mlp_at(language_model: nn.Module, positions: Int[Tensor, "read"]) -> Iterator[None]:
    """Let the MLP of the last layer skip all other positions in forward passes; what it gives there is 0.

    The layer must not be checkpointed: it would run again after the end of this context.

    Args:
        language_model: A decoder whose layers have an `mlp`; of one whose layers have none, every position is computed.
        positions: In the flattened rows, each once.
    """
    shape: tuple[int, ...] = ()

    def take(_: nn.Module, inputs: tuple[Float[Tensor, "rows seq hidden"]]) -> tuple[Tensor]:
        nonlocal shape
        shape = inputs[0].shape
        return (inputs[0].flatten(0, 1)[positions][None],)

    def put_back(_: nn.Module, inputs: Any, output: Float[Tensor, "1 read hidden"]) -> Float[Tensor, "rows seq hidden"]:
        flat = output.new_zeros((shape[0] * shape[1], shape[2]))
        return flat.index_copy(0, positions, output[0]).view(shape)

    mlp = getattr(language_model.layers[-1], "mlp", None)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    hooks = [mlp.register_forward_pre_hook(take), mlp.register_forward_hook(put_back)] if mlp is not None else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
