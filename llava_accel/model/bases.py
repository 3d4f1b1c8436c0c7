"""The base that a recipe's [model] names: layout, folders, one `LlavaConfig` for all, and which bases are refused.

Only configs are read here, so what cannot be trained is refused before any weight is touched.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from llava_accel.exceptions import UserError
from llava_accel.model.files import first_line, read_json, resolve_folder
from llava_accel.model.limits import blamed, check_numbers, check_sizes
from llava_accel.recipe import ModelTable

Layout = Literal["hub", "original", "parts"]

_LANGUAGE_MODELS = {"llava_llama": "llama", "llava": "llama", "llama": "llama", "llava_mistral": "mistral"}
_NOT_THE_LANGUAGE_MODELS = ("mm_", "tune_", "freeze_", "unfreeze_", "image_", "tokenizer_", "use_mm_", "_")
_NOT_KEPT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "use_cache"}
_UNREADABLE = (StrictDataclassError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)
"""What the configs of transformers raise for values that they cannot hold; it differs between models."""
_UNBUILDABLE = (*_UNREADABLE, AssertionError, RuntimeError, ImportError)
_TOWERS = (CLIPVisionConfig, SiglipVisionConfig)
TowerConfig = CLIPVisionConfig | SiglipVisionConfig


@dataclass(frozen=True, slots=True)
class Base:
    """A model as its configs describe it.

    `tower` is the folder that the vision tower's weights come from; None if they are in `folder`.
    `tower_overridden` says that it replaces a tower inside the checkpoint. `text` and `vision` are the halves of
    `config`; `text.vocab_size` is the number of rows on disk.
    """

    layout: Layout
    folder: Path
    tower: Path | None
    tower_overridden: bool
    config: LlavaConfig

    @property
    def text(self) -> Any:
        assert isinstance(self.config.text_config, PreTrainedConfig)
        return self.config.text_config

    @property
    def vision(self) -> TowerConfig:
        assert isinstance(self.config.vision_config, _TOWERS)
        return self.config.vision_config


def find_base(model: ModelTable, weights: bool = True) -> Base:
    """Find the folders and read the configs; from the hub if they are not here.

    Args:
        weights: False downloads configs and tokenizers only.

    Raises:
        UserError: something is missing, or `LlavaForConditionalGeneration` cannot hold the model.
    """
    base = _find(model, weights) if model.base else _parts(model, weights)
    check_sizes(base.config, base.folder / "config.json", (base.tower or base.folder) / "config.json")
    return base


def empty_model(base: Base, config: LlavaConfig | None = None) -> LlavaForConditionalGeneration:
    """The base without weights, on the meta device: names and shapes only; UserError if its config describes no model.

    Args:
        config: In place of the base's own, where that has grown.
    """
    try:
        with torch.device("meta"):
            return LlavaForConditionalGeneration(config or base.config)
    except _UNBUILDABLE as error:
        raise _unusable(error, *(folder / "config.json" for folder in (base.folder, base.tower) if folder)) from error


def _find(model: ModelTable, weights: bool) -> Base:
    folder = resolve_folder(model.base, "model.base", weights=weights)
    raw = _model_config(folder)
    if "mm_vision_tower" in raw or raw.get("model_type") in ("llava_llama", "llava_mistral"):
        return _original(model, folder, raw, weights)
    if raw.get("model_type") != "llava":
        raise _not_a_llava(folder, raw)
    config = _read_config(folder, raw, lambda: LlavaConfig.from_dict(raw))
    if not isinstance(config.vision_config, _TOWERS):
        raise UserError(f"{folder}/config.json: the vision tower is neither CLIP nor SigLIP. Use a LLaVA-1.5 model")
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"{folder}/config.json: vision_feature_layer {config.vision_feature_layer} joins several layers, and "
            "one layer is used here. Use a model with one, such as LLaVA-1.5 (-2)"
        )
    tower = _tower_folder(model.vision_tower, None, weights) if model.vision_tower else None
    if tower:
        config.vision_config = read_tower_config(tower)
    return Base("hub", folder, tower, bool(tower), config)


def read_tower_config(folder: Path) -> TowerConfig:
    """The vision half of a CLIP or SigLIP folder's config; UserError if it is another kind of model."""
    config = _auto_config(folder)
    config = getattr(config, "vision_config", config)
    if not isinstance(config, _TOWERS):
        raise UserError(
            f"{folder} holds a {config.model_type!r}, which cannot be used as a vision tower here. "
            "Name a CLIP or SigLIP model in model.vision_tower"
        )
    return config


def generation_settings(base: Base) -> dict[str, Any]:
    """What generation_config.json says; empty where there is none."""
    path = base.folder / "generation_config.json"
    return read_json(path) if os.path.lexists(path) else {}


def num_class_tokens(vision: TowerConfig) -> int:
    """Positions before the patches in a tower's output: CLIP's class token, none in SigLIP."""
    return 1 if isinstance(vision, CLIPVisionConfig) else 0


