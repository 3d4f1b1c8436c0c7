"""Models that cannot be trained here, told from their configs, each with the reason."""

from pathlib import Path
from typing import Any

from transformers import LlavaConfig


def check_original(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse the variants of the original that the model class of transformers has no place for.

    Args:
        raw: The folder's config.json.

    Raises:
        ValueError: with the config's key, its value and what to use.
    """
    place = f"{folder}/config.json"
    kind = raw.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ValueError(
            f"{place}: mm_projector_type {kind!r}, and LlavaForConditionalGeneration holds two layers with GELU "
            "(mlp2x_gelu) and nothing else. Use a LLaVA-1.5 model, or train a new projector: model.language_model with "
            "model.vision_tower"
        )
    tiles = raw.get("mm_patch_merge_type", "flat")
    if tiles != "flat" or "anyres" in str(raw.get("image_aspect_ratio", "")):
        raise ValueError(
            f"{place}: a picture is cut into tiles there (mm_patch_merge_type {tiles!r}, image_aspect_ratio "
            f"{raw.get('image_aspect_ratio')!r}), as in LLaVA-1.6, and here it is one square. Use a LLaVA-1.5 model"
        )
    if raw.get("mm_use_im_start_end"):
        raise ValueError(
            f"{place}: mm_use_im_start_end puts tokens around pictures, and no template here does. Use LLaVA-1.5"
        )
    if raw.get("mm_resampler_type"):
        raise ValueError(f"{place}: mm_resampler_type {raw['mm_resampler_type']!r} has no place in a LLaVA-1.5 model")


def check_hub(folder: Path, config: LlavaConfig) -> None:
    """Refuse LLaVAs of the hub that join several layers of the tower.

    Raises:
        ValueError: with the layers.
    """
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"{folder}/config.json: vision_feature_layer {config.vision_feature_layer} joins several layers, and "
            "here one layer is used. Use a model with one, such as LLaVA-1.5 (-2)"
        )


def no_llava(folder: Path, raw: dict[str, Any]) -> str:
    """The message for a base that is no LLaVA of this kind."""
    kind = raw.get("model_type")
    if kind is None:
        return f"model.base: {folder}/config.json names no model_type, so it is no LLaVA's. Copy the model's own"
    if isinstance(kind, str) and kind.startswith("llava"):
        return f"model.base: {folder} is a {kind!r}, and here LLaVA-1.5 is trained (model_type llava or llava_llama)"
    return (
        f"model.base: {folder}/config.json says {kind!r}, which is no LLaVA. To build one on it, name it in "
        "model.language_model, and a CLIP or SigLIP model in model.vision_tower"
    )
