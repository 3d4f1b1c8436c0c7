"""The objective does no work that cannot change a gradient, and leaves no rank without one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from helpers.toys import (
    IMAGES,
    MIXED,
    PIXELS,
    PX,
    VOCABULARY,
    about_one_image,
    assert_same,
    batch_of,
    make_llava,
    talk,
    watch,
)
from llava_accel.data.collate import collate
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.trie import build_row, chain
from llava_accel.model import objective as objective_file
from llava_accel.model.objective import Objective
from llava_accel.model.tower import ParkedTower


@pytest.fixture(params=["clip", "siglip"])
def tower(request: pytest.FixtureRequest) -> str:
    """Both kinds of vision tower."""
    return request.param


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A random LLaVA with a CLIP tower."""
    return make_llava()


def test_a_batch_of_text_gives_the_projector_a_zero_gradient(llava: LlavaForConditionalGeneration) -> None:
    Objective(llava, VOCABULARY)(**batch_of([chain(talk(3, 4, 2)), chain(talk(6, 5, 1))])).backward()
    for name, parameter in llava.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_batch_of_text_gives_a_trained_tower_a_zero_gradient(llava: LlavaForConditionalGeneration) -> None:
    objective = Objective(llava, VOCABULARY, tower_on_every_rank=True)
    objective(**batch_of([chain(talk(3, 4, 2))])).backward()
    gradient = llava.model.vision_tower.embeddings.patch_embedding.weight.grad
    assert gradient is not None and not gradient.any()


def test_an_empty_micro_batch_has_loss_0_and_a_graph_to_every_trained_weight(
    llava: LlavaForConditionalGeneration,
) -> None:
    loss = Objective(llava, VOCABULARY, tower_on_every_rank=True)(**batch_of([]))
    assert loss.item() == 0
    loss.backward()
    unused = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm.")  # behind the selected layer
    missing = [name for name, p in llava.named_parameters() if p.grad is None and not any(u in name for u in unused)]
    assert not missing
    assert not any(p.grad.any() for p in llava.parameters() if p.grad is not None)


@pytest.fixture
def seen() -> Iterator[list[int]]:
    """Lengths of what a watched module was given, one entry a call."""
    yield []


def test_only_target_positions_reach_the_head(llava: LlavaForConditionalGeneration, seen: list[int]) -> None:
    watch(llava.lm_head, seen)
    Objective(llava, VOCABULARY)(**batch_of([chain(example) for example in MIXED]))
    assert seen == [sum(example.num_targets for example in MIXED)]


def test_only_target_positions_reach_the_last_mlp(llava: LlavaForConditionalGeneration) -> None:
    row = build_row(about_one_image())
    assert len(set(row.target_positions)) < len(row.target_positions), "two answers begin at one place"
    seen: list[tuple[int, ...]] = []
    mlp = llava.model.language_model.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    hooks = len(mlp._forward_pre_hooks), len(mlp._forward_hooks)
    mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    Objective(llava, VOCABULARY)(**batch_of([row]))
    assert seen == 2 * [(1, len(set(row.target_positions)))]
    assert hooks == (len(mlp._forward_pre_hooks), len(mlp._forward_hooks)), "nothing stays behind"


def test_each_image_runs_through_the_tower_once(llava: LlavaForConditionalGeneration, seen: list[int]) -> None:
    watch(llava.model.vision_tower.embeddings, seen)
    Objective(llava, VOCABULARY)(**batch_of([chain(example) for example in MIXED]))
    assert seen == [len(set("abcabad"))]


def test_a_frozen_tower_does_not_run_for_text(llava: LlavaForConditionalGeneration, seen: list[int]) -> None:
    watch(llava.model.vision_tower.embeddings, seen)
    Objective(llava, VOCABULARY)(**batch_of([chain(talk(3, 4, 2))]))
    assert not seen


