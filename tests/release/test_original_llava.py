"""What is exported for LLaVA's own code has its files, its names and its shapes, and can be loaded again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from helpers.bases import Kind, make_base
from helpers.exported import CPU, ORIGINAL, assert_same, export, fine_tune, logits, probe, prove_here
from helpers.runs import PARITY, recipe
from helpers.tiny import make_clip, make_language_model
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing

pytestmark = pytest.mark.slow
QUICKSTART = Path(__file__).parents[2] / "llava_accel" / "quickstart" / "base"


@pytest.fixture(autouse=True)
def _proved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)


def test_adapter_of_the_original_comes_back_as_the_original_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = PARITY / "adapter_final"
    ours = export(monkeypatch, theirs, "llava", tmp_path / "llava-lora", "--base", str(ORIGINAL))
    _assert_equal(load_file(ours / "adapter_model.safetensors"), load_file(theirs / "adapter_model.safetensors"))
    name = "non_lora_trainables.bin"
    _assert_equal(torch.load(ours / name, weights_only=True), torch.load(theirs / name, weights_only=True))
    config, reference = (json.loads((place / "adapter_config.json").read_text()) for place in (ours, theirs))
    assert config.keys() == reference.keys()
    for key in ("r", "lora_alpha", "bias", "peft_type", "task_type", "modules_to_save"):
        assert config[key] == reference[key]
    assert set(config["target_modules"]) == set(reference["target_modules"])
    model, reference = (json.loads((place / "config.json").read_text()) for place in (ours, PARITY / "adapter_init"))
    multimodal = {key: value for key, value in model.items() if key.startswith("mm_")}
    assert multimodal and multimodal.items() <= reference.items()


def test_llava_export_of_a_hub_base_has_the_config_of_the_original(lora_exports: dict[str, Path]) -> None:
    config = json.loads((lora_exports["llava"] / "config.json").read_text())
    reference = json.loads((ORIGINAL / "config.json").read_text())
    assert reference.keys() - config.keys() <= {"_name_or_path", "transformers_version"}
    assert config["model_type"] == "llava_llama" and config["mm_vision_tower"] == "vision_tower"
    assert set(load_file(lora_exports["llava"] / "vision_tower" / "model.safetensors")) == names_in_version_4(2)
    processor = json.loads((lora_exports["llava"] / "vision_tower" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "CLIPImageProcessor"


def test_a_mistral_has_what_the_originals_loader_of_adapters_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_base(tmp_path / "made", Kind("clip", "hub", "mistral", "sentencepiece"))
    run = fine_tune(tmp_path, model=model)
    out = export(monkeypatch, run, "llava", tmp_path / "llava-mistral-lora")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_mistral"
    assert (config["attention_bias"], config["pretraining_tp"]) == (False, 1)  # of its Llama
    whole = export(monkeypatch, model["base"], "llava", tmp_path / "llava-mistral")
    assert_same(logits(whole), logits(model["base"]))


def test_a_tower_that_lies_in_the_folder_of_a_whole_model_lies_in_its_export_too(
    llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export(monkeypatch, llava_folder, "llava", tmp_path / "first")
    assert (first / "vision_tower").is_dir()
    second = export(monkeypatch, first, "llava", tmp_path / "second")
    first.rename(tmp_path / "gone")
    assert_same(logits(second), logits(llava_folder))


def names_in_version_4(num_layers: int) -> set[str]:
    """What `CLIPVisionModel` of transformers 4.37, which LLaVA's own code runs with, calls its weights."""
    layer = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    layer += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    modules = [f"encoder.layers.{number}.{name}" for number in range(num_layers) for name in layer]
    names = {f"{name}.{kind}" for name in (*modules, "pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")}
    names |= {"embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
    return {f"vision_model.{name}" for name in names}


def test_projector_goes_through_the_originals_file_into_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        "language_model": str(make_language_model(tmp_path / "lm")),
        "vision_tower": str(make_clip(tmp_path / "clip")),
    }
    run = fine_tune(tmp_path, model={"base": "", "train": "projector", **parts})
    out = export(monkeypatch, run, "llava", tmp_path / "stage-1")
    stored = torch.load(out / "mm_projector.bin", weights_only=True)
    assert set(stored) == {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    again = recipe(tmp_path, model={"base": "", "adapter": "", **parts, "projector": str(out / "mm_projector.bin")})
    assert_same(logits(run), _logits_of(again))
    assert_same(logits(run), logits(export(monkeypatch, out, "merged", tmp_path / "whole")))


def test_full_run_goes_through_the_originals_folder_into_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = fine_tune(tmp_path, model={"base": str(ORIGINAL), "train": "full"})
    out = export(monkeypatch, full, "llava", tmp_path / "llava-full")
    theirs, ours = load_file(ORIGINAL / "model.safetensors"), load_file(out / "model.safetensors")
    shapes, expected = ({name: tensor.shape for name, tensor in state.items()} for state in (ours, theirs))
    assert expected.items() <= shapes.items()
    assert (out / "tokenizer.model").read_bytes() == (ORIGINAL / "tokenizer.model").read_bytes()
    assert_same(logits(full), _logits_of(recipe(tmp_path, model={"base": str(out), "adapter": "", "vision_tower": ""})))
    assert_same(logits(full), logits(export(monkeypatch, full, "merged", tmp_path / "merged")))


def _logits_of(again: Any) -> Tensor:
    """Logits of the model that a recipe starts from."""
    processing = load_processing(again.model, "pad")
    return probe(load_model(again, processing, dtype=torch.float32, device=CPU).model.eval(), processing)


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "unigram", "quickstart"])
def test_tokenizer_json_is_written_for_the_originals_versions(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (
        QUICKSTART if kind == "quickstart" else make_base(tmp_path / "made", Kind("clip", "hub", "llama", kind))["base"]
    )
    out = export(monkeypatch, base, "llava", tmp_path / "llava")
    text = "USER: What is this? 12 red cats.\n\nNone </s>"
    saved, own = (Tokenizer.from_file(str(Path(folder) / "tokenizer.json")) for folder in (out, base))
    assert saved.encode(text).ids == own.encode(text).ids
    spec = json.loads((out / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in spec["model"].get("merges", []))
    pre_tokenizer = spec["pre_tokenizer"] or {}
    assert pre_tokenizer.get("type") != "Metaspace" or pre_tokenizer["add_prefix_space"] is True
