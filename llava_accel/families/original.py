"""The config.json of LLaVA's own code: which family and language model it describes, and which variants are refused."""

import ast
import re
from typing import Any

from llava_accel.exceptions import UserError
from llava_accel.families.family import Family
from llava_accel.families.registry import FAMILIES, TITLES

_LANGUAGE_MODELS = {
    "llava_llama": "llama", "llava": "llama", "llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2",
    "share4v": "llama",
}  # fmt: skip
"""The original's model_type -> transformers' of its language model; "share4v" is ShareGPT4V."""
CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}  # fmt: skip
"""transformers' model_type of a language model -> the original's, and its class."""
ASPECTS = {"pad": "pad", "crop": "square", "tiles": "tiles"}
"""`data.image_aspect` -> `image_aspect_ratio`, where an image becomes one square; "square" is CLIP's resize and crop."""
_NOT_THE_LANGUAGE_MODELS = ("mm_", "tune_", "freeze_", "unfreeze_", "image_", "tokenizer_", "use_mm_", "_")
_NOT_KEPT = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "use_cache"}
_MERGES = {False: "flat", True: "spatial_unpad"}


def is_original(raw: dict[str, Any]) -> bool:
    """Whether a config is that of a model of LLaVA's own code."""
    return "mm_vision_tower" in raw or raw.get("model_type") in ("llava_llama", "llava_mistral", "llava_qwen")


def language_model_type(raw: dict[str, Any], place: str) -> str:
    """transformers' model_type of the language model in such a config; UserError if no model here is made on it.

    "llava" is the model_type of models on Vicuna and of the released LLaVA-OneVision on Qwen2: their class tells them apart.

    Args:
        place: The file, for errors.
    """
    kind, classes = str(raw.get("model_type")), raw.get("architectures")
    if kind == "llava" and isinstance(classes, list):
        kind = next((kind for kind, name in CLASSES.values() if name in classes), kind)
    if kind not in _LANGUAGE_MODELS:
        raise UserError(
            f"{place}: model_type {kind!r} is not a LLaVA on Llama, Mistral or Qwen. Use a {TITLES} that is"
        )
    return _LANGUAGE_MODELS[kind]


def language_model(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of such a config that describe the language model."""
    kept = {k: v for k, v in raw.items() if k not in _NOT_KEPT and not k.startswith(_NOT_THE_LANGUAGE_MODELS)}
    if not kept.get("rope_scaling"):
        kept.pop("rope_scaling", None)
    return kept


def check(raw: dict[str, Any], place: str) -> Family:
    """The family of a model; UserError for the variants that no model class of transformers has a place for.

    Args:
        place: The file, for errors.
    """
    kind = raw.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise UserError(
            f"{place}: mm_projector_type is {kind!r}, and transformers' models of {TITLES} have two layers with GELU there "
            "(mlp2x_gelu). Use one that has them, or train a new projector: name the language model that this one was "
            "made from, such as lmsys/vicuna-7b-v1.5, in model.language_model, and its vision tower in model.vision_tower"
        )
    merge, aspect = raw.get("mm_patch_merge_type") or "flat", str(raw.get("image_aspect_ratio") or "square")
    fitting = [
        each for each in FAMILIES.values() if merge == _MERGES[each.is_tiled] and re.fullmatch(each.aspect, aspect)
    ]
    if not fitting:
        raise UserError(
            f"{place}: mm_patch_merge_type {merge!r} with image_aspect_ratio {aspect!r} is none of the ways in which "
            f"{TITLES} see an image: 'flat' with 'pad' or 'square', or 'spatial_unpad' with 'anyres', 'anyres_max_9', 'pad' "
            "or 'square'. Use such a model"
        )
    if fitting[0].is_tiled:
        check_newline(raw, place)
    if raw.get("mm_vision_select_feature") not in (None, "patch", "cls_patch"):
        raise UserError(
            f"{place}: mm_vision_select_feature is {raw['mm_vision_select_feature']!r}, and LLaVA knows 'patch' and "
            f"'cls_patch'. Use {TITLES}"
        )
    if raw.get("mm_use_im_start_end"):
        raise UserError(f"{place}: mm_use_im_start_end puts tokens around images, which no template does. Use {TITLES}")
    if raw.get("mm_resampler_type"):
        raise UserError(
            f"{place}: mm_resampler_type is {raw['mm_resampler_type']!r}, and no {TITLES} has one: it pools the tower's "
            "output, as LLaVA-NeXT-Video does. Use another model"
        )
    return fitting[0]


NEEDS_NEWLINE = (
    "A model that cuts images ends each row of their tokens with a newline that it has learned (image_newline). Name a "
    "released model, or one that was converted with it"
)


def check_newline(raw: dict[str, Any], place: str) -> None:
    """UserError if the config of a model that cuts images, in whatever layout, says that it has no newline."""
    if raw.get("use_image_newline_parameter", True) is False:
        raise UserError(f"{place}: use_image_newline_parameter is false. {NEEDS_NEWLINE}")


def pinpoints(raw: dict[str, Any], side: int) -> object:
    """`image_grid_pinpoints`, which may be a list, the text of one, or a range such as "(1x1),...,(6x6)" in tiles."""
    value = raw.get("image_grid_pinpoints")
    if not isinstance(value, str):
        return value
    corners = [(int(columns), int(rows)) for columns, rows in re.findall(r"\((\d{1,2})x(\d{1,2})\)", value)]
    if corners:
        (left, top), (right, bottom) = corners[0], corners[-1]
        return [[x * side, y * side] for x in range(left, right + 1) for y in range(top, bottom + 1)]
    try:
        return [list(pair) for pair in ast.literal_eval(value)]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value


def square_aspect(raw: dict[str, Any]) -> str | None:
    """`data.image_aspect` of a model that merges as tiled ones do and sees squares; None if it cuts images."""
    said = raw.get("image_aspect_ratio") or "square"
    return next((ours for ours, theirs in ASPECTS.items() if theirs == said), None)
