"""The types to compute in, by their names in a recipe; the two of 16 bits run under autocast."""

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types by their names in `run.precision`."""


def precision_name(dtype: torch.dtype) -> str:
    """The recipe's name for a type."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context that computes in this type: types of 16 bits under autocast, which keeps norms and sums in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
