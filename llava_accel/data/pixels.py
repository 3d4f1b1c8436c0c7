"""Images -> pixels of tiles: decoded, made square or cut, normalised as the tower wants them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PilBackend

from llava_accel.data.feature_store import FeatureStore, digest
from llava_accel.data.images import Exif, content_of, decode, image_size, named
from llava_accel.data.tiling import ImageView, Tiling
from llava_accel.sources.problems import DataError

Aspect = Literal["pad", "crop", "stretch"]


def pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square of its longer side, as LLaVA-1.5 trains and evaluates."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """Pixels [tiles, 3, height, width] of an image, or the tower's features of it [tiles, tokens, channels].

    `name` is the digest under which its features are kept; empty where none are.
    """

    tensor: Tensor
    name: bytes = b""

    @property
    def is_encoded(self) -> bool:
        """Whether these are features."""
        return self.tensor.ndim == 3


def feature_name(view: ImageView) -> bytes:
    """The name under which an image's features are kept; DataError if its file cannot be read."""
    return digest(content_of(view.file), is_cut=view.layout.num_tiles > 1)


class ImageReader:
    """Image files -> `pixel_values`.

    Args:
        processor: The tower's image processor (a PIL one of transformers).
        aspect: How a whole image becomes a square: "pad" with the mean colour, "crop" the middle, or "stretch".
        exif: See `decode`.
        tiling: Cuts the images whose view says so.
    """

    def __init__(
        self, processor: PilBackend, aspect: Aspect, exif: Exif = "ignore", tiling: Tiling | None = None
    ) -> None:
        self._processor = processor
        self._tiling = tiling
        self._aspect: Aspect = aspect
        self._exif: Exif = exif
        settings = processor.to_dict()
        red, green, blue = (int(mean * 255) for mean in settings["image_mean"])
        self._background = (red, green, blue)
        size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
        self._side: int = size.get("height") or size["shortest_edge"]
        self.store: FeatureStore | None = None
        """Features of images that are stored already."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every tile."""
        return (3, self._side, self._side)

    def __call__(self, view: ImageView) -> Float[Tensor, "tiles 3 height width"]:
        """Decode and normalise; DataError as from `decode`."""
        image = decode(view.file, self._exif)
        if view.layout.num_tiles == 1:
            return self.normalise(image)[None]
        assert self._tiling is not None
        tiles = self._processor(self._tiling.cut(image), return_tensors="pt")["pixel_values"]
        if len(tiles) != view.layout.num_tiles:
            raise DataError("broken_image", f"{named(view.file)} does not have the size that it had", "Start again")
        return tiles.to(torch.float32)

    def load(self, view: ImageView) -> LoadedImage:
        """What a batch needs of an image: its features if they are stored, so that nothing is decoded, else its pixels.

        Raises:
            DataError: see `decode`.
        """
        if self.store is None:
            return LoadedImage(self(view))
        name = feature_name(view)
        features = self.store.get(name)
        return LoadedImage(self(view) if features is None else features, name)

    def feature_names(self, files: Sequence[str]) -> list[bytes]:
        """The names under which the features of a record's images are kept.

        Raises:
            DataError: an image cannot be read.
        """
        views = self._tiling.views(files, partial(image_size, exif=self._exif)) if self._tiling else ()
        return list(map(feature_name, views))

    def normalise(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Bring an RGB image to the tower's size and range."""
        if self._aspect == "pad":
            image = pad_to_square(image, self._background)
        elif self._aspect == "stretch":
            image = image.resize((self._side, self._side), Image.Resampling.BICUBIC)
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == self.shape
        return pixels.to(torch.float32)
