"""Decoder layers that compute our way give what transformers' own give, and keep less."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaModel,
)

from helpers.decoders import DECODERS, saved_bytes
from helpers.forked import run
from llava_accel.kernels.decoder import lighten_decoder
from llava_accel.kernels.elementwise import gated, normed, rotated
from llava_accel.kernels.low_rank import lighten_lora

HIDDEN, INNER, KEYS = 32, 48, 16
SIZES = {
    "vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "sdpa",
}  # fmt: skip
ROWS, SEQ, RANK = 2, 6, 4


@pytest.fixture(params=DECODERS, ids=lambda each: each[1].__name__)
def decoder(request: pytest.FixtureRequest) -> Any:
    """Weights of norms that differ from 1; with sliding attention where the class has it."""
    config, model = request.param
    torch.manual_seed(0)
    window = (
        {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1} if config is not LlamaConfig else {}
    )
    made = model(config(**SIZES, **window)).train()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def with_lora(decoder: Any, **settings: Any) -> Any:
    config: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", **settings}
    model: Any = get_peft_model(decoder, LoraConfig(**config)).base_model.model
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model: Any, **arguments: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(ROWS, SEQ, HIDDEN, generator=generator).requires_grad_()
    hidden = model(inputs_embeds=embeds, use_cache=False, **arguments).last_hidden_state
    hidden.tanh().square().sum().backward()
    assert embeds.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), "embeds": embeds.grad, **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        size = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5 * size, msg=lambda m, n=name: n + m)


MASK = torch.zeros(ROWS, 1, SEQ, SEQ).masked_fill_(torch.ones(SEQ, SEQ).tril().logical_not(), -torch.inf)


@pytest.mark.parametrize("mask", [None, MASK], ids=["causal", "mask"])
@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA"])
def test_outputs_and_gradients_are_those_of_transformers(decoder: Any, adapters: bool, mask: Tensor | None) -> None:
    model = with_lora(decoder) if adapters else decoder
    light = copy.deepcopy(model)
    lighten_lora(light)
    lighten_decoder(light)
    assert type(light.layers[0].self_attn) is not type(model.layers[0].self_attn)
    assert list(light.state_dict()) == list(model.state_dict())
    masks = {} if mask is None else {"attention_mask": mask}
    assert_same(step(light, **masks), step(model, **masks))


def test_generation_with_a_cache_is_that_of_transformers(decoder: Any) -> None:
    light, ids = copy.deepcopy(decoder).eval(), torch.arange(2 * SEQ).view(2, SEQ)
    lighten_decoder(light)
    found, cache = [], None
    for part in ids.split([3, 1, 2], dim=1):
        with torch.no_grad():
            made = light(input_ids=part, past_key_values=cache, use_cache=True)
        found, cache = [*found, made.last_hidden_state], made.past_key_values
    expected = decoder.eval()(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_a_layer_keeps_for_each_token_cannot_grow(p: float) -> None:
    """In numbers: what came in twice (before each norm), what both norms gave, query and what was attended to, keys and
    values, gate and up; what each A gave; two roots, and dropout's number a LoRA layer."""
    torch.manual_seed(0)
    model = with_lora(LlamaModel(LlamaConfig(**SIZES)), lora_dropout=p)
    lighten_lora(model)
    lighten_decoder(model)
    layer: Any = model.layers[0]

    def kept(seq: int) -> int:
        inputs = torch.randn(1, seq, HIDDEN).requires_grad_()
        positions = model.rotary_emb(inputs, torch.arange(seq)[None])
        return saved_bytes(lambda: layer(inputs, position_embeddings=positions), (*model.parameters(), *positions))

    heads = 4 * HIDDEN // 32  # the kernel keeps a logarithm for each head
    numbers = 4 * HIDDEN + 2 * HIDDEN + 2 * KEYS + heads + 2 * INNER + 7 * RANK + 2 + (7 if p else 0)
    assert (kept(96) - kept(32)) / 64 == 4 * numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_piece_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y, weight = (torch.randn(size, dtype=torch.float64).to(dtype) for size in ((2, 3, 8), (2, 3, 8), (8,)))
    angles = torch.randn(2, 3, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2).to(dtype)
    pieces = {
        "gated": (gated, lambda a, b: nn.functional.silu(a) * b, (x, y)),
        "normed": (lambda a, w: normed(a, w, 1e-5), lambda a, w: nn.functional.rms_norm(a, (8,), w, 1e-5), (x, weight)),
        "rotated": (
            lambda a: rotated(a[:, :, None], angles.cos()[:, :, 0], angles.sin()[:, :, 0]),
            lambda a: _turn(a, angles), (x,),
        ),
    }  # fmt: skip
    tolerance = 1e-12 if dtype == torch.float64 else 4e-2
    for name, (mine, theirs, inputs) in pieces.items():
        results = []
        for function in (mine, theirs):
            leaves = [each.clone().requires_grad_() for each in inputs]
            made = function(*leaves)
            made.square().sum().backward()
            results.append([made.detach(), *(leaf.grad for leaf in leaves)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def _turn(heads: Tensor, angles: Tensor) -> Tensor:
    halves = heads[:, :, None].chunk(2, dim=-1)
    return heads[:, :, None] * angles.cos() + torch.cat((-halves[1], halves[0]), dim=-1) * angles.sin()


def test_a_decoder_of_another_form_stays_as_it_is() -> None:
    other = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    lighten_decoder(other)
    assert [type(module) for module in other] == [nn.Linear, nn.LayerNorm]


@pytest.mark.slow
def test_a_layer_is_one_graph_for_several_lengths() -> None:
    # In a process of its own: dynamo does not see through the checks of types that tests run with.
    code = """
import sys, torch
sys.path.insert(0, "tests")
from kernels.test_decoder import *
model = with_lora(LlamaModel(LlamaConfig(**SIZES)), lora_dropout=0.1)
lighten_lora(model)
lighten_decoder(model)
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
layer = torch.compile(model.layers[0], backend=backend, fullgraph=True, dynamic=True)
for seq in (5, 7, 12):
    inputs = torch.randn(2, seq, HIDDEN).requires_grad_()
    positions = model.rotary_emb(inputs, torch.arange(seq)[None])
    torch.manual_seed(0)
    found = layer(inputs, position_embeddings=positions)
    torch.manual_seed(0)
    expected = model.layers[0](inputs, position_embeddings=positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
assert len(graphs) == 1, len(graphs)
"""
    done = run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
