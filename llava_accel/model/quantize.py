"""4 and 8 bits for the frozen language model; the vision tower, the projector, embeddings and lm_head stay as they are.

peft's `prepare_model_for_kbit_training` is not used: it turns every other frozen weight (embeddings, lm_head, norms,
the whole tower) into fp32, which takes 1.1 GB more for a 7B model and serves fp16 and reentrant checkpointing, neither
of which is used here. Frozen weights keep their type; Llama's norms compute in fp32 whatever type their weights have;
and the freezing, which is what is left of that function, is done by `prepare_trainable`.
"""

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig

from llava_accel.recipe import QuantizationTable

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
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
