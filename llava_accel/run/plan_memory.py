"""Memory of a run by kind, on one rank, for every launch profile.

Trained weights, their gradients and moments are fp32. What an engine divides is divided by the number of ranks.
"""

from dataclasses import dataclass

from torch import nn

from llava_accel.model.lora import LANGUAGE_MODEL
from llava_accel.recipe import Recipe
from llava_accel.run.plan_trace import Activations

GIB = 2**30
CONTEXT_BYTES = 0.7 * GIB
"""What the driver and the kernels' libraries take of a GPU."""
USABLE = 0.95
"""Share of a GPU that blocks of unequal size can fill."""
_MOMENTS = {"adamw": 8.0, "sgd": 0.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of weights, and what they take where they are whole."""

    total: int
    trained: int
    quantised: int
    frozen_bytes: int
    quantised_bytes: int
    largest_layer_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A launch profile: what it divides among its ranks, and what it keeps in main memory."""

    name: str
    ranks: int = 1
    divides_weights: bool = False
    divides_moments: bool = False
    offloads: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes on one rank, by kind."""

    layout: Layout
    weights: int
    quantised: int
    gradients: int
    optimizer: int
    activations: Activations

    @property
    def fixed(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.quantised + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak."""
        return self.fixed + self.activations.peak

    def largest_batch(self, gpu_bytes: float, batch: int) -> int:
        """Rows of the worst kind that fit beside what is fixed, if `batch` of them take `activations`."""
        left = gpu_bytes * USABLE - CONTEXT_BYTES - self.fixed
        return max(0, int(left / (self.activations.peak / batch)))


def layouts(ranks: int) -> list[Layout]:
    """The launch profiles that ship, each on `ranks` GPUs but the first."""
    return [
        Layout("one GPU"),
        Layout("ddp", ranks),
        Layout("zero2", ranks, divides_moments=True),
        Layout("zero3", ranks, divides_weights=True, divides_moments=True),
        Layout("zero3_offload", ranks, divides_weights=True, divides_moments=True, offloads=True),
        Layout("fsdp2", ranks, divides_weights=True, divides_moments=True),
    ]


def count_weights(model: nn.Module, recipe: Recipe) -> Weights:
    """Of a model on the meta device, in the types that a run keeps them in."""
    table = recipe.model.quantization
    linears = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and LANGUAGE_MODEL in f"{name}." and ".lora_" not in name
    }
    total = trained = quantised = frozen_bytes = 0
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
        else:
            frozen_bytes += own
        before, _, behind = name.partition(".layers.")
        key = f"{before}.{behind.split('.')[0]}" if behind else "outside the layers"
        sizes[key] = sizes.get(key, 0) + own
    return Weights(total, trained, quantised, frozen_bytes, round(quantised * _bits(recipe) / 8), max(sizes.values()))


def _bits(recipe: Recipe) -> float:
    """Bits a quantised weight: 4 with a scale for 64, itself 8 bits with one for 256 where double; 8 with one a row."""
    table = recipe.model.quantization
    if table.bits == 8:
        return 8.01
    return 4 + (8 / 64 + 32 / (64 * 256) if table.double else 32 / 64)


def plan_for(layout: Layout, weights: Weights, recipe: Recipe, activations: Activations) -> Plan:
    """Memory of one rank."""
    gathered = weights.largest_layer_bytes if layout.divides_weights and layout.ranks > 1 else 0
    if layout.offloads:
        return Plan(layout, gathered, 0, 0, 0, activations)
    parts = layout.ranks if layout.divides_weights else 1
    moment_parts = layout.ranks if layout.divides_moments else 1
    gradients = 4 * weights.trained / moment_parts
    moments = weights.trained * _MOMENTS[recipe.optim.optimizer] / moment_parts
    if layout.name == "ddp" and layout.ranks > 1:
        gradients *= 2  # the buckets in which they are summed
    if layout.name.startswith("zero"):
        moments += 4 * weights.trained / moment_parts  # DeepSpeed's own fp32 copy
    return Plan(
        layout=layout,
        weights=round((weights.frozen_bytes + 4 * weights.trained) / parts) + gathered,
        quantised=round(weights.quantised_bytes / parts),
        gradients=round(gradients),
        optimizer=round(moments),
        activations=activations,
    )
