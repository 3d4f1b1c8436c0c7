"""What distinguishes the families of LLaVA; each has a file beside this one, and `registry.py` lists them.

**Canvases.** The original reads its `image_grid_pinpoints` as (width, height), transformers as (height, width). Released
models of the hub hold the original's list as it is, so transformers cuts small images differently than their training did.
Here they count as the original does: a hub config's list is taken as (height, width), swapped pair by pair, except where it
is the released list of its family and does not say `image_grid_pinpoints_order = "height_width"`. Every config that this
package writes says so, and holds the swapped list, with which transformers counts as the original does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import CLIPVisionConfig, PreTrainedModel, SiglipVisionConfig

from llava_accel.data.tiling import Tiling
from llava_accel.exceptions import UserError

TowerConfig = CLIPVisionConfig | SiglipVisionConfig
Canvases = tuple[tuple[int, int], ...]

WHOLE_SQUARES = ("pad", "crop", "stretch")
"""Values of `data.image_aspect` with which an image is not cut, whether its base is tiled or not."""
_ORDER = "image_grid_pinpoints_order"
_HEIGHT_WIDTH = "height_width"
_MOST_TILES_A_SIDE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of LLaVA models.

    Args:
        name: transformers' model_type, and the value of `model.family`.
        title: Its name in messages.
        aspect: Regular expression for the whole of `image_aspect_ratio` in the original's config of such a model.
        template: The conversation template of released models, under LLaVA's name, from a language model's config.
        image_placement: `data.image_placement` of its own code.
        grids: Columns and rows of the canvases of released models, in the original's order; empty: images are not cut.
        most_tiles: `Tiling.most_tiles`, from a config; ValueError if that makes no sense.
        counts_images: Whether transformers' model is told how many images a record has, and sees several as squares.
        processor: transformers' names of its processor and its image processor.
        processor_settings: Keys that its processor's file has in addition to a LLaVA-1.5's, from a config.
        original_aspect: `image_aspect_ratio` in the original's config, from a config.
    """

    name: str
    title: str
    config_class: type[Any]
    model_class: type[PreTrainedModel]
    aspect: str
    template: Callable[[Any], str]
    image_placement: Literal["start", "start_if_single"] = "start"
    grids: Canvases = ()
    most_tiles: Callable[[Any], int] = lambda config: 0
    counts_images: bool = False
    processor: tuple[str, str] = ("LlavaProcessor", "")
    processor_settings: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    original_aspect: Callable[[Any], str] = lambda config: "pad"

    @property
    def is_tiled(self) -> bool:
        """Whether its models cut images, and have a newline."""
        return bool(self.grids)

    def image_aspect(self, config: Any) -> str:
        """What `data.image_aspect = "auto"` means for a base: "tiles" where it cuts images."""
        if not self.is_tiled:
            return "pad"
        own = getattr(config, "image_aspect_ratio", None)
        return own if own in WHOLE_SQUARES else "tiles"

    def released(self, side: int) -> Canvases:
        """Width and height of the canvases that released models have, for tiles of another side."""
        return tuple((columns * side, rows * side) for columns, rows in self.grids)

    def canvases_of_hub(self, config: Any) -> Canvases:
        """Width and height of the canvases that a config of transformers means."""
        given = config.image_grid_pinpoints
        is_released = given == [list(pair) for pair in self.released(config.vision_config.image_size)]
        if is_released and getattr(config, _ORDER, None) != _HEIGHT_WIDTH:
            return tuple((width, height) for width, height in given)
        return tuple((width, height) for height, width in given)

    def tiling(self, config: Any, aspect: str) -> Tiling:
        """How a base cuts an image into tiles, and how many tokens each gives.

        Args:
            config: If images are cut, one that `put_canvases` has written to.
            aspect: "tiles", or one of `WHOLE_SQUARES`.
        """
        side, tokens = int(config.vision_config.image_size), num_tokens(config)
        if not self.is_tiled:
            return Tiling(side, tokens)
        pairs = config.image_grid_pinpoints if aspect == "tiles" else ()
        return Tiling(side, tokens, tuple((w, h) for h, w in pairs), True, self.most_tiles(config))

    def processor_files(self, config: Any) -> dict[str, dict[str, Any]]:
        """Keys of the JSON files of the family's processor that replace those of a LLaVA-1.5's, by file name."""
        if not self.is_tiled:
            return {}
        name, images = self.processor
        pinpoints = config.image_grid_pinpoints
        return {
            "processor_config.json": {"processor_class": name, **self.processor_settings(config)},
            "preprocessor_config.json": {"image_processor_type": images, "image_grid_pinpoints": pinpoints},
            "tokenizer_config.json": {"processor_class": name},
        }

    def original_keys(self, config: Any, aspect: str) -> dict[str, Any]:
        """Keys on images in the original's config.

        Args:
            aspect: "tiles", or the original's name for the way in which an image becomes a square.
        """
        if not self.is_tiled:
            return {"mm_patch_merge_type": "flat", "image_aspect_ratio": aspect}
        return {
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": self.original_aspect(config) if aspect == "tiles" else aspect,
            "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
        }


def num_class_tokens(vision: TowerConfig) -> int:
    """Positions before the patches in a tower's output: CLIP's class token, none in SigLIP."""
    return 1 if isinstance(vision, CLIPVisionConfig) else 0


def num_tokens(config: Any) -> int:
    """Number of tokens that the tower gives for a square."""
    vision = config.vision_config
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return (vision.image_size // vision.patch_size) ** 2 + num_class_tokens(vision) - dropped


def put_canvases(config: Any, canvases: Canvases) -> None:
    """Write canvases into a config of transformers as (height, width), the order that it reads, and name that order."""
    config.image_grid_pinpoints = [[height, width] for width, height in canvases]
    setattr(config, _ORDER, _HEIGHT_WIDTH)


def check_pinpoints(value: object, side: int, place: str) -> list[list[int]]:
    """`image_grid_pinpoints` of any config; UserError unless it is pairs of numbers of pixels that tiles fill."""
    pairs = [list(pair) if isinstance(pair, list | tuple) else [] for pair in value] if isinstance(value, list) else []
    sizes = [size for pair in pairs for size in pair]
    is_filled = all(type(s) is int and s % side == 0 and 0 < s <= _MOST_TILES_A_SIDE * side for s in sizes)
    if not pairs or not is_filled or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"{place}: image_grid_pinpoints is {str(value)[:60]}, and must list canvases such as [{side}, {2 * side}]: the "
            f"vision tower's squares of {side} px must fill them. Copy the config.json that belongs to the weights"
        )
    return pairs


def check_square(config: Any, place: str) -> None:
    """UserError if the tower's tokens do not form a square, in which tiles are laid out."""
    tokens = num_tokens(config)
    if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise UserError(
            f"{place}: the vision tower gives {tokens} tokens for a square, and a model that cuts images needs its patches "
            "alone: vision_feature_select_strategy must leave the class token out. Copy the config.json that belongs to "
            "the weights"
        )
