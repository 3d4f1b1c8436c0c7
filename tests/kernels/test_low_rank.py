"""LoRA layers that compute our way give what peft's own give, in less memory."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.decoders import saved_bytes
from helpers.forked import run
from llava_accel.kernels import dropout
from llava_accel.kernels.dropout import LightDropout
from llava_accel.kernels.low_rank import LowRank, lighten_lora, project

ROWS, SEQ, WIDTH = 2, 5, 12
NAMES = ("q", "k", "v")


class Layers(nn.Module):
    """Three linear layers of one input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias=bias) for size in (12, 6, 8))


def adapted(**settings: Any) -> Any:
    """The layers with LoRA layers on all of them, whose B is not 0."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(NAMES), **settings}
    model: Any = get_peft_model(Layers(bias=True), LoraConfig(**config)).base_model.model
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
    return model.train()


def ours(model: Any) -> Any:
    light = copy.deepcopy(model)
    lighten_lora(light)
    assert all(isinstance(light.get_submodule(name), LowRank) for name in NAMES)
    assert list(light.state_dict()) == list(model.state_dict())
    return light


def together(model: Any, inputs: Tensor) -> list[Tensor]:
    return project([model.get_submodule(name) for name in NAMES], inputs)


def apart(model: Any, inputs: Tensor) -> list[Tensor]:
    return [model.get_submodule(name)(inputs) for name in NAMES]


Run = Callable[[nn.Module, Tensor], list[Tensor]]


def step(model: Any, run: Run, micro_batches: int = 1) -> dict[str, Tensor]:
    """Outputs, and gradients of the input and of all that is trained."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Tensor] = {}
    for number in range(micro_batches):
        inputs = torch.randn(ROWS, SEQ, WIDTH, generator=generator).requires_grad_()
        made = run(model, inputs)
        # The sum of squares after a tanh: a gradient that differs at each place.
        torch.stack([each.float().tanh().square().sum() for each in made]).sum().backward()
        assert inputs.grad is not None
        found[f"input {number}"] = inputs.grad
        found |= {f"{name} {number}": each.detach() for name, each in zip(NAMES, made, strict=True)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        size = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance * size, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("run", [together, apart])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "olora"},
     {"init_lora_weights": "pissa"}, {"use_dora": True}, {"lora_bias": True}],
    ids=str,
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_peft(settings: dict[str, Any], run: Run) -> None:
    model = adapted(**settings)
    assert_close(step(ours(model), run), step(model, apart), 1e-5)


@pytest.mark.parametrize("run", [together, apart])
def test_micro_batches_add_up(run: Run) -> None:
    model = adapted()
    assert_close(step(ours(model), run, 3), step(model, apart, 3), 1e-5)


@pytest.mark.parametrize("run", [together, apart])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradient_checkpointing_changes_nothing(p: float, run: Run) -> None:
    light = ours(adapted(lora_dropout=p))
    torch.manual_seed(3)
    expected = step(copy.deepcopy(light), run)
    torch.manual_seed(3)

    def again(model: nn.Module, inputs: Tensor) -> list[Tensor]:
        made = checkpoint(run, model, inputs, use_reentrant=False)
        assert isinstance(made, list)
        return made

    found = step(light, again)
    assert_close(found, expected, 0.0)


