"""What a decoder layer with LoRA keeps for the backward pass, and how long it takes: peft's and transformers' way, and ours.

    OMP_NUM_THREADS=1 python tests/bench/one_layer.py [--rounds 8]

Bytes for each token: fake tensors, shapes and types of a LLaVA-1.5-7B under bf16 autocast, and of the model of
eighty_million.py in fp32. Weights, and what all layers share (positions), are not counted. Dropout keeps a byte a number,
as on a GPU. CPU seconds: a layer of the smaller model, 8 rows of 245 tokens, forward and backward, in turn.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import median
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

SMALL: tuple[int, int, int, int] = (512, 1376, 8, 8)
CASES: dict[str, tuple[tuple[int, int, int, int], torch.dtype]] = {
    "7 B, bf16, rank 128": ((4096, 11008, 32, 128), torch.bfloat16),
    "80 M, fp32, rank 8": (SMALL, torch.float32),
}
ROWS, SEQ = 8, 245


class ByteMasks(nn.Dropout):
    """PyTorch's own dropout on a GPU."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


def make(hidden: int, inner: int, heads: int, rank: int, p: float) -> Any:
    """A decoder of one layer with LoRA on all of its linear layers."""
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
    config = LlamaConfig(num_hidden_layers=1, vocab_size=8, **sizes, attn_implementation="sdpa")  # pyright: ignore
    lora = LoraConfig(r=rank, lora_dropout=p, target_modules="all-linear")
    model: Any = get_peft_model(LlamaModel(config), lora)  # pyright: ignore[reportArgumentType]
    return model.base_model.model.train()


def both(own: Any) -> dict[str, Any]:
    """The model in the libraries' way, and steps from it to ours."""
    light = {name: copy.deepcopy(own) for name in ("dropout without masks", "and LoRA", "and all of the layer")}
    for module in list(own.modules()):
        for child, dropout in module.named_children():
            if type(dropout) is nn.Dropout:
                setattr(module, child, ByteMasks(dropout.p))
    for number, model in enumerate(light.values()):
        lighten_dropout(model)
        if number > 0:
            lighten_lora(model)
        if number > 1:
            lighten_decoder(model)
    return {"as it was": own, **light}


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


def seconds(models: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a pass through the layer of each, by round; the first is left out."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            inputs = torch.randn(ROWS, SEQ, model.config.hidden_size).requires_grad_()
            positions = model.rotary_emb(inputs, torch.arange(SEQ)[None])
            since = time.process_time()
            made = model.layers[0](inputs, position_embeddings=positions)
            made.backward(torch.ones_like(made))
            if number:
                found[name].append(time.process_time() - since)
    return found


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    for name, (sizes, dtype) in CASES.items():
        for p in (0.05, 0.0):
            with torch.device("meta"):
                models = both(make(*sizes, p))
            sizes_kept = [f"{kept(model, dtype) / 1000:.1f} kB {way}" for way, model in models.items()]
            print(f"{name}, dropout {p}: {', '.join(sizes_kept)}")
    for p in (0.05, 0.0):
        found = seconds(both(make(*SMALL, p)), rounds)
        first = found["as it was"]
        for way, own in found.items():
            ratios = [theirs / ours for theirs, ours in zip(first, own, strict=True)]
            spread = f"{median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"dropout {p}, {way}: {median(own) * 1000:.0f} ms, {spread}")


if __name__ == "__main__":
    main()
