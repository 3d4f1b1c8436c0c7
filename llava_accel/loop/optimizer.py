"""Parameter groups, optimizer, and a schedule counted in optimizer steps."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_accel.exceptions import UserError
from llava_accel.loop.own_optimizer import own_optimizer
from llava_accel.own_code import is_own
from llava_accel.recipe import OptimTable

_NORMS = (nn.LayerNorm, LlamaRMSNorm)
"""ALL_LAYERNORM_LAYERS of transformers 4.40; other RMS norms, such as Qwen2's, were never added to that list."""

_FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch's AdamW is one kernel; it computes the same within 1e-6."""


def parameter_groups(model: nn.Module, optim: OptimTable) -> list[dict[str, Any]]:
    """{language model and adapter, projector, vision tower} x {decayed, not decayed}, without empty groups.

    Each group carries its `name` for logs.
    """
    rates = {
        "language_model": optim.learning_rate,
        "projector": optim.projector_learning_rate,
        "vision_tower": optim.vision_learning_rate,
    }
    decayed_names = decayed(model, optim.decay)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), name in decayed_names), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": optim.weight_decay if is_decayed else 0.0,
            "name": part if is_decayed else f"{part} (no decay)",
        }
        for (part, is_decayed), parameters in groups.items()
    ]


def decayed(model: nn.Module, rule: str) -> set[str]:
    """Names of the parameters that weight decay shrinks.

    Args:
        rule: The recipe's `optim.decay`. "original" is what `create_optimizer` in LLaVA's llava/train/llava_trainer.py
            does with `get_parameter_names` of transformers 4.40: everything without "bias" in its name that is outside of
            the norms that this version lists.
    """
    if rule == "weights":
        return {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _NORMS)]
    exempt = {f"{norm}.{name}" for norm, module in norms for name, _ in module.named_parameters()}
    return {name for name, _ in model.named_parameters() if name not in exempt and "bias" not in name}


def part_of(name: str) -> str:
    """Which of LLaVA's three parts a parameter belongs to."""
    if "multi_modal_projector" in name:
        return "projector"
    return "vision_tower" if "vision_tower" in name else "language_model"


def build_optimizer(model: nn.Module, optim: OptimTable) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters.

    Raises:
        UserError: nothing is trainable, or a function of the user's does not return an optimizer for all weights.
    """
    groups = parameter_groups(model, optim)
    if not groups:
        raise UserError("model.train: nothing is trainable. Set model.train_projector or model.train_vision to true")
    if is_own(optim.optimizer):
        return own_optimizer(groups, optim)
    betas = (optim.betas[0], optim.betas[1])
    if optim.optimizer == "adamw":
        devices = {parameter.device.type for parameter in model.parameters() if parameter.requires_grad}
        fused = devices <= set(_FUSED)
        return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=1e-8, fused=fused)
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.learning_rate)
    import bitsandbytes

    chosen = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}  # pyright: ignore[reportPrivateImportUsage]
    return chosen[optim.optimizer](groups, lr=optim.learning_rate, betas=betas, eps=1e-8)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each part as the next step will use it; decayed and undecayed groups of a part share theirs."""
    return {str(group.get("name", "all")).partition(" ")[0]: float(group["lr"]) for group in optimizer.param_groups}


def build_scheduler(optimizer: torch.optim.Optimizer, optim: OptimTable, num_steps: int) -> LRScheduler:
    """The recipe's schedule, from 0 over the warm-up to the peak and, unless constant, back to 0 after `num_steps`."""
    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=math.ceil(optim.warmup_fraction * num_steps),
        num_training_steps=num_steps,
    )