def num_patches(vision: TowerConfig) -> int:
    """Patches of one image."""
    side, patch = vision.image_size, vision.patch_size
    assert isinstance(side, int) and isinstance(patch, int), "CLIP's and SigLIP's images are squares"
    return (side // patch) ** 2


def _original(model: ModelTable, folder: Path, raw: dict[str, Any], weights: bool) -> Base:
    _check_original(folder, raw)
    kind = _LANGUAGE_MODELS.get(str(raw.get("model_type")))
    if kind is None:
        raise UserError(
            f"{folder}/config.json: model_type {raw.get('model_type')!r} is not a LLaVA on Llama or "
            "Mistral. Use a LLaVA-1.5 model"
        )
    kept = {k: v for k, v in raw.items() if k not in _NOT_KEPT and not k.startswith(_NOT_THE_LANGUAGE_MODELS)}
    if not kept.get("rope_scaling"):
        kept.pop("rope_scaling", None)
    text = _read_config(folder, raw, lambda: AutoConfig.for_model(kind, **kept))
    if model.vision_tower:
        tower = _tower_folder(model.vision_tower, None, weights)
    else:
        name = raw.get("mm_vision_tower")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{folder}/config.json does not name an mm_vision_tower. Set model.vision_tower")
        tower = _tower_folder(name, folder, weights)
    layer = raw.get("mm_vision_select_layer")
    config = _llava_config(
        text,
        read_tower_config(tower),
        layer=-2 if layer is None else layer,
        keep_class_token=raw.get("mm_vision_select_feature") == "cls_patch",
    )
    return Base("original", folder, tower, bool(model.vision_tower), config)


def _parts(model: ModelTable, weights: bool) -> Base:
    folder = resolve_folder(model.language_model, "model.language_model", weights=weights)
    raw = _model_config(folder)
    if "mm_vision_tower" in raw or "vision_config" in raw:
        raise UserError(
            f"model.language_model: {folder} holds a model with a vision tower of its own ({raw.get('model_type')}). "
            "Name it in model.base"
        )
    tower = _tower_folder(model.vision_tower, None, weights)
    return Base("parts", folder, tower, False, _llava_config(_auto_config(folder), read_tower_config(tower)))


def _llava_config(text: Any, vision: TowerConfig, layer: int = -2, keep_class_token: bool = False) -> LlavaConfig:
    drop_class_token = num_class_tokens(vision) > 0 and not keep_class_token
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default" if drop_class_token else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _tower_folder(name: str, beside: Path | None, weights: bool) -> Path:
    key = f"mm_vision_tower of {beside / 'config.json'} (model.vision_tower overrides it)" if beside else ""
    return resolve_folder(name, key or "model.vision_tower", beside, weights)


def _model_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} is an adapter: name it in model.adapter, and the model it was trained on in model.base"
        )
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw:
        raise UserError(
            f"{folder}/config.json: the model is stored quantised, so no adapter could be merged into it. Name the "
            "16-bit model, and set model.quantization.bits to quantise it while it loads"
        )
    return raw


def _auto_config(folder: Path) -> Any:
    raw = read_json(folder / "config.json")
    if str(raw.get("model_type")) not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}/config.json: transformers has no model_type {raw.get('model_type')!r} of its own, and code that "
            "comes with a model is never run. Name a model of a known type"
        )
    return _read_config(folder, raw, lambda: CONFIG_MAPPING[str(raw["model_type"])].from_dict(raw))


def _read_config(folder: Path, raw: dict[str, Any], make: Callable[[], Any]) -> Any:
    file = folder / "config.json"
    check_numbers(raw, file)
    try:
        return make()
    except _UNREADABLE as error:
        raise _unusable(error, file) from error


def _unusable(error: Exception, *files: Path) -> UserError:
    """What a library could not make of configs, with the file and the keys that its error names."""
    said = first_line(error)
    said = said if " " in said else f"{type(error).__name__}: {said}"
    named = {file: keys for file in files if (keys := blamed(read_json(file), said))}
    file, keys = next(iter(named.items()), (files[0], ""))
    problem = f"{file} cannot be used ({keys}{': ' if keys else ''}{said})"
    return UserError(f"{problem}. Copy the config.json that belongs to the weights")


def _check_original(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse the variants of the original that the model class of transformers has no place for."""
    place = f"{folder}/config.json"
    kind = raw.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise UserError(
            f"{place}: mm_projector_type is {kind!r}, and LlavaForConditionalGeneration can only hold two layers with "
            "GELU (mlp2x_gelu). Use a LLaVA-1.5 model, or train a new projector: model.language_model with "
            "model.vision_tower"
        )
    tiles = raw.get("mm_patch_merge_type", "flat")
    if tiles != "flat" or "anyres" in str(raw.get("image_aspect_ratio", "")):
        raise UserError(
            f"{place}: this model cuts an image into tiles (mm_patch_merge_type {tiles!r}, image_aspect_ratio "
            f"{raw.get('image_aspect_ratio')!r}), as LLaVA-1.6 does, and here an image is one square. Use a LLaVA-1.5 model"
        )
    if raw.get("mm_vision_select_feature") not in (None, "patch", "cls_patch"):
        raise UserError(
            f"{place}: mm_vision_select_feature is {raw['mm_vision_select_feature']!r}, and LLaVA knows 'patch' and "
            "'cls_patch'. Use a LLaVA-1.5 model"
        )
    if raw.get("mm_use_im_start_end"):
        raise UserError(
            f"{place}: mm_use_im_start_end puts tokens around images, which no template does. Use LLaVA-1.5"
        )
    if raw.get("mm_resampler_type"):
        raise UserError(f"{place}: mm_resampler_type {raw['mm_resampler_type']!r} is not in LLaVA-1.5. Use LLaVA-1.5")


def _not_a_llava(folder: Path, raw: dict[str, Any]) -> UserError:
    kind = raw.get("model_type")
    if kind is None:
        problem = "does not name a model_type, so it is not a LLaVA's. Copy the model's own config.json"
    elif isinstance(kind, str) and kind.startswith("llava"):
        problem = f"says {kind!r}, and only LLaVA-1.5 is trained here. Name one (model_type llava or llava_llama)"
    else:
        problem = (
            f"says {kind!r}, which is not a LLaVA. To build one on it, name it in model.language_model, and a CLIP or "
            "SigLIP model in model.vision_tower"
        )
    return UserError(f"model.base: {folder}/config.json {problem}")