def test_a_frozen_tower_keeps_no_graph_and_a_trained_one_gets_gradients(llava: LlavaForConditionalGeneration) -> None:
    batch = batch_of([chain(example) for example in MIXED])
    weight = llava.model.vision_tower.embeddings.patch_embedding.weight
    Objective(llava, VOCABULARY)(**batch).backward()
    assert weight.grad is not None and weight.grad.any()
    llava.zero_grad(set_to_none=True)
    llava.model.vision_tower.requires_grad_(False)
    outputs: list[Tensor] = []
    llava.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *values: outputs.append(values[2]))
    Objective(llava, VOCABULARY)(**batch).backward()
    assert not outputs[0].requires_grad and weight.grad is None
    gradient = llava.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and gradient.any()


def test_logits_in_parts_give_the_same_loss_and_gradients(
    llava: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    weights = [0.3, 1.0, 2.0, 1.0, 1.0]
    batch = batch_of([chain(replace(each, weight=weight)) for each, weight in zip(MIXED, weights, strict=True)])
    objective = Objective(llava, VOCABULARY)
    whole = objective(**batch)
    monkeypatch.setattr(objective_file, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    watch(llava.lm_head, seen)
    parts = objective(**batch)
    assert len(seen) > 2 and max(seen) == 5 and sum(seen) == len(batch["target_ids"])
    assert_same(llava, parts, whole)


def test_ranks_that_share_weights_call_the_head_equally_often(
    llava: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(objective_file, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    watch(llava.lm_head, seen)
    objective = Objective(llava, VOCABULARY)
    objective.is_sharded = True
    objective(**batch_of([chain(example) for example in MIXED]))
    assert len(seen) == 1


@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
def test_the_selected_layer_is_transformers_own_and_those_behind_it_do_not_run(tower: str, layer: int) -> None:
    seen: list[int] = []
    model = make_llava(tower)
    model.config.vision_feature_layer = layer
    for module in model.model.vision_tower.encoder.layers:
        watch(module, seen)
    pixels = torch.stack([PIXELS["a"], PIXELS["b"]])
    found = objective_file.tower_features(model.model.vision_tower, model.config, pixels)
    assert len(seen) == {-1: 2, -2: 1, 1: 1, 0: 0}[layer]
    expected = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(found, expected[:, 1:] if tower == "clip" else expected)


@pytest.mark.parametrize("known", ["a", "c", "ac", "bd", "abcd"])
def test_which_images_are_stored_already_changes_no_bit(llava: LlavaForConditionalGeneration, known: str) -> None:
    """A worker may read an image before or after its features are stored, and so may a run that goes on."""
    rows = [chain(example) for example in MIXED]
    objective = Objective(llava, VOCABULARY)
    llava.model.vision_tower.requires_grad_(False)
    with torch.no_grad():
        found = objective_file.tower_features(llava.model.vision_tower, llava.config, torch.stack([*PIXELS.values()]))
    stored = {view: LoadedImage(tile[None]) for view, tile in zip(IMAGES, found, strict=True) if view.file in known}
    gradients = []
    for images in (IMAGES, IMAGES | stored):
        llava.zero_grad()
        objective(**collate(rows, images, (3, PX, PX))).backward()
        gradients.append({name: p.grad for name, p in llava.named_parameters() if p.grad is not None})
    first, second = gradients
    assert first.keys() == second.keys() and any("projector" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stored_features_take_the_place_of_pixels(llava: LlavaForConditionalGeneration) -> None:
    rows = [chain(example) for example in MIXED]
    objective = Objective(llava, VOCABULARY)
    llava.model.vision_tower.requires_grad_(False)
    with torch.no_grad():
        stored = {
            view: LoadedImage(
                objective_file.tower_features(llava.model.vision_tower, llava.config, PIXELS[view.file][None])
            )
            for view in IMAGES
            if view.file in "ac"
        }
    expected = objective(**batch_of(rows))
    objective.parked = ParkedTower(llava)
    batch: dict[str, Any] = collate(rows, IMAGES | stored, (3, PX, PX))
    assert len(batch["pixel_values"]) == len(batch["tower_features"]) == 2
    assert_same(llava, objective(**batch), expected)
