"""In which type is computed: autocast for the two of 16 bits, and what each type is called in a recipe."""

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the recipe's name in `run.precision`."""


def precision_name(dtype: torch.dtype) -> str:
    """The recipe's name of a type."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Compute in this type: a type of 16 bits under autocast, which keeps norms and sums in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
