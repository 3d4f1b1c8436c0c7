"""The base that a recipe's [model] names: its layout, folders, family and transformers config, or why it is refused.

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
    PreTrainedConfig,
    SiglipVisionConfig,
)

from llava_accel.exceptions import UserError
from llava_accel.families import original
from llava_accel.families.family import (
    Canvases,
    Family,
    TowerConfig,
    check_pinpoints,
    check_square,
    num_class_tokens,
    put_canvases,
)
from llava_accel.families.llava import LLAVA
from llava_accel.families.registry import FAMILIES, OTHERS, TITLES, Config, Llava
from llava_accel.model.files import first_line, read_json, resolve_folder
from llava_accel.model.limits import blamed, check_numbers, check_sizes
from llava_accel.recipe import ModelTable

Layout = Literal["hub", "original", "parts"]

_UNREADABLE = (StrictDataclassError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)
"""Errors that transformers' configs raise for values that they cannot hold; they differ between models."""
_NO_PARTS = (
    "Models of other kinds cannot be taken apart: for a new LLaVA, get the language model that they were made from"
)
_UNBUILDABLE = (*_UNREADABLE, AssertionError, RuntimeError, ImportError)
_TOWERS = (CLIPVisionConfig, SiglipVisionConfig)


@dataclass(frozen=True, slots=True)
class Base:
    """A model as its configs describe it.

    `tower` is the folder that the vision tower's weights come from; None if they are in `folder`.
    `tower_overridden` says that it replaces a tower inside the checkpoint. `text` and `vision` are the halves of
    `config`; `text.vocab_size` is the number of rows on disk. `cuts_tower`: the tower's folder has a layer and a head more
    than the model.
    """

    layout: Layout
    folder: Path
    tower: Path | None
    tower_overridden: bool
    config: Config
    family: Family = LLAVA
    cuts_tower: bool = False

    def image_aspect(self, wanted: str) -> str:
        """What `data.image_aspect` means here: "tiles", or how an image becomes one square."""
        return self.family.image_aspect(self.config) if wanted == "auto" else wanted

    @property
    def text(self) -> Any:
        assert isinstance(self.config.text_config, PreTrainedConfig)
        return self.config.text_config

    @property
    def vision(self) -> TowerConfig:
        assert isinstance(self.config.vision_config, _TOWERS)
        return self.config.vision_config


def find_base(model: ModelTable, weights: bool = True) -> Base:
    """Find a base's folders and read its configs; download what is not on disk.

    Args:
        model: The recipe's [model].
        weights: False downloads configs and tokenizers only.

    Raises:
        UserError: something is missing, or no model class of transformers can hold the model.
    """
    base = _find(model, weights) if model.base else _parts(model, weights)
    file = base.folder / "config.json"
    check_sizes(base.config, file, (base.tower or base.folder) / "config.json")
    if base.family.is_tiled:
        check_square(base.config, str(file))
    return base


def empty_model(base: Base, config: Config | None = None) -> Llava:
    """The base without weights, on the meta device: names and shapes only; UserError if no model fits its config.

    Args:
        config: Used instead of the base's own, for a vocabulary that has grown.
    """
    try:
        with torch.device("meta"):
            model = base.family.model_class(config or base.config)
    except _UNBUILDABLE as error:
        if base.layout == "parts" and isinstance(error, AttributeError):
            raise UserError(
                f"model.language_model: {base.folder} holds a {base.text.model_type!r}, whose modules do not fit into a "
                f"LLaVA ({first_line(error)}). Name a Llama, a Mistral or a Qwen"
            ) from error
        raise _unusable(error, *(folder / "config.json" for folder in (base.folder, base.tower) if folder)) from error
    assert isinstance(model, Llava)
    return model


