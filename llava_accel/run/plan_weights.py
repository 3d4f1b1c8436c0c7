"""How many weights a model has of each kind, and what they take."""

from dataclasses import dataclass

from torch import nn

from llava_accel.model.lora import LANGUAGE_MODEL
from llava_accel.recipe import Recipe

_OUTSIDE = "outside the layers"


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of weights, and what they take where they are whole."""

    total: int
    trained: int
    quantised: int
    frozen_bytes: int
    quantised_bytes: int
    outside_bytes: int
    """Outside the layers: embeddings, `lm_head`, the projector, the first of the tower."""
    largest_layer_bytes: int
    largest_trained: int
    """Weights of the largest tensor that is trained."""
    largest_bytes: int
    """Of the largest tensor of all."""


def count_weights(model: nn.Module, recipe: Recipe) -> Weights:
    """Of a model on the meta device, in the types that a run keeps them in."""
    table = recipe.model.quantization
    linears = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and LANGUAGE_MODEL in f"{name}." and ".lora_" not in name
    }
    total = trained = quantised = frozen_bytes = largest_trained = largest_bytes = 0
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        is_quantised = table.bits < 16 and id(parameter) in linears
        own = parameter.numel() * parameter.element_size()
        if is_quantised:
            quantised += parameter.numel()
            own = round(parameter.numel() * _bits(recipe) / 8)
        elif parameter.requires_grad:
            trained += parameter.numel()
            largest_trained = max(largest_trained, parameter.numel())
        else:
            frozen_bytes += own
        largest_bytes = max(largest_bytes, own)
        before, _, behind = name.partition(".layers.")
        key = f"{before}.{behind.split('.')[0]}" if behind else _OUTSIDE
        sizes[key] = sizes.get(key, 0) + own
    packed = round(quantised * _bits(recipe) / 8)
    outside = sizes.pop(_OUTSIDE, 0)
    return Weights(
        total=total,
        trained=trained,
        quantised=quantised,
        frozen_bytes=frozen_bytes,
        quantised_bytes=packed,
        outside_bytes=outside,
        largest_layer_bytes=max(sizes.values()),
        largest_trained=largest_trained,
        largest_bytes=largest_bytes,
    )


def _bits(recipe: Recipe) -> float:
    """Bits a quantised weight: 4 with a scale for 64, itself 8 bits with one for 256 where double; 8 with one a row."""
    table = recipe.model.quantization
    if table.bits == 8:
        return 8.01
    return 4 + (8 / 64 + 32 / (64 * 256) if table.double else 32 / 64)
