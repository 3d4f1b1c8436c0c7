"""Finds a place for a second copy of a model, for a comparison: on the GPU, else on the CPU, if memory holds it."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llava_accel.checkpoint.background import free_main_memory
from llava_accel.estimate.peak_memory import GIB, SPARE_BYTES, bits_a_weight
from llava_accel.model import layouts
from llava_accel.model.files import read_weights
from llava_accel.recipe import QuantizationTable
from llava_accel.runtime.devices import free_bytes
from llava_accel.runtime.timing import duration, matrix_rate

_READ_BYTES_S = 1e9
_START_S = 15.0
_TOKENS = 5_000  # computed for a handful of examples, with images and answers
_LARGE = 2 * GIB  # below it the time is not worth a guess

NO_PLACE = "neither the GPU nor main memory has room for a second copy of the model"


@dataclass(frozen=True, slots=True)
class Place:
    """A device as PyTorch names it, the type to compute in, and bytes: those that the copy needs, and those free."""

    device: str
    dtype: torch.dtype
    needed: int
    free: int
    seconds: float
    """A guess of how long a comparison takes."""

    def __str__(self) -> str:
        where = "the CPU" if self.device == "cpu" else "the GPU"
        kind = str(self.dtype).removeprefix("torch.")
        text = f"on {where} in {kind}: it takes {self.needed / GIB:,.1f} of {self.free / GIB:,.1f} GiB that are free"
        return f"{text}, and about {duration(self.seconds)}" if self.needed > _LARGE else text


def find_place(
    folder: Path, base: str, quantization: QuantizationTable, dtype: torch.dtype, device: torch.device
) -> Place | None:
    """The place where an export, on its base if it is an adapter, fits beside what is loaded already; None if nowhere.

    Args:
        folder: The export.
        base: Folder of the base; empty where the export is a whole model.
        dtype: The type that `device` computed in. A CPU computes in fp32 if that fits: it is slow in other types.
    """
    candidates = [] if device.type == "cpu" else [(f"{device.type}:0", dtype, partial(free_bytes, device))]
    candidates += [("cpu", each, free_main_memory) for each in dict.fromkeys((torch.float32, dtype))]
    for name, kind, free in candidates:
        needed = copy_bytes(folder, base, quantization, kind) + SPARE_BYTES
        if needed <= free():
            return Place(name, kind, needed, free(), _seconds(needed, name, kind))
    return None


def copy_bytes(folder: Path, base: str, quantization: QuantizationTable, dtype: torch.dtype) -> int:
    """Bytes of the weights in memory: those of the language model's layers in the bits that they are loaded in."""
    place = Path(base or folder)
    adapters = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if base else 0
    if not place.is_dir():
        return adapters  # the base is a name of the hub: whether it fits is seen when it is loaded
    weights = 0
    for tensor in read_weights(place):
        is_layer = (
            layouts.to_memory(tensor.name).startswith(f"{layouts.LANGUAGE_MODEL}layers.") and len(tensor.shape) > 1
        )
        bits = bits_a_weight(quantization) if is_layer and quantization.bits < 16 else 8 * dtype.itemsize
        weights += round(torch.Size(tensor.shape).numel() * bits / 8)
    return weights + adapters


def _seconds(needed: int, device: str, dtype: torch.dtype) -> float:
    """The time to read the weights, and to compute with each of them once per token."""
    if needed <= _LARGE:
        return _START_S
    rate = matrix_rate(torch.device(device), dtype, 0.2)
    return _START_S + needed / _READ_BYTES_S + 2 * _TOKENS * needed / dtype.itemsize / rate
