"""Memory of one rank under each launch profile: from a model's weights and the moments of a traced step to the peak."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from llava_accel.estimate.trace import Moment, build_meta
from llava_accel.model.layouts import LANGUAGE_MODEL
from llava_accel.model.processing import Processing
from llava_accel.recipe import QuantizationTable, Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import is_sharded, resolve_precision
from llava_accel.runtime.zero import REDUCE_BUCKET_SIZE

GIB, MIB = 2**30, 2**20
CONTEXT_BYTES = 0.7 * GIB
"""GPU memory that the driver and the kernels' libraries take."""
USABLE = 0.95
"""Share of a GPU that blocks of unequal size can fill, where they grow (`expandable_segments`)."""
SPARE_BYTES = int(1.5 * GIB)
"""For a process that compares an export: driver, kernels' libraries, and the computation of a few examples."""
_LIVE_WEIGHTS = 1_000_000_000
"""Weights that ZeRO-3 keeps whole before it divides some again: DeepSpeed's `stage3_max_live_parameters`."""
_STATE_BYTES = {"sgd": 0.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}
_OUTSIDE = "outside the layers"


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of weights, and the bytes that they take where they are whole."""

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
    """Bytes of the largest tensor of all."""


def count_weights(model: nn.Module, recipe: Recipe) -> Weights:
    """The weights of a model on the meta device, in the types that a run keeps them in."""
    linears = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and LANGUAGE_MODEL in f"{name}." and ".lora_" not in name
    }
    numbers, sizes, layers = Counter[str](), Counter[str](), Counter[str]()
    largest_trained = largest_bytes = 0
    for name, parameter in model.named_parameters():
        number, size = parameter.numel(), parameter.numel() * parameter.element_size()
        kind = "trained" if parameter.requires_grad else "frozen"
        if recipe.model.quantization.bits < 16 and id(parameter) in linears:
            kind, size = "quantised", round(number * bits_a_weight(recipe.model.quantization) / 8)
        elif parameter.requires_grad:
            largest_trained = max(largest_trained, number)
        largest_bytes = max(largest_bytes, size)
        numbers[kind] += number
        sizes[kind] += size
        before, _, after = name.partition(".layers.")
        layers[f"{before}.{after.split('.')[0]}" if after else _OUTSIDE] += size
    outside_bytes = layers.pop(_OUTSIDE, 0)
    return Weights(
        total=numbers.total(),
        trained=numbers["trained"],
        quantised=numbers["quantised"],
        frozen_bytes=sizes["frozen"],
        quantised_bytes=round(numbers["quantised"] * bits_a_weight(recipe.model.quantization) / 8),
        outside_bytes=outside_bytes,
        largest_layer_bytes=max(layers.values()),
        largest_trained=largest_trained,
        largest_bytes=largest_bytes,
    )


def verified_bytes(weights: Weights, recipe: Recipe, dtype: torch.dtype) -> int:
    """Bytes that a second copy of the finished model takes to be compared with it, while it computes a few examples."""
    trained = weights.trained * (dtype.itemsize if recipe.model.train == "full" else 4)
    return weights.frozen_bytes + weights.quantised_bytes + trained + SPARE_BYTES


def bits_a_weight(table: QuantizationTable) -> float:
    """Bits of a quantised weight: 4 and an fp32 scale for 64 of them, or if double one of 8 bits and an fp32 one for 256 of
    these; or 8 and a scale for each row."""
    if table.bits == 8:
        return 8.01
    return 4 + (8 / 64 + 32 / (64 * 256) if table.double else 32 / 64)


@dataclass(frozen=True, slots=True)
class Layout:
    """A launch profile: what it divides among its ranks, and what it keeps in main memory."""

    name: str
    ranks: int = 1
    divides_weights: bool = False
    divides_optimizer_state: bool = False
    offloads: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes on one rank, by kind."""

    layout: Layout
    weights: int
    quantised: int
    optimizer: int
    gradients: int
    """All of them, on this rank."""
    update: int
    """Working memory of the optimizer's step."""
    moments: tuple[Moment, ...]
    """Those of forward and backward pass; gradients are this rank's."""

    @property
    def standing(self) -> int:
        """Bytes that are taken all the time, whatever the batch."""
        return self.weights + self.quantised + self.optimizer

    @property
    def peak(self) -> Moment:
        """The moment that takes most on top of `standing`: in the backward pass, or when the optimizer takes its step.

        Gradients come as activations go, so that the sum of both kinds' own peaks would be too much.
        """
        update = Moment(self.update, gradients=self.gradients)
        return max((*self.moments, update), key=lambda moment: moment.by_rows + moment.by_weights)

    @property
    def total(self) -> int:
        """Bytes at the peak, `standing` included."""
        return self.standing + self.peak.by_rows + self.peak.by_weights

    def largest_batch(self, gpu_bytes: float, batch: int) -> int:
        """Rows of the worst kind that fit, if `moments` are those of `batch` rows; 0 if none does."""
        left = gpu_bytes * USABLE - CONTEXT_BYTES - self.standing
        if left < self.update + self.gradients:
            return 0
        rows = [(left - moment.by_weights) * batch / moment.by_rows for moment in self.moments if moment.by_rows]
        return max(0, int(min(rows)))