def _find(model: ModelTable, weights: bool) -> Base:
    folder = resolve_folder(model.base, "model.base", weights=weights)
    raw = _model_config(folder)
    if original.is_original(raw):
        return _original(model, folder, raw, weights)
    family, file = FAMILIES.get(str(raw.get("model_type"))), folder / "config.json"
    if family is None:
        raise _not_a_llava(folder, raw)
    config = _read_config(folder, raw, lambda: family.config_class.from_dict(raw))
    if not isinstance(config.vision_config, _TOWERS):
        raise UserError(f"{file}: the vision tower is neither CLIP nor SigLIP. Use a {family.title} model")
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"{file}: vision_feature_layer {config.vision_feature_layer} joins several layers, and "
            "only one layer can be used here. Use a model with one, such as LLaVA-1.5 or LLaVA-NeXT (-2)"
        )
    tower = _tower_folder(model.vision_tower, None, weights) if model.vision_tower else None
    if tower:
        config.vision_config = read_tower_config(tower)
    if family.is_tiled:
        original.check_newline(raw, str(file))
        _put_pinpoints(config, config.image_grid_pinpoints, family.canvases_of_hub, file)
        _read_config(folder, raw, lambda: family.most_tiles(config))
    return Base("hub", folder, tower, bool(tower), config, family)


def _put_pinpoints(config: Any, value: object, read: Callable[[Any], Canvases], file: Path) -> None:
    """Write the canvases that the pinpoints in `value` mean into a config of transformers; UserError if they mean none."""
    config.image_grid_pinpoints = check_pinpoints(value, config.vision_config.image_size, str(file))
    put_canvases(config, read(config))


def _is_llava(raw: dict[str, Any]) -> bool:
    """Whether a config names a kind of model that is trained here; its values may still be refused."""
    return original.is_original(raw) or str(raw.get("model_type")) in FAMILIES


def _has_tower(raw: dict[str, Any]) -> bool:
    return "mm_vision_tower" in raw or "vision_config" in raw or "vision_tower" in raw


def read_tower_config(folder: Path) -> TowerConfig:
    """The vision half of a CLIP or SigLIP folder's config; UserError if it is another kind of model."""
    config = _auto_config(folder)
    config = config if config.model_type in FAMILIES else getattr(config, "vision_config", config)
    if not isinstance(config, _TOWERS):
        raise UserError(
            f"{folder} holds a {config.model_type!r}, which cannot be used as a vision tower here. "
            "Name a CLIP or SigLIP model in model.vision_tower"
        )
    return config


def generation_settings(base: Base) -> dict[str, Any]:
    """The base's generation_config.json; empty if it has none."""
    path = base.folder / "generation_config.json"
    return read_json(path) if os.path.lexists(path) else {}


def _original(model: ModelTable, folder: Path, raw: dict[str, Any], weights: bool) -> Base:
    file = folder / "config.json"
    family = original.check(raw, str(file))
    kind, kept = original.language_model_type(raw, str(file)), original.language_model(raw)
    text = _read_config(folder, raw, lambda: AutoConfig.for_model(kind, **kept))
    if model.vision_tower:
        tower = _tower_folder(model.vision_tower, None, weights)
    else:
        name = raw.get("mm_vision_tower")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{file} does not name an mm_vision_tower. Set model.vision_tower")
        tower = _tower_folder(name, folder, weights)
    vision, layer = read_tower_config(tower), raw.get("mm_vision_select_layer")
    cuts_tower = isinstance(vision, SiglipVisionConfig)
    if cuts_tower:
        # LLaVA's own code deletes a SigLIP's last layer and its head, and uses the last one left, whatever the config says.
        vision.num_hidden_layers, vision.vision_use_head, layer = vision.num_hidden_layers - 1, False, -1
    keeps_class_token = raw.get("mm_vision_select_feature") == "cls_patch"
    config = _llava_config(family, text, vision, -2 if layer is None else layer, keeps_class_token)
    if family.is_tiled:
        aspect, side = original.square_aspect(raw), config.vision_config.image_size
        pinpoints = original.pinpoints(raw, side)
        if aspect:
            config.image_aspect_ratio = aspect
            pinpoints = pinpoints or [list(canvas) for canvas in family.released(side)]
        else:
            config.vision_aspect_ratio = raw["image_aspect_ratio"]
        _put_pinpoints(config, pinpoints, lambda config: tuple((w, h) for w, h in config.image_grid_pinpoints), file)
    return Base("original", folder, tower, bool(model.vision_tower), config, family, cuts_tower)


