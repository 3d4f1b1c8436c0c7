"""Every layout becomes the same model in memory, weight by weight."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from helpers.tiny import VOCABULARY, make_clip, make_llava
from llava_accel.model import layouts
from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe, make_recipe

PARITY = Path(__file__).parents[1] / "parity"
CPU = torch.device("cpu")


def recipe_of(**model: object) -> Recipe:
    return make_recipe({"run": {"name": "t"}, "model": model, "data": {"train": "x.json"}})


def load(dtype: torch.dtype = torch.float32, **model: object) -> LoadedModel:
    recipe = recipe_of(**{name: str(v) if isinstance(v, Path) else v for name, v in model.items()})
    return load_model(recipe, load_processing(recipe.model, "pad"), dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A copy that tests may spoil: the base and, beside it, the tower that its config names."""
    shutil.copytree(PARITY / "llava-orig", tmp_path / "base")
    shutil.copytree(PARITY / "clip", tmp_path / "clip")
    return tmp_path / "base"


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return loaded.model.state_dict()


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_hubs_layout_loads_as_transformers_loads_it(hub: Path) -> None:
    loaded = load(base=hub)
    assert_same_weights(weights_of(loaded), LlavaForConditionalGeneration.from_pretrained(hub).state_dict())
    assert loaded.vocab_size == VOCABULARY + 1 == loaded.model.lm_head.out_features
    assert loaded.notes == []


def test_the_names_that_the_hub_holds_load_to_the_same_model(hub: Path, tmp_path: Path) -> None:
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    for rename in (layouts.to_hub, lambda name: name):
        memory = LlavaForConditionalGeneration.from_pretrained(hub).state_dict()
        tensors = {rename(name): tensor.contiguous() for name, tensor in memory.items()}
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert_same_weights(weights_of(load(base=tmp_path)), weights_of(load(base=hub)))


def test_the_original_layout_keeps_every_weight() -> None:
    stored = load_file(PARITY / "llava-orig" / "model.safetensors")
    tower = load_file(PARITY / "clip" / "model.safetensors")
    loaded = weights_of(load(base=PARITY / "llava-orig"))
    grown = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    for name, tensor in loaded.items():
        if name in grown:
            tensor = tensor[:2000]
        if name.startswith("model.vision_tower."):
            assert torch.equal(tensor, tower["vision_model." + name.removeprefix("model.vision_tower.")])
        else:
            assert torch.equal(tensor, stored[layouts.to_original(name)])


def test_new_rows_are_the_mean_and_stay_outside_the_softmax() -> None:
    loaded = load(base=PARITY / "llava-orig")
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        matrix = weights_of(loaded)[name]
        assert matrix.shape == (2048, 48)
        torch.testing.assert_close(matrix[2000:], matrix[:2000].mean(0).expand(48, 48))
    assert loaded.vocab_size == 2000
    assert loaded.model.generation_config.suppress_tokens == list(range(2000, 2048))
    assert loaded.model.config.image_token_id == 2000


def test_generation_never_writes_an_added_token() -> None:
    model = load(base=PARITY / "llava-orig").model
    with torch.no_grad():
        model.lm_head.weight[2000:] += 100 * model.lm_head.weight[:2000].abs().max()
    ids = model.generate(input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=8, min_new_tokens=8)
    assert isinstance(ids, torch.Tensor)
    assert ids.max() < 2000


def test_a_merged_export_of_a_grown_model_keeps_its_vocabulary(tmp_path: Path) -> None:
    recipe = recipe_of(base=str(PARITY / "llava-orig"))
    processing = load_processing(recipe.model, "pad")
    loaded = load_model(recipe, processing, dtype=torch.float32, device=CPU)
    loaded.model.save_pretrained(tmp_path)
    processing.processor.save_pretrained(tmp_path)
    again = load(base=tmp_path)
    assert again.vocab_size == 2000
    assert again.model.generation_config.suppress_tokens == list(range(2000, 2048))
    assert_same_weights(weights_of(again), weights_of(loaded))
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert plain.generation_config.suppress_tokens == list(range(2000, 2048))


def test_pickled_and_sharded_checkpoints_load_alike(original: Path) -> None:
    expected = weights_of(load(base=original))
    tensors = load_file(original / "model.safetensors")
    (original / "model.safetensors").unlink()
    torch.save(tensors, original / "pytorch_model.bin")
    assert_same_weights(weights_of(load(base=original)), expected)
    (original / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, original / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (original / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_weights(weights_of(load(base=original)), expected)
    (original / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002.safetensors.*Download"):
        load(base=original)


def test_a_tower_inside_the_checkpoint_comes_before_the_named_one(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    tower = load_file(original.parent / "clip" / "model.safetensors")
    trained = {f"model.vision_tower.vision_tower.{name}": tensor + 1 for name, tensor in tower.items()}
    save_file(tensors | trained, original / "model.safetensors")
    name = "model.vision_tower.post_layernorm.bias"
    plain = tower["vision_model.post_layernorm.bias"]
    assert torch.equal(weights_of(load(base=original))[name], plain + 1)
    assert torch.equal(weights_of(load(base=original, vision_tower=original.parent / "clip"))[name], plain)


def test_a_recipes_tower_replaces_that_of_a_hub_model(hub: Path, tmp_path: Path) -> None:
    other = make_clip(tmp_path / "clip", seed=9)
    replaced, kept = weights_of(load(base=hub, vision_tower=other)), weights_of(load(base=hub))
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    stored = load_file(other / "model.safetensors")
    assert torch.equal(replaced[name], stored["encoder.layers.0.mlp.fc1.weight"])
    assert not torch.equal(replaced[name], kept[name])
    assert torch.equal(replaced["lm_head.weight"], kept["lm_head.weight"])


def test_the_fingerprint_tells_bases_apart(hub: Path, tmp_path: Path) -> None:
    first, again = load(base=hub).fingerprint, load(torch.bfloat16, base=hub).fingerprint
    assert first == again
    other = make_llava(tmp_path / "other", seed=1)
    assert load(base=other).fingerprint != first
    shutil.copytree(hub, tmp_path / "edited")
    tensors = load_file(hub / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] += 1e-3
    save_file(tensors, tmp_path / "edited" / "model.safetensors", metadata={"format": "pt"})
    assert load(base=tmp_path / "edited").fingerprint != first
