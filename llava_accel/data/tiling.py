"""Tiles: how an image is cut for the vision tower, and which image tokens result, from its width and height alone.

LLaVA-1.5 sees an image as one square. LLaVA-NeXT and OneVision also scale it onto the canvas that fits it best and cut
that into tiles of the tower's size (`llava/mm_utils.py`, and "spatial_unpad" in `llava/model/llava_arch.py` of LLaVA-NeXT).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

_SHRINKS_ABOVE = 1.1


class ImageLayout(NamedTuple):
    """How the tower's patches of an image become its tokens: those of the whole image, then those of the grid of tiles.

    A map of patches is laid over the grid; what lies outside `window` shows the canvas and is dropped, the rest is
    shrunk to `size` where the image has too many tokens, and a newline ends each row.
    """

    rows: int = 0
    """Rows and columns of tiles; 0 for an image that is not cut."""
    columns: int = 0
    window: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, height and width of the image in the map, in patches."""
    size: tuple[int, int] = (0, 0)
    """Height and width of the map after it was shrunk."""

    @property
    def num_tiles(self) -> int:
        """Tiles that the tower sees, the whole image as one square included."""
        return 1 + self.rows * self.columns


WHOLE = ImageLayout()
"""The layout of an image that is one square."""


class ImageView(NamedTuple):
    """An image as a record shows it. The same file alone and beside others may be seen in two ways."""

    file: str
    """Its address: see `image_parts.py`."""
    num_tokens: int
    layout: ImageLayout = WHOLE

    @property
    def has_vanished(self) -> bool:
        """Whether it is a strip so thin that its tiles leave no token."""
        return self.layout.num_tiles > 1 and 0 in self.layout.size


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a base cuts images, and how many tokens they have.

    Args:
        side: Pixels of a tile's side.
        tile_tokens: Tokens of a tile; for a base that cuts images a square number of patches.
        canvases: Width and height in pixels of each, in the order that decides ties; none: images are not cut.
        has_newline: Whether a learned newline ends a row of tokens, and an image that is one square.
        most_tiles: A map of more patches than about so many tiles have is shrunk; 0 = never ("anyres_max_9": 9).
    """

    side: int
    tile_tokens: int
    canvases: tuple[tuple[int, int], ...] = ()
    has_newline: bool = False
    most_tiles: int = 0

    def views(self, files: Sequence[str], size: Callable[[str], tuple[int, int]]) -> tuple[ImageView, ...]:
        """How a record shows its images: cut into tiles where it has one, each as one square where it has more.

        Args:
            size: Width and height of a file.
        """
        is_cut = bool(self.canvases) and len(files) == 1
        layouts = [self.layout(*size(file)) if is_cut else WHOLE for file in files]
        return tuple(ImageView(file, self.num_tokens(each), each) for file, each in zip(files, layouts, strict=True))

    def num_tokens(self, layout: ImageLayout) -> int:
        """Image tokens of an image."""
        height, width = layout.size
        rows = height if layout.rows else 1
        return self.tile_tokens + height * width + rows * self.has_newline

    def layout(self, width: int, height: int) -> ImageLayout:
        """The layout of an image of this size in pixels that is cut into tiles."""
        canvas = best_canvas(width, height, self.canvases)
        columns, rows = (each // self.side for each in canvas)
        side = math.isqrt(self.tile_tokens)
        window = _window(width, height, columns * side, rows * side)
        size = window[2:]
        times = math.sqrt(size[0] * size[1] / (self.most_tiles * side**2)) if self.most_tiles else 0.0
        if times > _SHRINKS_ABOVE:
            size = int(size[0] // times), int(size[1] // times)
        return ImageLayout(rows, columns, window, size)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """The whole image squeezed into a square, then the tiles row by row. Cut from the middle of a black canvas that the
        image fills as far as its shape allows."""
        canvas = Image.new("RGB", best_canvas(*image.size, self.canvases))
        scaled = image.resize(_inside(*image.size, *canvas.size))
        canvas.paste(scaled, ((canvas.width - scaled.width) // 2, (canvas.height - scaled.height) // 2))
        tiles = [
            canvas.crop((left, top, left + self.side, top + self.side))
            for top in range(0, canvas.height, self.side)
            for left in range(0, canvas.width, self.side)
        ]
        return [image.resize((self.side, self.side)), *tiles]


@functools.lru_cache(maxsize=1 << 16)  # many photos have one of few sizes
def best_canvas(width: int, height: int, canvases: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most of an image's pixels; of equals the one that wastes least, then the first."""

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - canvas[0] * canvas[1]

    return max(canvases, key=rank)


def _inside(width: int, height: int, most_wide: int, most_high: int) -> tuple[int, int]:
    """Width and height of an image scaled into a canvas."""
    across, down = most_wide / width, most_high / height
    if across < down:
        return most_wide, min(math.ceil(height * across), most_high)
    return min(math.ceil(width * down), most_wide), most_high


def _window(width: int, height: int, map_width: int, map_height: int) -> tuple[int, int, int, int]:
    """The part of a map that shows the image; an odd row or column of canvas stays in it. It can have no row at all."""
    if width / height > map_width / map_height:
        above = (map_height - int(height * (map_width / width))) // 2
        return above, 0, map_height - 2 * above, map_width
    before = (map_width - int(width * (map_height / height))) // 2
    return 0, before, map_height, map_width - 2 * before