def _parts(model: ModelTable, weights: bool) -> Base:
    folder = resolve_folder(model.language_model, "model.language_model", weights=weights)
    raw = _model_config(folder)
    if _has_tower(raw):
        if original.is_original(raw):
            original.check(raw, str(folder / "config.json"))  # model.base would refuse it, so the remedy would be wrong
        kind = raw.get("model_type")
        remedy = "Name it in model.base" if _is_llava(raw) else f"Name a language model alone here. {_NO_PARTS}"
        raise UserError(
            f"model.language_model: {folder} holds a model with a vision tower of its own ({kind!r}). {remedy}"
        )
    tower, family = _tower_folder(model.vision_tower, None, weights), FAMILIES[model.family]
    config = _llava_config(family, _auto_config(folder), read_tower_config(tower))
    if family.is_tiled:
        put_canvases(config, family.released(config.vision_config.image_size))
    return Base("parts", folder, tower, False, config, family)


def _llava_config(
    family: Family, text: Any, vision: TowerConfig, layer: int = -2, keep_class_token: bool = False
) -> Any:
    drop_class_token = num_class_tokens(vision) > 0 and not keep_class_token
    return family.config_class(
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
    return _read_raw(folder)


def _read_raw(folder: Path) -> dict[str, Any]:
    """A config.json; UserError if it, or that of a part in it, says that the weights are stored quantised."""
    raw = read_json(folder / "config.json")
    if any(part.get("quantization_config") for part in (raw, *raw.values()) if isinstance(part, dict)):
        raise UserError(
            f"{folder}/config.json: the model is stored quantised, so no adapter could be merged into it, and no tower "
            "trained. Name the 16-bit model; model.quantization.bits quantises the language model while it loads"
        )
    return raw


def _auto_config(folder: Path) -> Any:
    raw = _read_raw(folder)
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
    """The UserError for configs that a library rejected, with the file and the keys that its error names."""
    said = first_line(error)
    said = said if " " in said else f"{type(error).__name__}: {said}"
    named = {file: keys for file in files if (keys := blamed(read_json(file), said))}
    file, keys = next(iter(named.items()), (files[0], ""))
    problem = f"{file} cannot be used ({keys}{': ' if keys else ''}{said})"
    return UserError(f"{problem}. Copy the config.json that belongs to the weights")


def _not_a_llava(folder: Path, raw: dict[str, Any]) -> UserError:
    kind = raw.get("model_type")
    if kind is None:
        problem = "does not name a model_type, so it is not a LLaVA's. Copy the model's own config.json"
    elif isinstance(kind, str) and (kind.startswith("llava") or kind.lower() in OTHERS):
        known = f" ({OTHERS[kind.lower()]})" if kind.lower() in OTHERS else ""
        names = ", ".join([*FAMILIES, "llava_llama, llava_mistral or llava_qwen"])
        problem = f"says {kind!r}{known}, and only {TITLES} is trained here. Name one (model_type {names})"
    elif _has_tower(raw):
        problem = f"says {kind!r}, another kind of model with a vision tower. Name a {TITLES} here. {_NO_PARTS}"
    else:
        problem = (
            f"says {kind!r}, which is not a LLaVA. To build one on it, name it in model.language_model, and a CLIP or "
            "SigLIP model in model.vision_tower"
        )
    return UserError(f"model.base: {folder}/config.json {problem}")
