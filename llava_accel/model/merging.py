"""From the projected tiles of images to their image tokens, as "spatial_unpad" of LLaVA-NeXT and OneVision makes them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llava_accel.data.tiling import ImageLayout


class TileMerger(nn.Module):
    """Makes image tokens from projected tiles. A module, so that engines gather the newline as they do other weights.

    Args:
        newline: The model's own; it ends a row of tokens, and an image of one square. None: the model has no newline.
    """

    newline: nn.Parameter | None

    def __init__(self, newline: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("newline", newline)

    def forward(
        self, tiles: Float[Tensor, "tiles patches hidden"], layouts: Sequence[ImageLayout]
    ) -> Float[Tensor, "tokens hidden"]:
        """The tokens of all images in turn, from the tiles of all images in turn."""
        if self.newline is None:
            return tiles.flatten(0, 1)
        ends = self.newline[None].to(tiles)
        tokens: list[Tensor] = []
        for layout, image in zip(layouts, tiles.split([layout.num_tiles for layout in layouts]), strict=True):
            tokens += [image[0], _grid(image[1:], layout, ends) if layout.rows else ends]
        # A narrow strip may have no row to end. With `ends` here, the newline has a gradient on every rank all the same.
        return torch.cat([*tokens, ends])[:-1]


def _grid(
    tiles: Float[Tensor, "tiles patches hidden"], layout: ImageLayout, ends: Float[Tensor, "1 hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The part of the map of patches that shows the image, shrunk where it is too large, with a newline after each row."""
    side, hidden = math.isqrt(tiles.shape[1]), tiles.shape[2]
    placed = tiles.view(layout.rows, layout.columns, side, side, hidden).permute(4, 0, 2, 1, 3)
    top, left, height, width = layout.window
    patches = placed.flatten(3, 4).flatten(1, 2)[:, top : top + height, left : left + width]
    if tuple(layout.size) != (height, width):  # a data loader hands tuples over as lists
        patches = F.interpolate(patches[None], layout.size, mode="bilinear")[0]
    rows = patches.permute(1, 2, 0)
    return torch.cat([rows, ends.expand(len(rows), 1, hidden)], dim=1).flatten(0, 1)
