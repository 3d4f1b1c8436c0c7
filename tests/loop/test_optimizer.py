"""Parameter groups, and a schedule that is counted in optimizer steps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import llava_accel.train as verb
from helpers import toys
from helpers.runs import PARITY, metrics, mixed_records, recipe, write_records
from llava_accel.loop.optimizer import (
    build_optimizer,
    build_scheduler,
    decayed,
    learning_rates,
    parameter_groups,
    part_of,
)
from llava_accel.model.last_layer import LastLayer
from llava_accel.model.layouts import to_original
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.objective import Objective
from llava_accel.recipe import OptimTable

RATES = OptimTable(
    learning_rate=3.0, projector_learning_rate=2.0, vision_learning_rate=1.0, weight_decay=0.5, warmup_fraction=0.25
)
PEAKS = {"language_model": 3.0, "projector": 2.0, "vision_tower": 1.0}


class Toy(nn.Module):
    """A matrix, a bias and a norm in each of LLaVA's parts, under LLaVA's names."""

    def __init__(self) -> None:
        super().__init__()
        for part in ("language_model", "multi_modal_projector", "vision_tower"):
            self.add_module(part, nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        self.lm_head = nn.Linear(2, 3, bias=False)


def groups_of(toy: Toy) -> list[dict[str, Any]]:
    return parameter_groups(toy, RATES)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_one_kernel_with_the_same_numbers(decay: float) -> None:
    settings = RATES.model_copy(update={"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": decay})
    torch.manual_seed(0)
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    built = build_optimizer(ours, settings)
    assert all(group["fused"] for group in built.param_groups)
    groups = [
        {"params": [theirs.weight], "weight_decay": decay},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=settings.betas, eps=1e-8, fused=False)
    for _ in range(20):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        built.step()
        plain.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_each_part_has_its_rate_and_vectors_are_not_decayed() -> None:
    groups = {str(group["name"]): group for group in groups_of(Toy())}
    found = {name: (group["lr"], group["weight_decay"], len(list(group["params"]))) for name, group in groups.items()}
    assert found == {
        "language_model": (3.0, 0.5, 2),
        "language_model (no decay)": (3.0, 0.0, 3),
        "projector": (2.0, 0.5, 1),
        "projector (no decay)": (2.0, 0.0, 3),
        "vision_tower": (1.0, 0.5, 1),
        "vision_tower (no decay)": (1.0, 0.0, 3),
    }


def original_model(run: str) -> nn.Module:
    """The modules of LLaVA's own run of that name, as transformers builds them; sizes are smaller."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    pixels: dict[str, Any] = {"image_size": 28, "patch_size": 14}
    if run == "next_full":
        text: Any = LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes)
        clip = CLIPVisionConfig(num_hidden_layers=3, **sizes, **pixels)
        return LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=text, vision_config=clip))
    text = Qwen2Config(vocab_size=8, num_hidden_layers=3, **sizes)
    tower = SiglipVisionConfig(num_hidden_layers=2, vision_use_head=False, **sizes, **pixels)
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(text_config=text, vision_config=tower))


@pytest.mark.parametrize("run", ["next_full", "onevision_full"])
def test_the_original_rule_decays_what_llavas_own_optimizer_did(run: str) -> None:
    """parity/original_decay.json: the groups of `LLaVATrainer.create_optimizer`, LLaVA-NeXT df17966, transformers 4.40."""
    model = original_model(run)
    found = decayed(model, "original")
    names = {name: name if name == "model.image_newline" else to_original(name) for name, _ in model.named_parameters()}
    expected = json.loads((PARITY / "original_decay.json").read_text())[run]
    assert {names[name] for name in found} == {*expected["decayed"]}
    assert {other for name, other in names.items() if name not in found} == {*expected["exempt"]}


def test_the_original_rule_sees_norms_behind_wrappers_and_decays_the_adapter(tmp_path: Path) -> None:
    own = recipe(tmp_path, model={"adapter": "", "lora": {"rank": 2}})
    objective = Objective(prepare_trainable(toys.make_llava(), own), toys.VOCABULARY)
    assert isinstance(objective.llava.model.language_model.layers[-1], LastLayer)
    for parameter in objective.parameters():
        parameter.requires_grad_(True)
    groups = parameter_groups(objective, RATES.model_copy(update={"decay": "original"}))
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    exempt = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}  # pyright: ignore
    assert exempt == {name for name in names.values() if "norm" in name or "bias" in name}
    assert not any("lora_" in name for name in exempt)


