"""What is trained is what the recipe says, and what a checkpoint holds brings it back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlavaForConditionalGeneration

from helpers.prepared import inputs, load, logits, prepare, random_step, recipe_of, trained
from helpers.tiny import make_llava
from llava_accel.model.lora import find_targets, language_model_linears, load_trainables, split_state
from llava_accel.setup.assembly import trainable_summary

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.language_model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("biased"), biases=True)


def test_targets_are_the_language_models_linears_by_full_path(llava_folder: Path) -> None:
    model = load(recipe_of(base=str(llava_folder))).model
    assert language_model_linears(model) == find_targets(model, "auto") == PATHS


def test_no_layer_of_tower_projector_or_head_gets_an_adapter(llava_folder: Path) -> None:
    model = prepare(base=str(llava_folder))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {f"base_model.model.{path}" for path in PATHS}


def test_the_saved_targets_name_the_same_layers_in_one_expression(llava_folder: Path) -> None:
    model = prepare(base=str(llava_folder))
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig) and isinstance(config.target_modules, str)
    plain = get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(llava_folder),
        LoraConfig(target_modules=config.target_modules),
    )
    assert {n for n, _ in plain.named_parameters() if ".lora_" in n} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }


def test_a_recipes_patterns_are_matched_against_whole_paths(llava_folder: Path) -> None:
    model = load(recipe_of(base=str(llava_folder))).model
    assert find_targets(model, [r".*\.[qv]_proj"]) == [path for path in PATHS if path[-6:] in ("q_proj", "v_proj")]
    only_first = prepare(base=str(llava_folder), lora={"rank": 4, "targets": [r".*layers\.0\.mlp\..*"]})
    adapted = {name.split(".lora_")[0] for name, _ in only_first.named_parameters() if ".lora_" in name}
    assert adapted == {f"base_model.model.{path}" for path in PATHS if ".0.mlp." in path}


@pytest.mark.parametrize("pattern", ["q_proj", r"model\.vision_tower\..*\.q_proj", "lm_head"])
def test_a_pattern_without_a_layer_is_an_error_with_near_names(llava_folder: Path, pattern: str) -> None:
    model = load(recipe_of(base=str(llava_folder))).model
    with pytest.raises(ValueError, match=r"model\.lora\.targets.*such as model\.language_model\.layers"):
        find_targets(model, [pattern])


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "olora"])
def test_every_variant_starts_at_the_bases_function(llava_folder: Path, variant: str, projector: bool) -> None:
    base = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    model = prepare(base=str(llava_folder), lora={"rank": 4, "alpha": 8, "variant": variant, "projector": projector})
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-4)
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    assert (config.use_rslora, config.use_dora) == (variant == "rslora", variant == "dora")
    assert config.init_lora_weights == (variant if variant in ("pissa", "olora") else True)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"train": "projector"}, {"projector"}),
        ({"train": "lora"}, {"LoRA", "projector"}),
        ({"train": "lora", "train_projector": False}, {"LoRA"}),
        ({"train": "lora", "lora": {"projector": True}}, {"LoRA"}),
        ({"train": "lora", "train_vision": True}, {"LoRA", "projector", "vision tower"}),
        ({"train": "full"}, {"language model", "projector"}),
        ({"train": "full", "train_projector": False}, {"language model"}),
        ({"train": "projector", "train_vision": True}, {"projector", "vision tower"}),
    ],
)
def test_the_recipe_says_which_parts_are_trained(llava_folder: Path, settings: dict[str, Any], parts: set[str]) -> None:
    summary = trainable_summary(prepare(base=str(llava_folder), **settings))
    assert {row.part for row in summary.parts if row.trainable} == parts
    whole = {row.part for row in summary.parts if row.trainable == row.total}
    assert parts - {"vision tower"} == whole, "all of a part is trained, but for the tower's unused layers"
    assert sum(row.share for row in summary.parts) <= 1


@pytest.mark.parametrize("settings", [{"train": "lora"}, {"train": "full", "train_vision": True}])
def test_trained_weights_are_fp32_and_frozen_ones_keep_their_type(llava_folder: Path, settings: dict[str, Any]) -> None:
    model = prepare(torch.bfloat16, base=str(llava_folder), **settings)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert [row.dtype for row in trainable_summary(model).types] == ["bfloat16", "float32"]


@pytest.mark.parametrize("settings", [{"train": "lora"}, {"train": "full"}, {"train": "projector"}])
def test_everything_that_is_trained_has_a_gradient(llava_folder: Path, settings: dict[str, Any]) -> None:
    model = prepare(base=str(llava_folder), train_vision=True, **settings)
    batch = inputs(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "lora"},
        {"train": "lora", "lora": {"rank": 4, "alpha": 8, "variant": "dora"}},
        {"train": "lora", "lora": {"rank": 4, "alpha": 8, "bias": "lora_only"}},
        {"train": "lora", "lora": {"rank": 4, "alpha": 8, "bias": "lora_only", "projector": True, "variant": "dora"}},
        {"train": "lora", "lora": {"rank": 4, "alpha": 8, "projector": True, "variant": "pissa"}},
        {"train": "lora", "quantization": {"bits": 4}},
        {"train": "full", "train_vision": True},
        {"train": "projector"},
    ],
)
def test_what_a_checkpoint_holds_brings_the_model_back(biased: Path, settings: dict[str, Any]) -> None:
    model = prepare(base=str(biased), **settings)
    random_step(model)
    adapter, rest = split_state(model, model.state_dict())
    again = prepare(base=str(biased), **settings)
    assert not torch.allclose(logits(again), logits(model), atol=1e-3)
    load_trainables(again, adapter, rest)
    assert torch.equal(logits(again), logits(model))
    assert all(".lora_" in name for name in adapter)
    assert all(name.startswith(("model.", "lm_head.")) and "base_" not in name for name in rest)


def test_a_checkpoint_of_other_layers_is_refused(biased: Path) -> None:
    model = prepare(base=str(biased))
    adapter, rest = split_state(model, model.state_dict())
    first = next(iter(adapter))
    with pytest.raises(ValueError, match=r"1 LoRA weights of the model are not in it"):
        load_trainables(model, {name: tensor for name, tensor in adapter.items() if name != first}, rest)
    with pytest.raises(ValueError, match=r"no place for 1 of its weights"):
        load_trainables(model, adapter, rest | {"model.vision_resampler.weight": torch.ones(1)})
