"""Runs in fp64: what is left of a distance to the original is then the original's own rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.setup import assembly

IN_FP64: dict[str, Any] = {"cache_features": False}
"""Keys of `data` for such a run: features on the disk are of fp32."""


def in_fp64(patch: pytest.MonkeyPatch) -> None:
    """No mutant: compute in fp64 as soon as a run has loaded its weights.

    Norms, rotary positions, the loss and the sums of a step ask for float32 by name: it is another name of float64 then.
    """
    build = assembly.new_objective

    def doubled(recipe: Recipe, model: nn.Module, vocab_size: int, dtype: Any) -> Objective:
        model.double()
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        return build(recipe, model, vocab_size, torch.float64)

    patch.setattr(assembly, "new_objective", doubled)
