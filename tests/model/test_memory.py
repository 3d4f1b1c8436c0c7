"""Gradient checkpointing costs time and changes nothing."""

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_accel.kernels.dropout import LightDropout
from llava_accel.model.memory import enable_checkpointing, lighten_dropout


def load(folder: Path) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.requires_grad_(False)
    model.model.language_model.layers.requires_grad_(True)
    return model.train()


def gradients(model: LlavaForConditionalGeneration) -> list[torch.Tensor]:
    ids = torch.arange(3, 40)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("every", "expected"), [(False, []), (True, [0]), (1, [0]), (2, [0])])
def test_every_k_th_layer_but_the_last_is_checkpointed(
    llava_folder: Path, every: bool | int, expected: list[int]
) -> None:
    model = load(llava_folder)
    assert enable_checkpointing(model, every) == len(expected)
    layers = model.model.language_model.layers
    assert [i for i, layer in enumerate(layers) if layer.gradient_checkpointing] == expected
    tower = [m for m in model.model.vision_tower.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert tower
    assert not any(layer.gradient_checkpointing for layer in tower), "a frozen tower has nothing to recompute for"


def test_gradients_are_the_same_above_frozen_embeddings(llava_folder: Path) -> None:
    plain, checkpointed = load(llava_folder), load(llava_folder)
    enable_checkpointing(checkpointed, 2)
    forwards = []
    for layer in checkpointed.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    expected = gradients(plain)
    assert len(expected) == 18
    for ours, theirs in zip(gradients(checkpointed), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(forwards) == 3, "layer 0 twice, layer 1 once"


def test_a_trained_tower_is_checkpointed_too(llava_folder: Path) -> None:
    model = load(llava_folder)
    model.model.vision_tower.encoder.layers[0].requires_grad_(True)
    enable_checkpointing(model, True)
    assert [layer.gradient_checkpointing for layer in model.model.vision_tower.encoder.layers] == [True, False]


def test_each_dropout_becomes_a_light_one_with_its_share() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.25), torch.nn.ModuleDict({"inner": torch.nn.Dropout(0.0)}))
    lighten_dropout(model)
    light, other = model[0], model.get_submodule("1.inner")
    assert isinstance(light, LightDropout) and isinstance(other, LightDropout) and light.p == 0.25 and other.p == 0
