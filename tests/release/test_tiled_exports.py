"""What was trained on tiles leaves in every form: plain transformers computes the same, and LLaVA's layout leads back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaNextProcessor

from helpers.exported import CPU, export, prove_here
from helpers.runs import PARITY, recipe, talk, write_records
from helpers.tiled import KIT, copy_original, edit_config, make_hub
from llava_accel.data.tiling import Tiling
from llava_accel.inference.origin import find_trained, load_trained
from llava_accel.model.bases import find_base
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing
from llava_accel.recipe import ModelTable
from llava_accel.release import original_llava
from llava_accel.release.plain_images import plain_images
from llava_accel.train import train

NAMES = ("wide", "trap", "tiny", "huge")


def run_of(folder: Path, base: Path, **model: Any) -> Path:
    records = [talk(n, "What is it?", f"It is {name}.", f"{name}.png") for n, name in enumerate(NAMES)]
    named = {"base": str(base), "vision_tower": "", "adapter": "", "template": "v1", **model}
    data = {"images": str(PARITY / "next" / "images"), "cache_features": False}
    steps = {"max_steps": 2, "per_device_batch_size": 2}
    train(recipe(folder, write_records(folder / "r.json", records), model=named, data=data, train=steps))
    return folder / "run"


@pytest.fixture(scope="module")
def next_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next")
    return run_of(folder, make_hub("llava_next", folder / "hub"))


def weights_of(folder: Path, **named: str) -> tuple[dict[str, torch.Tensor], Tiling]:
    table = ModelTable.model_validate({"base": str(folder), **named})
    processing = load_processing(table, "auto")
    table = recipe(folder, model={"base": str(folder), "vision_tower": "", "adapter": "", **named})
    model = load_model(table, processing, dtype=torch.float32, device=None).model
    return dict(model.state_dict()), processing.tiling


@pytest.mark.slow
def test_a_next_adapter_leaves_as_peft_merged_and_llava(
    next_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    export(monkeypatch, next_run, "peft", tmp_path / "peft", "--compare")
    assert "4 of 4 answers are the same" in capsys.readouterr().out
    merged = export(monkeypatch, next_run, "merged", tmp_path / "merged")
    assert "answers are the same" in capsys.readouterr().out
    config = json.loads((merged / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]]
    assert (
        json.loads((merged / "preprocessor_config.json").read_text())["image_grid_pinpoints"]
        == config["image_grid_pinpoints"]
    )
    original = export(monkeypatch, merged, "llava", tmp_path / "original")
    raw = json.loads((original / "config.json").read_text())
    kit = json.loads((KIT / "next-vicuna" / "config.json").read_text())
    for key in (
        "model_type",
        "mm_patch_merge_type",
        "image_aspect_ratio",
        "image_grid_pinpoints",
        "mm_vision_select_layer",
    ):
        assert raw[key] == kit[key], key
    (back, tiling), (before, of_merged) = weights_of(original), weights_of(merged)
    assert tiling == of_merged and back.keys() == before.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, before[name][: len(tensor)]), name


@pytest.mark.slow
def test_merged_next_counts_small_images_as_training_does(
    next_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = export(monkeypatch, next_run, "merged", tmp_path / "merged", "--no-compare")
    loaded = load_trained(find_trained(str(merged)), dtype=torch.float32, device=CPU)
    processing, model = loaded.processing, loaded.objective.llava
    processor: Any = LlavaNextProcessor.from_pretrained(merged)
    from PIL import Image

    for name in ("tiny", "gray", "wide", "line"):
        image = Image.open(PARITY / "next" / "images" / f"{name}.png").convert("RGB")
        inputs = processor(images=image, text="<image>\nWhat?", return_tensors="pt")
        layout = processing.tiling.layout(*image.size)
        assert int((inputs["input_ids"] == processing.image_token_id).sum()) == processing.tiling.num_tokens(layout), (
            name
        )
        with torch.no_grad():
            model(**inputs)  # its own count of features agrees, or it would raise


@pytest.mark.slow
def test_a_onevision_in_full_leads_through_every_form_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_original("llava_onevision", tmp_path)
    run = run_of(tmp_path, base, train="full", template="qwen_1_5", train_vision=True)
    before = load_file(run / "export" / "model.safetensors")
    assert not torch.equal(before["image_newline"], load_file(base / "model.safetensors")["model.image_newline"])
    with pytest.raises(SystemExit):
        export(monkeypatch, run, "llava", tmp_path / "refused")
    assert "one SigLIP tower" in capsys.readouterr().err
    # The sizes of the tiny tower in place of those of the one that LLaVA's own code has.
    monkeypatch.setattr(original_llava, "_SIGLIP", str(KIT / "siglip"))
    monkeypatch.setattr(original_llava, "_SIGLIP_SIZES", (32, 2, 7, 37))
    original = export(monkeypatch, run, "llava", tmp_path / "original")
    raw = json.loads((original / "config.json").read_text())
    assert (raw["model_type"], raw["image_aspect_ratio"]) == ("llava_qwen", "anyres_max_9")
    assert raw["unfreeze_mm_vision_tower"] is True and len(raw["image_grid_pinpoints"]) == 36
    (back, tiling), (trained, of_run) = weights_of(original), weights_of(run / "export")
    assert tiling == of_run and back.keys() == trained.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, trained[name][: len(tensor)]), name


def test_an_export_has_names_that_the_originals_own_code_knows(tmp_path: Path) -> None:
    base = edit_config(copy_original("llava_next", tmp_path), model_type="share4v", architectures=["Share4VLlama"])
    table = recipe(tmp_path, model={"base": str(base), "vision_tower": "", "adapter": ""})
    found = find_base(table.model)
    config = original_llava.original_config(original_llava.Source(found, found, table, True), "tower")
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert json.loads((base / "config.json").read_text()).keys() <= config.keys()


def test_which_images_transformers_sees_alike() -> None:
    processing = load_processing(ModelTable(base=str(KIT / "next-vicuna")), "auto")
    from llava_accel.model.build import final_config

    config: Any = final_config(processing)

    def seen(*sizes: tuple[int, int], of: Any = config, tiling: Tiling = processing.tiling) -> Any:
        views = tiling.views([str(n) for n in range(len(sizes))], lambda name: sizes[int(name)])
        return plain_images(views, {v: torch.zeros(v.layout.num_tiles, 3, 28, 28) for v in views}, of)

    for size in ((93, 31), (188, 47), (400, 260), (150, 330)):
        assert len(seen(size)["pixel_values"]) == processing.tiling.layout(*size).num_tiles
    assert seen((9, 5)) is None and seen((93, 31), (400, 260)) is None
    assert seen() == {}
    onevision = load_processing(ModelTable(base=str(KIT / "onevision-qwen")), "auto")
    several = seen((93, 31), (400, 260), of=final_config(onevision), tiling=onevision.tiling)
    assert several["batch_num_images"].tolist() == [2]
    whole = load_processing(ModelTable(base=str(KIT / "next-vicuna")), "pad")
    assert seen((93, 31), of=final_config(whole), tiling=whole.tiling) is None