def unit_of(size: int) -> tuple[int, str]:
    """The unit to show a size in: its bytes and its name."""
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


def layouts(ranks: int) -> list[Layout]:
    """The launch profiles that ship, all but the first on `ranks` GPUs."""
    return [
        Layout("one GPU"),
        Layout("ddp", ranks),
        Layout("zero2", ranks, divides_optimizer_state=True),
        Layout("zero3", ranks, divides_weights=True, divides_optimizer_state=True),
        Layout("zero3_offload", ranks, divides_weights=True, divides_optimizer_state=True, offloads=True),
        Layout("fsdp2", ranks, divides_weights=True, divides_optimizer_state=True),
    ]


def plan_run(run: RunContext, processing: Processing, moments: Sequence[Moment]) -> tuple[Plan, Weights]:
    """Memory of one rank of a run that has been launched, and its weights."""
    recipe, accelerator = run.recipe, run.accelerator
    dtype, shares = resolve_precision(recipe.run.precision, accelerator.device), is_sharded(accelerator)
    weights = count_weights(build_meta(recipe, processing, dtype), recipe)
    layout = Layout("run", accelerator.num_processes, divides_weights=shares, divides_optimizer_state=shares)
    return plan_for(layout, weights, recipe, moments), weights


def state_bytes(recipe: Recipe) -> float:
    """Bytes of the optimizer's state per trained weight; the user's own is assumed to keep as much as AdamW."""
    return _STATE_BYTES.get(recipe.optim.optimizer, 8.0)


def plan_for(layout: Layout, weights: Weights, recipe: Recipe, moments: Sequence[Moment], on_gpu: bool = True) -> Plan:
    """Memory of one rank.

    Args:
        moments: Those of a step on one process (`trace.trace_step`).
        on_gpu: On a GPU the optimizer works on all tensors at once, on a CPU on one after the other.
    """
    gathered = _gathered_bytes(layout, weights)
    if layout.offloads:
        waiting = tuple(replace(moment, gradients=0) for moment in moments)
        return Plan(layout, gathered, 0, 0, 0, 0, waiting)
    parts = layout.ranks if layout.divides_weights else 1
    state_parts = layout.ranks if layout.divides_optimizer_state else 1
    state = weights.trained * state_bytes(recipe) / state_parts
    # FSDP2 divides no gradient before the last micro-batch of a window.
    gradient_parts = 1 if layout.name == "fsdp2" and recipe.train.accumulation_steps > 1 else state_parts
    if layout.name.startswith("zero"):
        state += 4 * weights.trained / state_parts  # DeepSpeed's own fp32 copy
    return Plan(
        layout=layout,
        weights=round((weights.frozen_bytes + 4 * weights.trained) / parts) + gathered + _bucket_bytes(layout, weights),
        quantised=round(weights.quantised_bytes / parts),
        optimizer=round(state),
        gradients=round(4 * weights.trained / state_parts),
        update=_update_bytes(weights, recipe, on_gpu) // state_parts,
        moments=tuple(replace(moment, gradients=moment.gradients // gradient_parts) for moment in moments),
    )


def _bucket_bytes(layout: Layout, weights: Weights) -> int:
    """Bytes of the buckets in which gradients are summed over ranks; FSDP2 sums them a layer at a time."""
    if layout.ranks == 1 or layout.name == "fsdp2":
        return 0
    return 4 * (weights.trained if layout.name == "ddp" else min(weights.trained, REDUCE_BUCKET_SIZE))


def _gathered_bytes(layout: Layout, weights: Weights) -> int:
    """Bytes of the weights that are whole at one time if ranks share them."""
    if not layout.divides_weights or layout.ranks == 1:
        return 0
    if layout.name == "fsdp2":  # what is outside the layers stays; the next layer comes while one is at work
        return weights.outside_bytes + 2 * weights.largest_layer_bytes
    whole = weights.frozen_bytes + weights.quantised_bytes + 4 * weights.trained
    # While a weight's pieces are joined, the pieces and the whole are there.
    return round(whole * min(1.0, _LIVE_WEIGHTS / weights.total)) + weights.largest_bytes


def _update_bytes(weights: Weights, recipe: Recipe, on_gpu: bool) -> int:
    """Bytes that the optimizer's step works with: none for AdamW, which is one kernel, and on a GPU for 8-bit ones. Others
    take a number for each trained weight there; on a CPU for those of one tensor, with its 8-bit state in fp32."""
    if recipe.optim.optimizer == "adamw":
        return 0
    in_8_bits = recipe.optim.optimizer.endswith("8bit")
    if on_gpu:
        return 0 if in_8_bits else 4 * weights.trained
    return 4 * weights.largest_trained * (5 if in_8_bits else 2)
