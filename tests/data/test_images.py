"""An image name cannot leave its folder, a bad file is an error and never a crash, pixels are those of LLaVA."""

import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from transformers.image_utils import load_image

from helpers.broken_images import noise, png
from helpers.samples import image_processor
from llava_accel.data import images
from llava_accel.data.images import check_images, decode, find_image, image_size
from llava_accel.sources.problems import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images with one in a subfolder, and an image outside."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "a.png", folder / "sub" / "b c é.png", tmp_path / "secret.png"):
        Image.new("RGB", (5, 4), (10, 20, 30)).save(path)
    return folder


@pytest.mark.parametrize("name", ["a.png", "sub/b c é.png", "./a.png", "sub/../a.png"])
def test_a_name_below_the_folder_is_found(root: Path, name: str) -> None:
    assert decode(find_image(root, name)).size == (5, 4)


def test_a_link_that_stays_inside_is_followed_and_the_folder_may_be_one(root: Path) -> None:
    (root / "link.png").symlink_to(root / "sub" / "b c é.png")
    (root.parent / "link").symlink_to(root)
    assert find_image(root, "link.png").is_file() and find_image(root.parent / "link", "a.png").is_file()


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "/etc/passwd", "..", "../images_not/a.png", "a.png\0.jpg"]
)
def test_a_name_that_leaves_the_folder_is_refused(root: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        find_image(root, name)
    assert caught.value.kind == "unsafe_path" and "data.images" in caught.value.remedy


@pytest.mark.parametrize("name", ["link.png", "folder/secret.png"])
def test_a_link_that_leaves_the_folder_is_refused(root: Path, name: str) -> None:
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "folder").symlink_to(root.parent)
    with pytest.raises(DataError) as caught:
        find_image(root, name)
    assert caught.value.kind == "unsafe_path"


def test_what_is_no_plain_file_is_missing_and_never_waits(root: Path) -> None:
    os.mkfifo(root / "pipe.png")
    (root / "dangling.png").symlink_to(root / "gone.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    for name in ("pipe.png", "dangling.png", "loop.png", "sub", ".", "none.png", "a.png/b.png", "x" * 5000):
        with pytest.raises(DataError) as caught:
            find_image(root, name)
        assert caught.value.kind == "missing_image", name
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a readable image"),
        (b"this is not an image", "not a readable image"),
        (b"<html>404</html>", "not a readable image"),
        (b"\x89PNG\r\n\x1a\n", "not a readable image"),
        (png(50_000, 50_000), "decompression bomb"),
        (png(12_000, 12_000), "decompression bomb"),
        (png(40_000, 2), "strip of 40000 x 2"),
        (png(65_000, 66), "65000 x 66 pixels, and the square around it"),
        (png(1, 10_000), "strip of 1 x 10000"),
    ],
    ids=["empty", "text", "page", "head", "bomb", "half a bomb", "wide", "bar", "tall"],
)
def test_a_file_without_a_image_is_refused_by_its_head(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for look in (image_size, decode):
        with pytest.raises(DataError, match=word) as caught:
            look(path)
        assert caught.value.kind == "broken_image" and str(path) in caught.value.problem


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_cut_off_image_is_refused_when_it_is_decoded(tmp_path: Path, form: str, part: float) -> None:
    path = tmp_path / "a.jpg"
    noise(64, 48).save(path, form)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(DataError) as caught:
        decode(path)
    assert caught.value.kind == "broken_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damage_anywhere_is_an_error_and_never_a_crash(tmp_path: Path, form: str) -> None:
    path, random = tmp_path / "a", np.random.default_rng(0)
    noise(24, 16).save(path, form)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 4):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own about odd metadata
                image = decode(path)
        except DataError:
            continue
        assert image.mode == "RGB"


def test_a_files_name_reaches_a_message_without_its_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\n.png"
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        decode(path)
    assert str(caught.value).isprintable()


_SINCE_13 = [("TIFF", "YCbCr")]  # Pillow 12 cannot read what it wrote


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("PNG", mode) for mode in ("L", "LA", "RGBA", "1", "P")),
        *(("JPEG", mode) for mode in ("L", "CMYK", "YCbCr", "1")),
        *(("TIFF", mode) for mode in ("L", "LA", "RGBA", "CMYK", "1", "P")),
        *(_SINCE_13 if int(PIL.__version__.split(".")[0]) >= 13 else ()),
        *(("GIF", mode) for mode in ("L", "RGBA", "1", "P")),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, form: str, mode: str) -> None:
    Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode).save(tmp_path / "a", form)
    image = decode(tmp_path / "a")
    assert image.mode == "RGB" and image.size == (8, 6)
    assert np.asarray(image).min() >= 252


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.allclose(np.asarray(decode(tmp_path / "a.jpg")), (255, 0, 0), atol=4)


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    source = Image.new("P", (4, 4), 1)
    source.putpalette([0, 0, 0, 250, 120, 10])
    source.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "a.png").getpixel((0, 0)) == (250, 120, 10)


