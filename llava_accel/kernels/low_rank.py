"""LoRA layers of peft that compute the same in fewer passes over memory, and keep less for the backward pass.

Layers with a common input are one function. It keeps the input once, in the type that is computed in, and no dropout
mask; it adds in place to the base's output, and to the input's gradient. Modules, parameters and names stay peft's. Layers
that are not plain LoRA (DoRA, several adapters at once, merged or switched off) keep peft's forward pass, too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llava_accel.kernels import dropout
from llava_accel.kernels.elementwise import gated, gated_gradients
from llava_accel.kernels.ways import compute_by


class LowRank(nn.Module):
    """The forward pass that `lighten_lora` puts before that of a peft layer's class."""

    calls_parts = False
    """Whether each module must be called by itself, as its weights are there only during that call (ZeRO-3)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _is_plain(self):
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return _apply((self,), x, None)[0]


def lighten_lora(model: nn.Module) -> None:
    """Let a model's LoRA layers on linear layers, quantised or not, compute by `LowRank`."""
    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A") and not isinstance(module, LowRank):
            if isinstance(module.get_base_layer(), nn.Linear):
                compute_by(module, LowRank)


@contextmanager
def each_by_itself(model: nn.Module) -> Iterator[None]:
    """In the block every LoRA layer is called as a module of its own, for hooks that look at modules' outputs."""
    layers = [module for module in model.modules() if isinstance(module, LowRank) and not module.calls_parts]
    for layer in layers:
        layer.calls_parts = True
    try:
        yield
    finally:
        for layer in layers:
            layer.calls_parts = False


def project(modules: Sequence[nn.Module], inputs: Tensor, up: Tensor | None = None) -> list[Tensor]:
    """The output of each of the modules for the same input.

    Args:
        up: If given, the input is silu(inputs) x up, which is computed once more in the backward pass.
    """
    plain = [module for module in modules if isinstance(module, LowRank) and _is_plain(module)]
    made: dict[nn.Module, Tensor] = dict(zip(plain, _apply(plain, inputs, up), strict=True)) if plain else {}
    if len(plain) == len(modules):
        return list(made.values())
    whole = inputs if up is None else gated(inputs, up)
    return [made[module] if module in made else module(whole) for module in modules]


def _is_plain(layer: Any) -> bool:
    if layer.calls_parts or layer.disable_adapters or layer.merged:
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return False
    return layer.lora_B[active[0]].bias is None and not layer.base_layer.weight.requires_grad


class _Part(NamedTuple):
    """A layer's factor for the output of B, and the share of its input that is dropped."""

    factor: float
    dropped: float


class _Weights(NamedTuple):
    """A layer's tensors. Either it has the base's weight, or `made`: the output of a quantised base."""

    weight: Tensor | None
    bias: Tensor | None
    made: Tensor | None
    a: Tensor
    b: Tensor


def _apply(layers: Sequence[Any], inputs: Tensor, up: Tensor | None) -> tuple[Tensor, ...]:
    kind = inputs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
    inputs, up = inputs.to(dtype), None if up is None else up.to(dtype)
    parts, tensors = [], []
    if up is not None and any(type(layer.base_layer) is not nn.Linear for layer in layers):
        inputs, up = gated(inputs, up), None
    for layer in layers:
        name = next(name for name in layer.active_adapters if name in layer.lora_A)
        base, module = layer.base_layer, layer.lora_dropout[name]
        dropped = float(module.p) if isinstance(module, nn.Dropout) and module.training else 0.0
        parts.append(_Part(layer.scaling[name] / (1 - dropped) if dropped < 1 else 0.0, dropped))
        own = (base.weight, base.bias, None) if type(base) is nn.Linear else (None, None, base(inputs).to(dtype))
        tensors += [*own, layer.lora_A[name].weight, layer.lora_B[name].weight]
    return _Sum.apply(tuple(parts), inputs, up, *tensors)  # pyright: ignore[reportReturnType]


_SIZE = 5
"""Number of fields of `_Weights`."""


def _by_layer(tensors: Sequence[Any]) -> Iterator[_Weights]:
    return (_Weights(*tensors[start : start + _SIZE]) for start in range(0, len(tensors), _SIZE))


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


