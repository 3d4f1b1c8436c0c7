"""The maps between layouts lose no name and invent none."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_accel.model import layouts

PARITY = Path(__file__).parents[1] / "parity"


def names_of(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(torch.load(path, weights_only=True))
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@pytest.fixture(scope="module")
def memory_names() -> list[str]:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=2), text_config=LlamaConfig(num_hidden_layers=2)
    )
    with torch.device("meta"):
        return list(LlavaForConditionalGeneration(config).state_dict())


def test_every_weight_of_the_model_has_one_name_in_each_layout(memory_names: list[str]) -> None:
    for there in (layouts.to_hub, layouts.to_original):
        mapped = [there(name) for name in memory_names]
        assert len(set(mapped)) == len(memory_names)
        assert [layouts.to_memory(name) for name in mapped] == memory_names
    assert [layouts.to_memory(name) for name in memory_names] == memory_names


def test_names_of_an_original_checkpoint_come_back() -> None:
    names = names_of(PARITY / "llava-orig" / "model.safetensors")
    assert len(names) == 25
    assert [layouts.to_original(layouts.to_memory(name)) for name in names] == names


def test_an_original_checkpoint_and_its_tower_fill_the_model_exactly() -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=3), text_config=LlamaConfig(num_hidden_layers=2)
    )
    with torch.device("meta"):
        expected = set(LlavaForConditionalGeneration(config).state_dict())
    ours = {layouts.to_memory(name) for name in names_of(PARITY / "llava-orig" / "model.safetensors")}
    tower = {layouts.tower_to_memory(name) for name in names_of(PARITY / "clip" / "model.safetensors")}
    assert ours | tower == expected
    assert not ours & tower


def test_names_of_an_original_adapter_come_back() -> None:
    names = names_of(PARITY / "adapter_init" / "adapter_model.safetensors")
    assert len(names) == 28
    mapped = [layouts.adapter_to_memory(name) for name in names]
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in mapped)
    assert [layouts.adapter_to_original(name) for name in mapped] == names


def test_names_of_original_trainables_come_back() -> None:
    names = names_of(PARITY / "adapter_init" / "non_lora_trainables.bin")
    mapped = [layouts.trainable_to_memory(name) for name in names]
    assert mapped == [
        f"model.multi_modal_projector.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    ]
    assert [layouts.trainable_to_original(name) for name in mapped] == names


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.layer_norm1.bias",
            "model.vision_tower.encoder.layers.0.layer_norm1.bias",
        ),
        ("multi_modal_projector.linear_2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
    ],
)
def test_real_names_of_every_age_are_known(name: str, memory: str) -> None:
    assert layouts.to_memory(name) == memory


def test_adapters_of_older_transformers_are_known() -> None:
    old = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert layouts.adapter_to_memory(old) == (
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.mm_projector.0.weight",
        "mm_projector.0.weight",
        "0.weight",
        "linear_1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.weight",
        "base_model.model.model.mm_projector.0.weight",
    ],
)
def test_a_projector_is_known_under_every_prefix(name: str) -> None:
    assert layouts.projector_part(name) == "linear_1.weight"


@pytest.mark.parametrize(
    "name", ["model.mm_projector.4.weight", "model.mm_projector.weight", "model.embed_tokens.weight"]
)
def test_another_kind_of_projector_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a weight of a two-layer projector"):
        layouts.projector_part(name)


def test_a_name_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer\.wte.*not a weight of a LLaVA"):
        layouts.to_memory("transformer.wte.weight")
    with pytest.raises(ValueError, match=r"does not begin with 'base_model\.model\.'"):
        layouts.adapter_to_memory("model.layers.0.mlp.up_proj.lora_A.weight")


def test_the_text_half_of_a_whole_clip_is_left_out() -> None:
    assert layouts.tower_to_memory("text_model.embeddings.token_embedding.weight") is None
    assert layouts.tower_to_memory("logit_scale") is None
    assert layouts.tower_to_memory("vision_model.pre_layrnorm.bias") == "model.vision_tower.pre_layrnorm.bias"
