"""LLaVA-NeXT and OneVision of each layout and of parts: one model in memory, and what is refused before weights are read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration

from helpers.tiled import KIT, ORIGINALS, copy_original, edit_config, make_hub
from llava_accel.data.tiling import WHOLE
from llava_accel.model import layouts
from llava_accel.model.bases import find_base
from llava_accel.model.build import LoadedModel, final_config, load_model
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.processing import Processing, load_processing
from llava_accel.model.saved_processor import save_processor
from llava_accel.model.tower import tower_features
from llava_accel.recipe import ModelTable, Recipe, make_recipe

FAMILIES = ("llava_next", "llava_onevision")


def recipe_of(image_aspect: str = "auto", **model: Any) -> Recipe:
    tables = {name: value if isinstance(value, bool | dict) else str(value) for name, value in model.items()}
    data = {"train": "x.json", "image_aspect": image_aspect}
    return make_recipe({"run": {"name": "t"}, "model": tables, "data": data})


def load(recipe: Recipe) -> tuple[LoadedModel, Processing]:
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    return load_model(recipe, processing, dtype=torch.float32, device=None), processing


@pytest.fixture(scope="module", params=FAMILIES)
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_hub(request.param, tmp_path_factory.mktemp("hub") / request.param)


def test_both_layouts_give_one_model(hub: tuple[str, Path]) -> None:
    family, folder = hub
    (ours, processing), (theirs, of_hub) = (
        load(recipe_of(base=KIT / ORIGINALS[family][0])), load(recipe_of(base=folder))
    )  # fmt: skip
    assert processing.base.family.name == of_hub.base.family.name == ours.model.config.model_type == family
    assert processing.tiling == of_hub.tiling and processing.image_aspect == "tiles"
    raw = json.loads((KIT / ORIGINALS[family][0] / "config.json").read_text())
    assert [list(canvas) for canvas in processing.tiling.canvases] == raw["image_grid_pinpoints"]
    state, other = ours.model.state_dict(), theirs.model.state_dict()
    assert state.keys() == other.keys() and "model.image_newline" in state
    for name, tensor in state.items():
        rows = ours.vocab_size if "embed_tokens" in name or name == "lm_head.weight" else len(tensor)
        assert torch.equal(tensor[:rows], other[name][:rows]), name
    assert of_hub.image_token_id in of_hub.added_ids and processing.image_token_id in processing.added_ids
    pixels = torch.randn(2, 3, processing.tiling.side, processing.tiling.side)
    towers = [each.model.model.vision_tower for each in (ours, theirs)]
    found = [
        tower_features(tower, each.model.config, pixels) for tower, each in zip(towers, (ours, theirs), strict=True)
    ]
    assert torch.equal(*found) and found[0].shape[1] == processing.tiling.tile_tokens


def test_the_features_are_those_before_the_whole_towers_last_layer(hub: tuple[str, Path]) -> None:
    family, _ = hub
    loaded, processing = load(recipe_of(base=KIT / ORIGINALS[family][0]))
    tower = processing.base.vision.__class__.from_pretrained(KIT / ORIGINALS[family][1])
    from transformers import AutoModel

    whole: Any = AutoModel.from_pretrained(KIT / ORIGINALS[family][1])
    assert whole.config.num_hidden_layers == tower.num_hidden_layers == 3
    pixels = torch.randn(1, 3, processing.tiling.side, processing.tiling.side)
    states = whole.eval()(pixels, output_hidden_states=True).hidden_states[-2]
    features = tower_features(loaded.model.model.vision_tower, loaded.model.config, pixels)
    assert torch.allclose(features, states[:, states.shape[1] - processing.tiling.tile_tokens :], atol=1e-6)


def test_a_tower_inside_an_original_is_taken(tmp_path: Path, hub: tuple[str, Path]) -> None:
    family, _ = hub
    base = copy_original(family, tmp_path)
    # Copies: some versions leave weights in the file, which is written anew.
    before = {name: tensor.clone() for name, tensor in load(recipe_of(base=base))[0].model.state_dict().items()}
    inside = {
        layouts.to_original(name): tensor + 1.0 for name, tensor in before.items() if name.startswith(layouts.TOWER)
    }
    save_file(load_file(base / "model.safetensors") | inside, base / "model.safetensors")
    after = load(recipe_of(base=base))[0].model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor + 1.0 if name.startswith(layouts.TOWER) else tensor), name


@pytest.mark.parametrize(
    ("family", "kind", "architecture"),
    [("llava_onevision", "llava", "LlavaQwenForCausalLM"), ("llava_next", "share4v", "Share4VLlamaForCausalLM")],
)
def test_originals_of_other_names_are_the_same_models(
    tmp_path: Path, family: str, kind: str, architecture: str
) -> None:
    """Released LLaVA-OneVision calls itself "llava", and ShareGPT4V "share4v"."""
    base = edit_config(copy_original(family, tmp_path), model_type=kind, architectures=[architecture])
    (found, _), (expected, _) = load(recipe_of(base=base)), load(recipe_of(base=KIT / ORIGINALS[family][0]))
    state = expected.model.state_dict()
    assert found.model.config.model_type == family and found.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.model.state_dict().items())


def test_names_of_weights_map_both_ways(hub: tuple[str, Path]) -> None:
    family, folder = hub
    for name in load(recipe_of(base=folder))[0].model.state_dict():
        assert layouts.to_memory(layouts.to_hub(name)) == name == layouts.to_memory(layouts.to_original(name))
    original = load_file(KIT / ORIGINALS[family][0] / "model.safetensors")
    assert all(layouts.to_original(layouts.to_memory(name)) == name for name in original)


def test_tied_rows_stay_tied(tmp_path: Path) -> None:
    base = edit_config(copy_original("llava_onevision", tmp_path), tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight.*write false there"
    ):
        load(recipe_of(base=base))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # as some models are saved
    save_file(weights, base / "model.safetensors")
    loaded, _ = load(recipe_of(base=base))
    model = loaded.model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved/model.safetensors")
    assert "image_newline" in names and not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("family", "train"), [(family, t) for family in FAMILIES for t in ("full", "lora", "projector")]
)
def test_the_newline_is_trained_with_all_weights_only(family: str, train: str) -> None:
    recipe = recipe_of(base=KIT / ORIGINALS[family][0], train=train, train_vision=True)
    loaded, _ = load(recipe)
    model = prepare_trainable(loaded.model, recipe)
    trained = {layouts.without_peft(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ("model.image_newline" in trained) == (train == "full")
    tower = {name for name in trained if name.startswith(layouts.TOWER)}
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in tower if "layers." in name}
    assert layers == {0, 1} and not any("post_layernorm" in name or "head" in name for name in tower)


def test_parts_make_each_family_with_a_new_newline(tmp_path: Path) -> None:
    weights = load_file(KIT / "next-vicuna/model.safetensors")
    language = {name: t for name, t in weights.items() if "mm_projector" not in name and "newline" not in name}
    shutil.copytree(KIT / "next-vicuna", tmp_path / "language")
    save_file(language, tmp_path / "language/model.safetensors")
    raw = json.loads((tmp_path / "language/config.json").read_text())
    kept = {name: value for name, value in raw.items() if not name.startswith(("mm_", "image_"))}
    (tmp_path / "language/config.json").write_text(json.dumps(kept | {"model_type": "llama"}))
    parts: dict[str, Any] = {"language_model": tmp_path / "language", "vision_tower": KIT / "clip"}
    newlines: list[Any] = []
    for family in FAMILIES:
        loaded, processing = load(recipe_of(**parts, family=family))
        assert loaded.model.config.model_type == family
        assert processing.tiling.canvases == processing.base.family.released(28)
        assert any("image_newline is new" in note for note in loaded.notes)
        newlines.append(loaded.model.state_dict()["model.image_newline"])
    assert torch.equal(*newlines) and 0.05 < float(newlines[0].std()) < 0.25  # 1 / sqrt(64) = 0.125
    assert load_processing(recipe_of(**parts).model, "auto").image_aspect == "pad"
    with pytest.raises(ValueError, match=r"model\.family"):
        recipe_of(base=KIT / "next-vicuna", family="llava_next")


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_whole_squares_of_a_base_that_could_cut(aspect: str) -> None:
    processing = load_processing(ModelTable(base=str(KIT / "next-vicuna")), aspect)
    assert (processing.image_aspect, processing.tiling.canvases) == (aspect, ())
    assert processing.tiling.num_tokens(WHOLE) == 17
    config: Any = final_config(processing)
    assert config.image_aspect_ratio == aspect and len(config.image_grid_pinpoints) == 5


def test_an_original_that_pads_sees_whole_squares(tmp_path: Path) -> None:
    base = edit_config(copy_original("llava_next", tmp_path), image_aspect_ratio="pad", image_grid_pinpoints=None)
    processing = load_processing(ModelTable(base=str(base)), "auto")
    assert processing.image_aspect == "pad" and processing.tiling.has_newline and not processing.tiling.canvases


def test_an_original_qwen_may_be_a_llava_of_one_square(tmp_path: Path) -> None:
    base = copy_original("llava_onevision", tmp_path)
    edit_config(base, mm_patch_merge_type="flat", image_aspect_ratio="pad")
    weights = load_file(base / "model.safetensors")
    save_file({n: t for n, t in weights.items() if n != "model.image_newline"}, base / "model.safetensors")
    loaded, processing = load(recipe_of(base=base))
    config: Any = loaded.model.config
    assert config.model_type == "llava" and config.text_config.model_type == "qwen2"
    assert processing.tiling.num_tokens(WHOLE) == 25


def test_the_saved_processor_is_the_familys_and_counts_as_training_does(tmp_path: Path) -> None:
    from PIL import Image

    processing = load_processing(ModelTable(base=str(KIT / "next-vicuna")), "auto")
    save_processor(tmp_path, processing)
    processor: Any = LlavaNextProcessor.from_pretrained(tmp_path)
    for size in ((5, 9), (66, 30), (61, 61), (20, 60), (400, 260), (25, 8)):
        text = processor(images=Image.new("RGB", size), text="<image>", return_tensors="pt")
        expected = processing.tiling.num_tokens(processing.tiling.layout(*size))
        assert int((text["input_ids"] == processing.image_token_id).sum()) == expected, size
    onevision = load_processing(ModelTable(base=str(KIT / "onevision-qwen")), "auto")
    save_processor(tmp_path / "ov", onevision)
    written = json.loads((tmp_path / "ov/processor_config.json").read_text())
    assert written["processor_class"] == "LlavaOnevisionProcessor" and written["num_image_tokens"] == 25
    images = json.loads((tmp_path / "ov/preprocessor_config.json").read_text())
    assert (
        images["image_processor_type"] == "LlavaOnevisionImageProcessor" and len(images["image_grid_pinpoints"]) == 36
    )


def test_what_is_saved_is_opened_by_transformers_and_by_us(tmp_path: Path) -> None:
    loaded, processing = load(recipe_of(base=KIT / "next-vicuna"))
    loaded.model.save_pretrained(tmp_path)
    save_processor(tmp_path, processing)
    again, of_saved = load(recipe_of(base=tmp_path))
    assert of_saved.tiling == processing.tiling and of_saved.base.layout == "hub"
    plain = LlavaNextForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, plain[name]) and torch.equal(tensor, loaded.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llava_next", {"image_grid_pinpoints": [[28, 55]]}, "image_grid_pinpoints is .*28 px"),
        ("llava_next", {"image_grid_pinpoints": None}, "image_grid_pinpoints is None"),
        ("llava_next", {"mm_vision_select_feature": "cls_patch"}, "gives 17 tokens"),
        ("llava_next", {"use_image_newline_parameter": False}, "use_image_newline_parameter is false.*image_newline"),
        ("llava_onevision", {"image_aspect_ratio": "anyres_max_0"}, "'anyres_max_0' is none of the ways"),
    ],
)
def test_originals_that_no_model_can_hold_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    base = edit_config(copy_original(family, tmp_path), **changes)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=said):
        find_base(ModelTable(base=str(base)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llava_next_video"}, "LLaVA-NeXT-Video, whose frames are pooled"),
        ({"model_type": "vipllava"}, "ViP-LLaVA.*joins several layers"),
        ({"model_type": "LLaVAOneVision1_5"}, "LLaVA-OneVision-1.5"),
        ({"use_image_newline_parameter": False}, "use_image_newline_parameter is false.*image_newline"),
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'"),
        ({"image_grid_pinpoints": [[37]]}, "image_grid_pinpoints is .*37 px"),
    ],
)
def test_models_of_the_hub_that_are_not_trained_here_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    base = edit_config(make_hub("llava_onevision", tmp_path / "hub"), **changes)
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=said):
        find_base(ModelTable(base=str(base)))


def test_a_base_without_a_newline_is_refused(tmp_path: Path) -> None:
    base = copy_original("llava_next", tmp_path)
    weights = load_file(base / "model.safetensors")
    save_file({n: t for n, t in weights.items() if n != "model.image_newline"}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights: model\.image_newline.*Name a released model"):
        load(recipe_of(base=base))