class _Sum(torch.autograd.Function):
    """For each layer, base(x) + factor x B(A(dropped(x)))."""

    @staticmethod
    def forward(
        ctx: Any, parts: tuple[_Part, ...], inputs: Tensor, up: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        whole = inputs if up is None else F.silu(inputs).mul_(up)
        flat, dtype = whole.reshape(-1, whole.shape[-1]), inputs.dtype
        layers = list(_by_layer(tensors))
        noises = [dropout.draw(flat) if part.dropped else None for part in parts]
        lows = _down(flat, parts, noises, [layer.a.to(dtype) for layer in layers])
        outputs = []
        for part, layer, low in zip(parts, layers, lows, strict=True):
            b = layer.b.to(dtype).t()
            if layer.weight is None:
                assert layer.made is not None
                made = torch.addmm(layer.made.flatten(0, -2), low, b, alpha=part.factor)
            else:
                made = F.linear(flat, layer.weight.to(dtype), _cast(layer.bias, dtype))
                made.addmm_(low, b, alpha=part.factor)
            outputs.append(made.view(*whole.shape[:-1], made.shape[-1]))
        ctx.parts = parts
        kept = [tensor for layer in layers for tensor in (layer.weight, layer.bias, None, layer.a, layer.b)]
        ctx.save_for_backward(
            inputs, up, *kept, *lows, *(number for noise in noises for number in noise or (None, None))
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts, count = ctx.parts, len(ctx.parts)
        inputs, up, *saved = ctx.saved_tensors
        size = count * _SIZE
        layers, lows, numbers = list(_by_layer(saved[:size])), saved[size : size + count], saved[size + count :]
        noises = [None if numbers[at] is None else (numbers[at], numbers[at + 1]) for at in range(0, len(numbers), 2)]
        dtype = inputs.dtype
        whole = inputs if up is None else F.silu(inputs).mul_(up)
        flat = whole.reshape(-1, whole.shape[-1])
        flats = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        down = [
            (gradient @ layer.b.to(dtype)).mul_(part.factor)
            for gradient, layer, part in zip(flats, layers, parts, strict=True)
        ]
        weights, of_flat = _up(
            flat, parts, noises, [layer.a.to(dtype) for layer in layers], down, ctx.needs_input_grad[1]
        )
        of_layers: list[Any] = []
        for place, (layer, gradient) in enumerate(zip(layers, flats, strict=True)):
            needs = ctx.needs_input_grad[3 + place * _SIZE :]
            if layer.weight is not None and of_flat is not None:
                of_flat.addmm_(gradient, layer.weight.to(dtype))
            of_b = (gradient.t() @ lows[place]).mul_(parts[place].factor).to(layer.b.dtype)
            of_bias = gradient.sum(0).to(layer.bias.dtype) if layer.bias is not None and needs[1] else None
            of_layers += [None, of_bias, gradients[place] if needs[2] else None, weights[place].to(layer.a.dtype), of_b]
        if of_flat is None:
            return None, None, None, *of_layers
        of_whole = of_flat.view(whole.shape)
        if up is None:
            return None, of_whole, None, *of_layers
        return None, *gated_gradients(of_whole, inputs, up), *of_layers


def _down(
    flat: Tensor, parts: Sequence[_Part], noises: Sequence[dropout.Noise | None], a: Sequence[Tensor]
) -> list[Tensor]:
    """A(dropped(x)) of each layer; without dropout all of them in one product."""
    if not any(noises):
        return list((flat @ torch.cat(list(a)).t()).split([len(each) for each in a], dim=1))
    return [_dropped(flat, noise, part.dropped) @ each.t() for part, noise, each in zip(parts, noises, a, strict=True)]


def _dropped(values: Tensor, noise: dropout.Noise | None, p: float) -> Tensor:
    return values if noise is None else dropout.kept(values, dropout.keep_bits(noise, p, values.dtype))


def _up(
    flat: Tensor,
    parts: Sequence[_Part],
    noises: Sequence[dropout.Noise | None],
    a: Sequence[Tensor],
    down: Sequence[Tensor],
    is_wanted: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of A of each layer, and of the input through all of them."""
    if not any(noises):
        joined = torch.cat(list(down), dim=1)
        weights = list((joined.t() @ flat).split([len(each) for each in a]))
        return weights, joined @ torch.cat(list(a)) if is_wanted else None
    weights, of_flat = [], None
    for part, noise, each, low in zip(parts, noises, a, down, strict=True):
        if noise is None:
            weights.append(low.t() @ flat)
            through = low @ each
        else:
            bits = dropout.keep_bits(noise, part.dropped, flat.dtype)
            weights.append(low.t() @ dropout.kept(flat, bits))
            through = dropout.kept(low @ each, bits)
        of_flat = through if of_flat is None else of_flat.add_(through)
    return weights, of_flat if is_wanted else None
