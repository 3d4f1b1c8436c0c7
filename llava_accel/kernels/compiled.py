"""Decoder layers through torch.compile: the layers of a model share each graph, and a graph takes every length."""

import inspect
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llava_accel.exceptions import UserError

Backend = str | Callable[..., Any]

MOST_GRAPHS = 4
"""Per model: with and without a mask, each for one row and for several. Twice as many if the first layer's input has no
gradient while the others' have one."""
MOST_KINDS = 64
"""Of calls that FlexAttention may have a kernel for: with branches and without, one row and several, lengths up to a block
and longer ones, with gradients and without, and each of them once more for the sizes that come first."""
_ROWS, _LENGTH, _MASK_LENGTH = 3, 331, 336
"""Sizes that each graph is first made for. They differ from each other and from any width of a model, since torch.compile
takes sizes that are equal then for always equal; and a mask's rows are longer than the part of them that is read."""


def require_compiler(device: torch.device) -> None:
    """Check that torch.compile works: compile one line for the device.

    Raises:
        UserError: there is no compiler, or it does not work.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise _does_not_work(device, f"there is no {compiler}")
    try:
        torch.compile(lambda x: (x + 1).sin(), fullgraph=True)(torch.zeros(8, device=device))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _does_not_work(device, lines[0] if lines else type(error).__name__) from error


def _does_not_work(device: torch.device, reason: str) -> UserError:
    needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
    return UserError(
        f"model.compile: torch.compile does not work here ({reason}). It needs {needed} and Python's headers: install them "
        "(Debian and Ubuntu: apt-get install g++ python3-dev), or set model.compile = false"
    )


def keep_flex_compiled() -> None:
    """Let FlexAttention, which transformers compiles, have a kernel for each kind of call of a run with evaluations.

    torch.compile stops at 8, and from then on all scores of a new kind would be made and kept, without an error.
    """
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MOST_KINDS)


def compile_layers(language_model: nn.Module, backend: Backend = "inductor") -> None:
    """Let all decoder layers but the last train through one compiled function.

    The last one reads only some positions. Without gradients, layers run as before: in evaluation, and in generation, whose
    cache grows.

    Args:
        language_model: Its weights keep their names, and its layers their hooks and the name of their class.
        backend: torch.compile's.
    """
    layers = language_model.layers
    assert isinstance(layers, nn.ModuleList)
    _restore(layers[:-1])
    for layer_class in {type(layer) for layer in layers[:-1]}:
        compiled = _compiled_class(layer_class, backend)
        for layer in layers[:-1]:
            if type(layer) is layer_class:
                layer.__class__ = compiled


def _restore(layers: nn.Module) -> None:
    """Give modules their libraries' own forward passes back: torch.compile finds by itself what our kernels do by hand."""
    for module in layers.modules():
        first, *others = type(module).__bases__
        if isinstance(module, nn.Dropout):
            module.__class__ = nn.Dropout
        elif others and first.__module__.startswith(f"{__package__}."):
            module.__class__ = others[0]


def _compiled_class(layer_class: type[nn.Module], backend: Backend) -> type[nn.Module]:
    """A class whose forward pass is the compiled one of `layer_class`; gradient checkpointing stays around it."""
    plain: Callable[..., Tensor] = layer_class.forward
    # Unwrapped: without transformers' own checkpointing, in which the layers could differ.
    compiled: Callable[..., Tensor] = torch.compile(inspect.unwrap(plain), dynamic=True, backend=backend)
    made: set[tuple[bool, ...]] = set()

    def forward(self: nn.Module, hidden_states: Tensor, **arguments: Any) -> Tensor:
        # A single position would need a graph of its own. It is the padding of a rank without examples.
        if not torch.is_grad_enabled() or hidden_states.shape[1] == 1 or arguments.get("past_key_values") is not None:
            return plain(self, hidden_states, **arguments)
        arguments.pop("read_positions", None)  # for the last layer
        kind = (len(hidden_states) == 1, arguments.get("attention_mask") is None, hidden_states.requires_grad)
        if kind not in made:
            made.add(kind)
            with _leaving_no_trace(hidden_states.device):
                compiled(self, **_fixed_inputs(hidden_states, **arguments))
        return compiled(self, hidden_states, **arguments)

    return type(layer_class.__name__, (layer_class,), {"forward": forward})


@contextmanager
def _leaving_no_trace(device: torch.device) -> Iterator[None]:
    """The block leaves the run's random numbers alone, and hides the tensors it saves from a checkpoint around it."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            yield


def _fixed_inputs(
    hidden_states: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor],
    **others: Any,
) -> dict[str, Any]:
    """Inputs of a fixed size and of the same kind. A graph's code depends on the sizes that it is first made for: a resumed
    run, which begins with batches of other lengths, would otherwise compute other bits."""
    rows = min(len(hidden_states), 2) // 2 * (_ROWS - 1) + 1
    if isinstance(others.get("position_ids"), Tensor):
        others["position_ids"] = torch.arange(_LENGTH, device=hidden_states.device).repeat(rows, 1)
    if attention_mask is not None:
        attention_mask = attention_mask.new_zeros((rows, 1, _LENGTH, _MASK_LENGTH))[..., :_LENGTH]
    cosine, sine = (each.new_zeros((rows, _LENGTH, each.shape[-1])) for each in position_embeddings)
    hidden = hidden_states.new_zeros((rows, _LENGTH, hidden_states.shape[-1]))
    return {
        "hidden_states": hidden.requires_grad_(hidden_states.requires_grad),
        "attention_mask": attention_mask,
        "position_embeddings": (cosine, sine),
        **others,
    }
