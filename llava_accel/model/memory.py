"""What a forward pass keeps for the backward pass: layers that are computed again, and dropout without its noise."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_accel.recipe import QuantizationTable


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
    tower = [module for name, module in layers if "vision_tower." in name]
    chosen = language_model[: -1 : int(every)] if every else []
    again = partial(checkpoint, use_reentrant=False)
    for module in chosen + ([module for module in tower if _is_trained(module)] if every else []):
        # What transformers' own switch sets, which knows nothing between all layers and none in its older versions.
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = again  # pyright: ignore[reportArgumentType]  it is no submodule
    return len(chosen)


class LightDropout(nn.Dropout):
    """Dropout that keeps one byte for each number: PyTorch's own does so on a GPU alone, and keeps four on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


def lighten_dropout(model: nn.Module) -> None:
    """Make every `nn.Dropout` a light one: the adapters have one before each of their layers."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, LightDropout(child.p))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


SKIPPED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
"""Full paths: a skip list is matched from the start of a name, so `multi_modal_projector` alone would skip nothing."""


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


def keep_storage_format(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place when a CPU with bf16 runs them in evaluation mode.

    It rounds the scales to bf16 and forgets the double quantisation, so an evaluation would change the base that
    training goes on with; and it fails on layers whose width is no multiple of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a Linear4bit; to import that class takes seconds
            module.support_avx512bf16_for_cpu = False
