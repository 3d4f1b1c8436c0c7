"""What a model consists of, for the console before step 1: trained and frozen parameters by part, and bytes by type."""

from collections import Counter
from dataclasses import dataclass

from bitsandbytes.nn.modules import Params4bit
from torch import nn

PARTS = ("LoRA", "projector", "vision tower", "language model")


@dataclass(frozen=True, slots=True)
class PartRow:
    """Weights of one part. `share` is the trained part of all weights of the model, from 0 to 1."""

    part: str
    trainable: int
    total: int
    share: float


@dataclass(frozen=True, slots=True)
class TypeRow:
    """Weights kept in one type, and the bytes that they take; 4-bit weights count as what they stand for."""

    dtype: str
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TrainableSummary:
    """Rows for the console."""

    parts: list[PartRow]
    types: list[TypeRow]

    def lines(self) -> list[str]:
        """The summary as text, one line a row."""
        parts = [
            f"{row.part:<15} {row.trainable:>14,} of {row.total:>14,} weights trained ({row.share:.2%} of the model)"
            for row in self.parts
        ]
        types = [f"{row.dtype:<15} {row.parameters:>14,} weights, {row.bytes / 2**20:,.1f} MiB" for row in self.types]
        return parts + types


def trainable_summary(model: nn.Module, tower: nn.Module | None = None) -> TrainableSummary:
    """Count the weights of a model before the backend shards it.

    Args:
        tower: A vision tower that is not in the model; on the meta device it takes no memory.
    """
    trained: Counter[str] = Counter()
    total: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    size: Counter[str] = Counter()
    apart = tower.named_parameters(prefix="vision_tower") if tower else ()
    for name, parameter in (*model.named_parameters(), *apart):
        count, kind = num_weights(parameter), type_name(parameter)
        part = _part_of(name)
        total[part] += count
        trained[part] += count if parameter.requires_grad else 0
        if parameter.is_meta:
            continue
        weights[kind] += count
        size[kind] += parameter.numel() * parameter.element_size()
    everything = sum(total.values())
    return TrainableSummary(
        [PartRow(part, trained[part], total[part], trained[part] / everything) for part in PARTS if total[part]],
        [TypeRow(kind, weights[kind], size[kind]) for kind in sorted(weights)],
    )


def num_weights(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; a 4-bit one holds several in each element of its storage."""
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    if state is not None:
        assert state.shape is not None
        return state.shape.numel()
    return parameter.numel()


def type_name(parameter: nn.Parameter) -> str:
    """`nf4`, `fp4`, or the type of the tensor."""
    if isinstance(parameter, Params4bit):
        return parameter.quant_type
    return str(parameter.dtype).removeprefix("torch.")


def _part_of(name: str) -> str:
    if ".lora_" in name:
        return "LoRA"
    if "multi_modal_projector" in name:
        return "projector"
    return "vision tower" if "vision_tower" in name else "language model"
