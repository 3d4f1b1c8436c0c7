"""Compares decoders whose norms, rotations and MLPs are liger-kernel's with ours, by Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python tests/kernels/interpreted.py

The interpreter has no functions of CUDA's libdevice, and hands real numbers over as Python's; a compiled kernel has them as
tensors of fp32. Both are made good here; the kernels are liger-kernel's own.
"""

import copy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]
from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

from helpers.decoders import DECODERS
from llava_accel.kernels.decoder import lighten_decoder
from llava_accel.kernels.liger import use_liger
from llava_accel.kernels.low_rank import lighten_lora

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
TOLERANCE = 1e-5
_as_argument = interpreter._implicit_cvt


def as_argument(value: Any) -> Any:
    """A kernel's argument, a real number as a compiled kernel has it."""
    if not isinstance(value, float):
        return _as_argument(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


def numbers(model: Any, adapters: bool) -> dict[str, Tensor]:
    """The last hidden states, and all gradients."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 5, SIZES["hidden_size"], generator=generator).requires_grad_()
    places = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 1, 2]])
    hidden = model(inputs_embeds=embeds, position_ids=places, use_cache=False).last_hidden_state
    hidden.tanh().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert embeds.grad is not None and any("lora" in name for name in found) == adapters
    return {"hidden": hidden.detach(), "embeds": embeds.grad, **found}


def made(config: type, model: type, adapters: bool) -> nn.Module:
    """A small decoder whose norms and adapters are at no special place."""
    torch.manual_seed(0)
    decoder: Any = model(config(**SIZES)).train()
    if adapters:
        decoder = get_peft_model(decoder, LoraConfig(r=4, target_modules="all-linear")).base_model.model
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    lighten_lora(decoder)
    lighten_decoder(decoder)
    return decoder


def main() -> None:
    """Print the name of each decoder that computes the same."""
    sys.modules["liger_kernel.ops.rms_norm"].rsqrt = lambda value: tl.rsqrt(value)  # pyright: ignore[reportAttributeAccessIssue]
    interpreter._implicit_cvt = as_argument
    assert functional.liger_rms_norm is not None
    for config, model in DECODERS:
        for adapters in (False, True):
            ours = made(config, model, adapters)
            theirs = copy.deepcopy(ours)
            use_liger(theirs)
            found, expected = numbers(theirs, adapters), numbers(ours, adapters)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                distance = float(torch.dist(found[name], value) / value.norm().clamp(min=1e-3))
                assert distance <= TOLERANCE, f"{model.__name__}, {name}: {distance}"
        print(model.__name__, flush=True)


if __name__ == "__main__":
    main()
