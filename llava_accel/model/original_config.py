"""config.json as LLaVA's own code writes it, and the vision tower that it names."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig

from llava_accel.model.bases import Base
from llava_accel.model.files import read_json
from llava_accel.model.objective import Objective
from llava_accel.model.processing import load_image_processor
from llava_accel.recipe import Recipe

TOWER_FOLDER = "vision_tower"
_CLIP_L_336 = "openai/clip-vit-large-patch14-336"
_CLIP_L_336_SIZES = (1024, 24, 14, 336)
_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
_TEXT_KEYS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "sliding_window", "tie_word_embeddings",
    "vocab_size",
)  # fmt: skip
_ASPECTS = {"pad": "pad", "crop": "square"}  # LLaVA's "square" is CLIP's own resize and crop


def original_config(base: Base, origin: Base | None, recipe: Recipe, tower: str) -> dict[str, Any]:
    """The config for a model of LLaVA's own code.

    Args:
        base: What the model is.
        origin: What it was trained on, whose own config.json is kept where it is of that kind.
        recipe: How it was trained.
        tower: Value of mm_vision_tower.

    Raises:
        ValueError: LLaVA's own code has no such model.
    """
    if origin and origin.layout == "original":
        config = read_json(origin.folder / "config.json")
    else:
        config = _from_transformers(base)
    if recipe.data.image_aspect not in _ASPECTS:
        raise ValueError(
            f"data.image_aspect = {recipe.data.image_aspect!r}: LLaVA's own code pads or crops a picture and does not "
            "stretch it. Use --to merged or --to peft"
        )
    return config | {
        "mm_vision_tower": tower,
        "image_aspect_ratio": _ASPECTS[recipe.data.image_aspect],
        "tokenizer_model_max_length": recipe.data.max_length,
        "tune_mm_mlp_adapter": recipe.model.train == "projector",
        "freeze_mm_mlp_adapter": not recipe.model.train_projector,
    }


def place_tower(
    folder: Path, objective: Objective, base: Base, origin: Base | None, recipe: Recipe, is_whole: bool
) -> str:
    """Value of mm_vision_tower, and the tower itself in `folder` where no name leads to it.

    LLaVA's own code always takes the tower from the place that mm_vision_tower names, never from the checkpoint.

    Args:
        is_whole: The export holds the whole model, so it must not point beside the base that it came from.

    Raises:
        ValueError: the tower is no CLIP.
    """
    vision = base.vision
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(
            f"LLaVA's own code has no {vision.model_type!r} tower, only CLIP. Use --to merged or --to peft"
        )
    named = recipe.model.vision_tower
    if not named and origin and origin.layout == "original":
        named = str(read_json(origin.folder / "config.json").get("mm_vision_tower", ""))
    sizes = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size)
    if not named and sizes == _CLIP_L_336_SIZES:
        named = _CLIP_L_336
    is_local = Path(named).expanduser().is_dir() or bool(origin and (origin.folder.parent / named).is_dir())
    if named and not recipe.model.train_vision and not (is_whole and is_local):
        return named
    place = folder / TOWER_FOLDER
    place.mkdir()
    state = objective.llava.model.vision_tower.state_dict()
    tensors = {f"vision_model.{name}": tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = vision.__class__.from_dict(vision.to_dict())
    config.name_or_path, config.architectures = "", ["CLIPVisionModel"]
    config.save_pretrained(place)
    load_image_processor(base.tower or base.folder, vision, "crop").save_pretrained(place)
    return TOWER_FOLDER


def _from_transformers(base: Base) -> dict[str, Any]:
    text, config = base.text, base.config
    if text.model_type not in _CLASSES:
        raise ValueError(
            f"LLaVA's own code has no {text.model_type!r} language model, only Llama and Mistral. Use --to merged"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ValueError("LLaVA's own projector (mlp2x_gelu) has GELU and biases, and this one not. Use --to merged")
    known = text.to_dict()
    rope = dict(known.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    model_type, architecture = _CLASSES[text.model_type]
    return {
        **{key: known[key] for key in _TEXT_KEYS if key in known},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "use_cache": True,
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": str(text.dtype or torch.float16).removeprefix("torch."),
        "mm_hidden_size": base.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }
