"""Ways to save memory: gradient checkpointing, dropout without kept masks, and quantised weights."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, GradientCheckpointingLayer

from llava_accel import compat
from llava_accel.kernels.dropout import LightDropout
from llava_accel.recipe import QuantizationTable

SKIPPED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
"""Full paths: a skip list is matched from the start of a name, so `multi_modal_projector` alone would skip nothing."""


def enable_checkpointing(model: nn.Module, every: bool | int) -> int:
    """Checkpoint every k-th layer of the language model, and all of the vision tower's layers that are trained.

    Not reentrant, so it works above frozen embeddings, whose output has no gradient. The language model's last layer is
    never among them: its backward pass comes first, so it would be computed twice in a row and nothing be saved.

    Args:
        model: The LLaVA, in peft's wrapper or not.
        every: False or 0 = no layer, True = every layer, k = layers 0, k, 2k, ...; always without the last.

    Returns:
        The number of layers of the language model that are checkpointed.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
    language_model = [module for name, module in layers if "language_model." in name]
    tower = [module for name, module in layers if every and "vision_tower." in name]
    trained = [module for module in tower if any(parameter.requires_grad for parameter in module.parameters())]
    chosen = language_model[: -1 : int(every)] if every else []
    again = partial(checkpoint, use_reentrant=False)
    for module in (*chosen, *trained):
        compat.checkpoint_layer(module, again)
    return len(chosen)


def lighten_dropout(model: nn.Module) -> None:
    """Replace every `nn.Dropout` by one that keeps no mask: peft puts one before each of its adapters."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, LightDropout(child.p))


def quantization_config(quantization: QuantizationTable, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The config that quantises while loading, or None with 16 bits.

    Args:
        quantization: The recipe's [model.quantization].
        dtype: The float type that the rest is computed in. 4-bit weights are also stored as it, because the backends
            that shard a model need parameters of one kind.
    """
    if quantization.bits == 16:
        return None
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(SKIPPED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=list(SKIPPED),
    )
