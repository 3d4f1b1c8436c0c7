"""Tiny bases that cut images into tiles: the originals of tests/parity/next, and the same models in the hub's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from helpers.runs import PARITY
from llava_accel.model.processing import load_processing
from llava_accel.recipe import ModelTable

KIT = PARITY / "next" / "bases"
ORIGINALS = {"llava_next": ("next-vicuna", "clip"), "llava_onevision": ("onevision-qwen", "siglip")}
"""By the family's name: an original's folder, and that of its tower, which it names."""
_CLASSES = {
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, LlamaConfig, CLIPVisionConfig),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig),
}


def copy_original(family: str, folder: Path) -> Path:
    """A copy of an original that tests may spoil, with its tower beside it; returns the base's folder."""
    for name in ORIGINALS[family]:
        shutil.copytree(KIT / name, folder / name)
    return folder / ORIGINALS[family][0]


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of a config.json; returns its folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def make_hub(family: str, folder: Path) -> Path:
    """The model of an original as the hub has its like, converted by hand: its pinpoints as they are in the original."""
    name, tower = (KIT / each for each in ORIGINALS[family])
    raw, vision = (json.loads((place / "config.json").read_text()) for place in (name, tower))
    config_class, model_class, text_class, vision_class = _CLASSES[family]
    is_clip = vision_class is CLIPVisionConfig
    ours = {key: value for key, value in vision.items() if key not in ("architectures", "model_type", "torch_dtype")}
    ours |= {} if is_clip else {"num_hidden_layers": vision["num_hidden_layers"] - 1, "vision_use_head": False}
    kept = {key: value for key, value in raw.items() if key in text_class().to_dict() and key != "model_type"}
    rows = raw["vocab_size"] + 64
    text = text_class(**kept | {"vocab_size": rows, "dtype": "float32", "rope_theta": raw["rope_theta"]})
    folder.mkdir(parents=True)
    tokenizer = load_processing(ModelTable(base=str(name)), "auto").processor.tokenizer
    config = config_class(
        vision_config=vision_class(**ours),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=raw["image_grid_pinpoints"],
    )
    model = model_class(config).eval()
    state = {_name(key): tensor for key, tensor in load_file(name / "model.safetensors").items()}
    prefix = "model.vision_tower."
    tower_state = load_file(tower / "model.safetensors")
    state |= {prefix + key.removeprefix("vision_model."): tensor for key, tensor in tower_state.items()}
    for key, place in model.state_dict().items():
        with torch.no_grad():  # rows that were added stay as they are
            place[: len(state[key])].copy_(state[key])
    model.save_pretrained(folder)
    side = vision["image_size"]
    square = {"height": side, "width": side}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(tower, size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        num_additional_image_tokens=int(is_clip),
        vision_feature_select_strategy="default" if is_clip else "full",
    ).save_pretrained(folder)
    return folder


def _name(key: str) -> str:
    for old, new in (("mm_projector.0", "linear_1"), ("mm_projector.2", "linear_2")):
        key = key.replace(f"model.{old}", f"model.multi_modal_projector.{new}")
    is_language = key.startswith("model.") and not key.startswith(("model.multi_modal", "model.image_newline"))
    return key.replace("model.", "model.language_model.", 1) if is_language else key
