"""LLaVA-OneVision: an image is cut into up to 36 tiles, and its map of tokens is shrunk to about that of nine."""

import re
from typing import Any

from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from llava_accel.families.family import Family
from llava_accel.families.next import NEXT

_ASPECT = r"anyres_max_([1-9]\d{0,2})"


def _most_tiles(config: Any) -> int:
    """The number in `vision_aspect_ratio`, which a LLaVA-OneVision of transformers always has."""
    match = re.fullmatch(_ASPECT, str(config.vision_aspect_ratio))
    if match is None:
        raise ValueError(f"vision_aspect_ratio is {config.vision_aspect_ratio!r}, and must be such as 'anyres_max_9'")
    return int(match[1])


ONEVISION = Family(
    name="llava_onevision",
    title="LLaVA-OneVision",
    config_class=LlavaOnevisionConfig,
    model_class=LlavaOnevisionForConditionalGeneration,
    aspect=_ASPECT,
    template=NEXT.template,
    image_placement="start_if_single",
    grids=tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7)),
    most_tiles=_most_tiles,
    counts_images=True,
    processor=("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor"),
    processor_settings=lambda config: {
        "num_image_tokens": (config.vision_config.image_size // config.vision_config.patch_size) ** 2,
        "vision_aspect_ratio": config.vision_aspect_ratio,
    },
    original_aspect=lambda config: config.vision_aspect_ratio,
)