class Masked(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.mask


@pytest.mark.parametrize("run", [together, apart])
def test_with_the_same_masks_dropout_gives_what_peft_gives(run: Run) -> None:
    p = 0.25
    model = adapted(lora_dropout=p)
    light = ours(model)
    torch.manual_seed(5)
    found = step(light, run)
    torch.manual_seed(5)
    flat = torch.empty(ROWS * SEQ, WIDTH)
    for name in NAMES:
        kept = dropout.keep_bits(dropout.draw(flat), p, torch.float32) != 0
        model.get_submodule(name).lora_dropout["default"] = Masked(kept.view(ROWS, SEQ, WIDTH) / (1 - p))
    assert_close(found, step(model, apart), 1e-5)


@pytest.mark.parametrize("run", [together, apart])
def test_in_bf16_it_differs_by_less_than_bf16_does(run: Run) -> None:
    """Each side rounds sums of about ten numbers to 8 bits a few times; ours fewer times than peft's."""
    model = adapted()
    exact = step(copy.deepcopy(model), apart)
    light = ours(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(light, run)
        theirs = step(model, apart)
    assert found["q 0"].dtype == torch.bfloat16
    assert_close(found, theirs, 4e-2)
    errors = [
        torch.cat([(side[name].float() - exact[name]).flatten() for name in exact]).norm() for side in (found, theirs)
    ]
    assert errors[0] < errors[1] * 1.1


def test_switched_off_merged_or_in_evaluation_it_is_peft() -> None:
    model = adapted(lora_dropout=0.5)
    light, inputs = ours(model), torch.randn(ROWS, SEQ, WIDTH)
    layers: list[Any] = [module for module in light.modules() if isinstance(module, LowRank)]

    def compare() -> None:
        for mine, theirs in zip(together(light, inputs), apart(model, inputs), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    light.eval()
    model.eval()
    compare()
    for each in (light, model):
        for module in each.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
    compare()
    assert torch.equal(light.q(inputs), light.q.base_layer(inputs))
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    for module in model.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(True)
    compare()
    for layer in layers:
        layer.unmerge()
    compare()


def test_where_weights_are_there_in_calls_alone_each_module_is_called() -> None:
    light = ours(adapted())
    called: list[str] = []
    for name, module in light.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
    for module in light.modules():
        if isinstance(module, LowRank):
            module.calls_parts = True
    together(light, torch.randn(ROWS, SEQ, WIDTH))
    for name in NAMES:
        assert {name, f"{name}.base_layer", f"{name}.lora_A.default", f"{name}.lora_B.default"} <= set(called)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_input_is_kept_once_and_no_mask(p: float) -> None:
    light = ours(adapted(lora_dropout=p))
    inputs = torch.randn(ROWS, SEQ, WIDTH).requires_grad_()
    rows, ranks = ROWS * SEQ, 3 * 4
    noise = 3 * (rows + WIDTH) * 4 if p else 0
    assert saved_bytes(lambda: together(light, inputs), light.parameters()) == rows * (WIDTH + ranks) * 4 + noise


def test_what_the_input_is_made_of_is_kept_and_not_the_input() -> None:
    model = adapted()
    light = ours(model)
    gate, up = (torch.randn(ROWS, SEQ, WIDTH).requires_grad_() for _ in range(2))
    again = [each.detach().clone().requires_grad_() for each in (gate, up)]
    assert saved_bytes(lambda: project((light.q,), gate, up), light.parameters()) == ROWS * SEQ * (2 * WIDTH + 4) * 4
    project((light.q,), gate, up)[0].square().sum().backward()
    model.q(nn.functional.silu(again[0]) * again[1]).square().sum().backward()
    for mine, theirs in zip((gate, up), again, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_layers_without_lora_are_called() -> None:
    model = adapted(target_modules=["q", "v"])
    light = copy.deepcopy(model)
    lighten_lora(light)
    assert not isinstance(light.k, LowRank)
    assert_close(step(light, together), step(model, apart), 1e-5)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_a_mask_drops_the_share_that_it_is_asked_for(p: float) -> None:
    torch.manual_seed(0)
    values = torch.ones(2000, 500)
    noise = dropout.draw(values)
    dropped = dropout.keep_bits(noise, p, torch.float32) == 0
    assert dropped.float().mean() == pytest.approx(p, abs=5 * (p * (1 - p) / dropped.numel()) ** 0.5)
    # Of independent numbers, pairs in a row, in a column, and across are dropped together with p squared.
    for other in (dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll((7, 3), (0, 1))):
        assert (dropped & other).float().mean() == pytest.approx(p * p, abs=0.002)
    for share in (dropped.float().mean(0), dropped.float().mean(1)):
        assert share.std() == pytest.approx((p * (1 - p) / (dropped.numel() / len(share))) ** 0.5, rel=0.1)
    again = dropout.keep_bits(noise, p, torch.bfloat16)
    assert again.dtype == torch.int16 and torch.equal(again == 0, dropped)


def test_dropout_of_its_own_keeps_no_mask() -> None:
    light, values = LightDropout(0.25), torch.rand(100, 100).add(1).requires_grad_()
    assert saved_bytes(lambda: light(values), ()) == 200 * 4
    torch.manual_seed(2)
    found = light(values)
    found.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(found, values * values.grad)
    assert torch.equal(light.eval()(values), values)


@pytest.mark.slow
def test_no_graph_break() -> None:
    # In a process of its own: dynamo does not see through the checks of types that tests run with.
    code = """
import sys, torch
sys.path.insert(0, "tests")
from kernels.test_low_rank import *
light = ours(adapted(lora_dropout=0.1))
inputs = torch.randn(ROWS, SEQ, WIDTH).requires_grad_()
explained = torch._dynamo.explain(together)(light, inputs)
assert explained.graph_break_count == 0 and explained.graph_count == 1, explained
compiled = torch.compile(together, backend="aot_eager", fullgraph=True)
torch.manual_seed(4)
found = step(copy.deepcopy(light), lambda model, x: compiled(model, x))
torch.manual_seed(4)
assert_close(found, step(light, together), 1e-5)
"""
    done = run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
