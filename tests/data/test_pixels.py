"""Pixels are those of LLaVA: its square, its processor, its size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers.broken_images import noise
from helpers.samples import image_processor
from llava_accel.data.pixels import ImageReader, pad_to_square
from llava_accel.data.tiling import ImageView

MEAN = (0.48145466, 0.4578275, 0.40821073)
BACKGROUND = (122, 116, 104)


def as_llava_pads(image: Image.Image) -> np.ndarray:
    """LLaVA's arithmetic once more, on arrays: half of the difference, rounded down, above or to the left."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    side = max(width, height)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(mean * 255) for mean in MEAN]
    if width > height:
        top = (width - height) // 2
        square[top : top + height] = pixels
    else:
        left = (height - width) // 2
        square[:, left : left + width] = pixels
    return square


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (4, 7), (8, 5), (5, 8), (6, 6), (1, 9), (640, 427), (427, 640)])
def test_padding_is_llavas(size: tuple[int, int]) -> None:
    image = noise(*size)
    padded = pad_to_square(image, BACKGROUND)
    assert np.array_equal(np.asarray(padded), as_llava_pads(image))


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (56, 56), (1, 1), (200, 3)])
def test_pad_is_clips_own_processor_on_llavas_square(size: tuple[int, int], tmp_path: Path) -> None:
    noise(*size).save(tmp_path / "a.png")
    images = ImageReader(image_processor(), "pad")
    square = Image.fromarray(as_llava_pads(noise(*size)))
    expected = image_processor()(square, return_tensors="pt")["pixel_values"][0]
    (found,) = images(ImageView(str(tmp_path / "a.png"), 1))
    assert found.dtype == torch.float32 and found.shape == images.shape == (3, 56, 56)
    assert torch.equal(found, expected)


def test_crop_is_clips_own_processor_and_loses_the_borders() -> None:
    image = noise(112, 56)
    found = ImageReader(image_processor(), "crop").normalise(image)
    assert torch.equal(found, image_processor()(image, return_tensors="pt")["pixel_values"][0])
    middle = image.crop((28, 0, 84, 56))
    assert torch.equal(found, ImageReader(image_processor(), "crop").normalise(middle))


def test_stretch_sees_the_whole_image_without_padding() -> None:
    image = noise(112, 56)
    found = ImageReader(image_processor(), "stretch").normalise(image)
    expected = ImageReader(image_processor(), "crop").normalise(image.resize((56, 56), Image.Resampling.BICUBIC))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 700), (700, 1)])
def test_odd_shapes_become_the_towers_size(aspect: str, size: tuple[int, int]) -> None:
    pixels = ImageReader(image_processor(), aspect).normalise(noise(*size))  # pyright: ignore[reportArgumentType]
    assert pixels.shape == (3, 56, 56) and torch.isfinite(pixels).all()


def test_a_processor_that_resizes_without_cropping_sets_the_size() -> None:
    processor = CLIPImageProcessorPil(size={"height": 42, "width": 42}, do_center_crop=False)
    assert ImageReader(processor, "pad").normalise(noise(50, 20)).shape == (3, 42, 42)


def test_the_background_is_the_mean_colour_and_becomes_zero() -> None:
    pixels = ImageReader(image_processor(), "pad").normalise(noise(56, 2))
    assert pixels[:, 0].abs().max() < 0.02  # int() rounds the mean down to a whole level


def test_a_reader_turns_images_only_where_it_is_told_to(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(50, 20).save(tmp_path / "a.png", exif=exif)
    view = ImageView(str(tmp_path / "a.png"), 1)
    (stored,), (turned,) = (ImageReader(image_processor(), "stretch", how)(view) for how in ("ignore", "apply"))
    assert torch.equal(
        turned, ImageReader(image_processor(), "stretch").normalise(noise(50, 20).rotate(-90, expand=True))
    )
    assert torch.equal(stored, ImageReader(image_processor(), "stretch").normalise(noise(50, 20)))
