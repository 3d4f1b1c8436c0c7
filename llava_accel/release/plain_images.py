"""Images as transformers' own model of a family takes them, where that model sees them as this package does."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_accel.data.tiling import ImageView, Tiling, best_canvas
from llava_accel.families.registry import FAMILIES


def plain_images(
    views: Sequence[ImageView], pixels: Mapping[ImageView, Tensor], config: Any
) -> dict[str, Tensor] | None:
    """The arguments of the forward pass of transformers' model for the images of an example.

    Args:
        config: The model's config.

    Returns:
        None where that model would see them differently: it sees most images that were cut into tiles alike, but few that
        are seen as whole squares.
    """
    if not views:
        return {}
    family, tiles = FAMILIES[config.model_type], {"pixel_values": torch.cat([pixels[view] for view in views])}
    if not family.is_tiled:
        return tiles
    tiling = family.tiling(config, family.image_aspect(config))
    if len(views) > 1 and family.counts_images:
        # It looks at no size where a record has several images.
        sizes = [(tiling.side, tiling.side)] * len(views)
        return {**tiles, "image_sizes": torch.tensor(sizes), "batch_num_images": torch.tensor([len(views)])}
    size = _size(views[0], tiling) if len(views) == 1 and tiling.canvases else None
    return None if size is None else {**tiles, "image_sizes": torch.tensor([size[::-1]])}


def _size(view: ImageView, tiling: Tiling) -> tuple[int, int] | None:
    """Width and height from which transformers' model works out the view's layout, in whichever order it reads its canvases:
    that of an adapter's base may not be ours. None where there is none."""
    turned = tuple((height, width) for width, height in tiling.canvases)
    for size in _sizes(view, tiling):
        canvas = best_canvas(*size, tiling.canvases)
        if (
            tiling.layout(*size) == view.layout
            and best_canvas(*size, turned) == canvas
            and _is_clear(size, canvas, tiling)
        ):
            return size
    return None


def _sizes(view: ImageView, tiling: Tiling) -> Iterator[tuple[int, int]]:
    """Sizes that fill the view's canvas on one side, and on the other about its window."""
    width, height = view.layout.columns * tiling.side, view.layout.rows * tiling.side
    patch = tiling.side / math.isqrt(tiling.tile_tokens)
    for less in (0.5, -0.5):  # half a patch away from where rounding decides; a window may have an odd row more
        yield width, max(1, min(height, int((view.layout.window[2] + less) * patch)))
        yield max(1, min(width, int((view.layout.window[3] + less) * patch))), height


def _is_clear(size: tuple[int, int], canvas: tuple[int, int], tiling: Tiling) -> bool:
    """Whether transformers, which rounds to seven places before it cuts off, keeps as many rows and columns."""
    side, (width, height) = math.isqrt(tiling.tile_tokens), size
    map_width, map_height = (pixels // tiling.side * side for pixels in canvas)
    is_wide = width / height > map_width / map_height
    kept = height * (map_width / width) if is_wide else width * (map_height / height)
    return int(kept) == int(round(kept, 7))