def test_what_is_frozen_is_in_no_group() -> None:
    toy = Toy()
    toy.vision_tower.requires_grad_(False)
    toy.lm_head.requires_grad_(False)
    grouped = {id(p) for group in groups_of(toy) for p in group["params"]}
    assert grouped == {id(p) for p in toy.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight", "language_model"),
        ("model.lm_head.weight", "language_model"),
        ("model.base_model.model.model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "vision_tower"),
    ],
)
def test_a_name_tells_the_part(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_group_that_is_not_decayed_does_not_shrink(kind: str) -> None:
    toy = Toy()
    optimizer = build_optimizer(toy, RATES.model_copy(update={"optimizer": kind}))
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    for parameter in toy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, p in toy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in toy.named_parameters() if p.ndim > 1}


def test_nothing_trainable_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"nothing is trainable.*model\.train_projector"):
        build_optimizer(Toy().requires_grad_(False), RATES)


def test_8_bits_of_state_take_nearly_the_steps_of_32() -> None:
    weights = []
    for kind in ("adamw", "adamw_8bit"):
        torch.manual_seed(0)
        layer = nn.Linear(128, 128)  # smaller tensors keep 32 bits
        optimizer = build_optimizer(layer, OptimTable(learning_rate=1e-2).model_copy(update={"optimizer": kind}))
        start = layer.weight.detach().clone()
        for _ in range(5):
            layer(torch.randn(16, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach() - start)
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8
    assert torch.dist(*weights) < 0.1 * weights[0].norm()


def _factors(schedule: str, num_steps: int, warmup_fraction: float) -> list[float]:
    """Rate of every step over the peak, and one more: what a step behind the last would have."""
    optim = RATES.model_copy(update={"schedule": schedule, "warmup_fraction": warmup_fraction})
    optimizer = build_optimizer(Toy(), optim)
    scheduler = build_scheduler(optimizer, optim, num_steps)
    factors = []
    for _ in range(num_steps + 1):
        rates = learning_rates(optimizer)
        factors.append(rates["projector"] / PEAKS["projector"])
        assert rates == pytest.approx({name: peak * factors[-1] for name, peak in PEAKS.items()})
        optimizer.step()
        scheduler.step()
    return factors


def test_the_cosine_goes_from_0_over_the_peak_to_0() -> None:
    # A quarter of 10 steps, rounded up: 3 steps of warm-up.
    expected = [0, 1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * step / 7)) for step in range(8))]
    assert _factors("cosine", 10, 0.25) == pytest.approx(expected, abs=1e-9)
    assert expected[3] == 1 and expected[10] == pytest.approx(0, abs=1e-9)


def test_the_line_goes_from_0_over_the_peak_to_0() -> None:
    assert _factors("linear", 10, 0.25) == pytest.approx(
        [0, 1 / 3, 2 / 3, *(1 - step / 7 for step in range(8))], abs=1e-9
    )


def test_the_constant_schedule_warms_up_and_stays() -> None:
    assert _factors("constant", 10, 0.25) == pytest.approx([0, 1 / 3, 2 / 3, *[1] * 8])


@pytest.mark.parametrize(
    ("fraction", "num_steps", "warmup"), [(0.03, 20, 1), (0.1, 20, 2), (0.11, 20, 3), (0.0, 20, 0)]
)
def test_the_warm_up_is_rounded_up(fraction: float, num_steps: int, warmup: int) -> None:
    factors = _factors("constant", num_steps, fraction)
    assert factors.index(1.0) == warmup


def test_the_rates_that_are_logged_are_those_of_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[dict[str, float]] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, closure: None = None) -> None:
        used.append(learning_rates(self))
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    data = write_records(tmp_path / "data.json", mixed_records(4))
    verb.train(recipe(tmp_path, data, train={"per_device_batch_size": 2, "max_steps": 4}))
    logged = metrics(tmp_path / "run")
    assert [line["learning_rate"] for line in logged] == [rates["language_model"] for rates in used]
    assert [line["learning_rate/projector"] for line in logged] == [rates["projector"] for rates in used]
    assert len(used) == 4 and used[0]["projector"] == 0 and used[1]["projector"] == 2e-3
