"""Bytes that a decoder layer with LoRA keeps for the backward pass, for each token: peft's way and ours.

    python tests/bench/kept.py

Fake tensors: shapes and types of a LLaVA-1.5-7B under bf16 autocast, and of the model of eighty_million.py in fp32.
Weights, and what all layers share (positions), are not counted. Dropout keeps a byte a number, as on a GPU.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_accel import compat
from llava_accel.kernels.decoder import lighten_decoder
from llava_accel.kernels.low_rank import lighten_lora
from llava_accel.model.memory import lighten_dropout

CASES = {
    "7 B, bf16, rank 128": (4096, 11008, 32, 128, torch.bfloat16),
    "80 M, fp32, rank 8": (512, 1376, 8, 8, torch.float32),
}


class ByteMasks(nn.Dropout):
    """PyTorch's own dropout on a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


def make(hidden: int, inner: int, heads: int, rank: int, p: float) -> Any:
    """A decoder of one layer with LoRA on all of its linear layers, without numbers."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_hidden_layers=1,
        vocab_size=8,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        lora = LoraConfig(r=rank, lora_dropout=p, target_modules="all-linear")
        return get_peft_model(LlamaModel(config), lora).base_model.model.train()  # pyright: ignore[reportArgumentType]


def kept(model: Any, dtype: torch.dtype) -> float:
    """Bytes for each token of a row."""
    with compat.fake_tensors(model):
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
        return (_of_a_row(model, 1024, dtype) - _of_a_row(model, 512, dtype)) / 512


def _of_a_row(model: Any, seq: int, dtype: torch.dtype) -> int:
    hidden, found = model.config.hidden_size, {}
    inputs = torch.empty(1, seq, hidden, dtype=dtype).requires_grad_()
    positions = tuple(torch.empty(1, seq, hidden // model.config.num_attention_heads, dtype=dtype) for _ in "ab")
    ignored = [each.untyped_storage() for each in (*model.parameters(), *positions)]

    def note(tensor: Tensor) -> Tensor:
        if not any(tensor.untyped_storage() is each for each in ignored):
            found[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            held = model.layers[0](inputs, position_embeddings=positions)
    assert held is not None
    return sum(storage.nbytes() for storage in found.values())


def main() -> None:
    """Print a line for each case."""
    for name, (hidden, inner, heads, rank, dtype) in CASES.items():
        for p in (0.05, 0.0):
            own = make(hidden, inner, heads, rank, p)
            light = copy.deepcopy(own)
            for module in list(own.modules()):
                for child, dropout in module.named_children():
                    if type(dropout) is nn.Dropout:
                        setattr(module, child, ByteMasks(dropout.p))
            lighten_dropout(light)
            lighten_lora(light)
            lighten_decoder(light)
            before, after = (kept(model, dtype) for model in (own, light))
            print(f"{name}, dropout {p}: {before / 1000:.1f} kB before, {after / 1000:.1f} kB ({after / before:.2f} x)")


if __name__ == "__main__":
    main()
