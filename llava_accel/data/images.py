"""Images: find the file, decode it safely, pad or crop or stretch, normalise."""

import os
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PilBackend

from llava_accel.data.feature_store import FeatureStore, digest
from llava_accel.data.problems import DataError, quoted

Aspect = Literal["pad", "crop", "stretch"]
_MAX_RATIO = 1000  # of the sides: the square around a longer strip, or its enlarged form, would fill the memory
_BROKEN = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise for files that are cut off or damaged; it differs between formats."""


def find_image(root: Path, name: str) -> Path:
    """The file that `name` means below `root`.

    Raises:
        DataError: the name, or a link on its way, leaves `root`; or is not a plain file.
    """
    path = root / name
    # os.path, not pathlib: it takes looping links and overlong names for missing files, and pathlib raises.
    if "\0" in name or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise DataError(
            "unsafe_path",
            f"the image {quoted(name)} lies outside {root}",
            "Name it relative to data.images, or set data.images to a folder that holds all images",
        )
    if not os.path.isfile(path):  # false for a folder, a pipe and a dangling link too
        raise DataError("missing_image", _absence(path, name, root), "Add it, or set data.images")
    return path


def _absence(path: Path, name: str, root: Path) -> str:
    if os.path.isdir(path):
        return f"the image {quoted(name)} is a folder in {root}"
    if os.path.exists(path):
        return f"the image {quoted(name)} in {root} is a pipe or a device, which is never opened"
    if os.path.islink(path):
        return f"the image {quoted(name)} in {root} is a link that leads nowhere"
    return f"there is no image {quoted(name)} in {root}"


def check_header(path: Path) -> tuple[int, int]:
    """Width and height in pixels from the file's header, nothing is decoded; DataError if it is not an image, or has
    more pixels than Pillow's limit against decompression bombs."""
    with _open(path) as image:
        return image.size


def decode(path: Path) -> Image.Image:
    """The image in RGB. As in LLaVA an animation is its first frame, transparency and EXIF rotation are ignored.

    Raises:
        DataError: the file is cut off, not an image, or too large.
    """
    with _open(path) as image:
        try:
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
        except _BROKEN as error:
            raise _broken(path, error) from None


def check_images(paths: Iterable[Path], whole: bool) -> None:
    """Open images, their headers or all of them; raises the DataError of the first that cannot be used."""
    for path in paths:
        decode(path) if whole else check_header(path)


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
    """Pixels [3, height, width] of an image, or the tower's features of it [tokens, channels].

    `name` is the digest under which its features are kept; empty where none are.
    """

    tensor: Tensor
    name: bytes = b""

    @property
    def is_encoded(self) -> bool:
        """Whether these are features."""
        return self.tensor.ndim == 2


class ImageReader:
    """Image files -> `pixel_values`.

    Args:
        processor: The tower's image processor (a PIL one of transformers).
        aspect: "pad" to a square of the mean colour, "crop" the middle, or "stretch" to the tower's size.
    """

    def __init__(self, processor: PilBackend, aspect: Aspect) -> None:
        self._processor = processor
        self._aspect = aspect
        settings = processor.to_dict()
        red, green, blue = (int(mean * 255) for mean in settings["image_mean"])
        self._background = (red, green, blue)
        size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
        self._side: int = size.get("height") or size["shortest_edge"]
        self.store: FeatureStore | None = None
        """Features of images that are stored already."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width of every image."""
        return (3, self._side, self._side)

    def __call__(self, path: Path) -> Float[Tensor, "3 height width"]:
        """Decode and normalise one file; DataError as from `decode`."""
        return self.normalise(decode(path))

    def load(self, path: Path) -> LoadedImage:
        """What a batch needs of one file: its features if they are stored, so that nothing is decoded, else its pixels.

        Raises:
            DataError: see `decode`.
        """
        if self.store is None:
            return LoadedImage(self(path))
        try:
            name = digest(path.read_bytes())
        except OSError as error:
            raise _broken(path, error) from None
        features = self.store.get(name)
        return LoadedImage(self(path) if features is None else features, name)

    def normalise(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Bring an RGB image to the tower's size and range."""
        if self._aspect == "pad":
            image = pad_to_square(image, self._background)
        elif self._aspect == "stretch":
            image = image.resize((self._side, self._side), Image.Resampling.BICUBIC)
        pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == self.shape
        return pixels.to(torch.float32)


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(
            "broken_image",
            f"{quoted(path, 200)} has more than {Image.MAX_IMAGE_PIXELS:,} pixels and may be a decompression bomb",
            "Scale it down before training: the tower sees a few hundred pixels a side",
        ) from None
    except _BROKEN as error:
        raise _broken(path, error) from None
    if max(image.size) > _MAX_RATIO * min(image.size):
        width, height = image.size
        image.close()
        problem = f"{quoted(path, 200)} is a strip of {width} x {height} pixels"
        raise DataError("broken_image", problem, "Cut it into images whose sides are less unequal")
    return image


def _broken(path: Path, error: Exception) -> DataError:
    problem = f"{quoted(path, 200)} is not a readable image ({' '.join(str(error).split())})"
    return DataError("broken_image", problem, "Replace it or drop the record")