def test_sixteen_bits_are_scaled_and_not_clipped_to_white(tmp_path: Path) -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        Image.fromarray(values).save(tmp_path / "a", form)
        assert np.asarray(decode(tmp_path / "a"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "a.gif").getpixel((0, 0)) == (250, 0, 0)


def test_a_dark_sixteen_bit_image_is_refused_and_a_black_one_is_black(tmp_path: Path) -> None:
    for form in ("PNG", "TIFF"):
        Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)).save(tmp_path / "a", form)
        with pytest.raises(DataError, match="would be black: its highest 16-bit value is 4095"):
            decode(tmp_path / "a")
        Image.fromarray(np.array([[0, 0]], dtype=np.uint16)).save(tmp_path / "a", form)
        assert np.asarray(decode(tmp_path / "a")).max() == 0


def test_a_image_of_a_format_that_is_not_on_the_list_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho ran >>{tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    noise(20, 10).save(tmp_path / "a.jpg", "EPS")
    for look in (image_size, decode):
        with pytest.raises(DataError, match="its content is PostScript"):
            look(tmp_path / "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_only_the_formats_of_the_list_are_read(tmp_path: Path) -> None:
    Image.init()
    tried = 0
    for form in sorted(Image.OPEN.keys() & Image.SAVE.keys() - set(images._FORMATS)):
        try:
            noise(32, 32).save(tmp_path / "a", form)
        except (OSError, ValueError, KeyError):  # no RGB in it
            continue
        tried += 1
        with pytest.raises(DataError, match="not a readable image"):
            decode(tmp_path / "a")
    assert tried >= 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_is_ignored_as_llava_does_or_applied_as_transformers_does(
    tmp_path: Path, orientation: int, form: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(20, 10).save(tmp_path / "a", form, exif=exif)
    with Image.open(tmp_path / "a") as source:
        assert decode(tmp_path / "a") == source.convert("RGB")
    assert decode(tmp_path / "a", "apply") == load_image(str(tmp_path / "a"))
    # Pillow itself turns a TIFF while it reads it: nothing is left to be turned.
    assert check_images([tmp_path / "a"], whole=True)["turned"] == (orientation > 1 and form != "TIFF")


def _see_through(path: Path, mode: str) -> None:
    """A square image, all of it of the colour that stands for transparency."""
    if mode == "RGBA":
        Image.new("RGBA", (8, 8), (200, 30, 30, 0)).save(path, "PNG")
    elif mode == "RGB":
        Image.new("RGB", (8, 8), (200, 30, 30)).save(path, "PNG", transparency=(200, 30, 30))
    else:
        image = Image.new("RGB", (8, 8), (200, 30, 30)).convert(mode)
        image.save(path, "GIF" if mode == "P" else "PNG", transparency=image.getpixel((0, 0)))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "L"])
def test_transparent_parts_have_the_colours_that_llava_sees(tmp_path: Path, mode: str) -> None:
    _see_through(tmp_path / "a", mode)
    with Image.open(tmp_path / "a") as source:
        expected = np.asarray(source.convert("RGB"))
        as_is_said = source.convert("RGBA").convert("RGB")
    image = decode(tmp_path / "a")
    assert np.array_equal(np.asarray(image), expected)
    pixels = image_processor()(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels, image_processor()(Image.fromarray(expected), return_tensors="np")["pixel_values"])
    assert np.array_equal(pixels, image_processor()(as_is_said, return_tensors="np")["pixel_values"])
    assert check_images([tmp_path / "a"], whole=True)["transparent"] == 1


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path: Path) -> None:
    noise(8, 8).convert("RGBA").save(tmp_path / "a.png")
    assert not check_images([tmp_path / "a.png"], whole=True)["transparent"]


@pytest.mark.parametrize(
    ("written", "there", "says"),
    [
        ("one.jpg", "one.gif", "Write 'one.gif'"),
        ("upper.jpg", "UPPER.JPG", "Write 'UPPER.JPG'"),
        ("a.png.", None, "Add it"),
        ("sub\\a.png", "sub/a.png", "Write / in place of"),
        (" a.png", "a.png", "Write 'a.png'"),
        (unicodedata.normalize("NFC", "größe.png"), unicodedata.normalize("NFD", "größe.png"), "Unicode normal form"),
        ("coco/train/a.png", "a.png", "Write 'a.png'"),
        ("..\\secret.png", None, "Add it"),
        ("s3://example/a.jpg", None, "only those of http"),
        ("data:image/png;base64,iVBORw0KGgo=", None, "Save it as a file"),
    ],
)
def test_a_name_that_no_file_has_is_answered_with_one_that_is_there(
    tmp_path: Path, written: str, there: str | None, says: str
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    noise(8, 8).save(tmp_path / "secret.png")
    if there:
        (root / there).parent.mkdir(exist_ok=True)
        noise(8, 8).save(root / there)
    with pytest.raises(DataError) as caught:
        find_image(root, written)
    assert says in str(caught.value) and caught.value.kind == "missing_image"
    if there and "Write '" in says:
        assert find_image(root, there).is_file()
