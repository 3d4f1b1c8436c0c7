"""Images: those that cannot be used, and odd ones that are as good as any. Each is made in a folder of its own."""

import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Make = Callable[[Path], object]
"""Writes the image; the path's folder is empty, and its parent holds `secret.png`."""


def noise(width: int, height: int) -> Image.Image:
    """Pixels that no format packs to nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that promises any size and holds no pixels."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        *more,
        b"IDAT" + zlib.compress(b""),
        b"IEND",
    )
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _holds(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def _cut(form: str, part: float) -> Make:
    def make(path: Path) -> None:
        noise(64, 48).save(path, form)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])

    return make


def _text_bomb(path: Path) -> None:
    path.write_bytes(png(40, 30, b"zTXta\0\0" + zlib.compress(bytes(99_000_000))))


def _flipped(path: Path) -> None:
    noise(64, 48).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address may have 108 characters, and tests' folders are longer
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _link_to(target: str) -> Make:
    return lambda path: path.symlink_to(target)


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\nshowpage\n%%EOF\n"
BROKEN: dict[str, tuple[str, Make, list[str]]] = {  # name -> name in the record, how to make it, words of the message
    "zero bytes": ("a.png", _holds(b""), ["not a readable image"]),
    "text named .jpg": ("a.jpg", _holds(b"this is not an image"), ["not a readable image"]),
    "a web page named .jpg": ("a.jpg", _holds(b"<!DOCTYPE html><title>404</title>"), ["not a readable image"]),
    "JSON named .png": ("a.png", _holds(b'{"error": "quota"}'), ["not a readable image"]),
    "an SVG": ("a.svg", _holds(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), ["not a readable image"]),
    "a PDF": ("a.pdf", _holds(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"), ["not a readable image"]),
    "a film": ("a.mp4", _holds(b"\x00\x00\x00\x18ftypmp42" + bytes(99)), ["not a readable image"]),
    "a million NULs": ("a.png", _holds(bytes(1_000_000)), ["not a readable image"]),
    "the first bytes of a PNG": ("a.png", _holds(b"\x89PNG\r\n\x1a\n"), ["not a readable image"]),
    "the first bytes of a JPEG": ("a.jpg", _holds(b"\xff\xd8\xff\xe0\x00\x10JFIF"), ["not a readable image"]),
    "half a PNG": ("a.png", _cut("PNG", 0.5), ["not a readable image", "Replace it"]),
    "half a JPEG": ("a.jpg", _cut("JPEG", 0.5), ["not a readable image", "Replace it"]),
    "nearly all of a JPEG": ("a.jpg", _cut("JPEG", 0.9), ["not a readable image", "Replace it"]),
    "half a GIF": ("a.gif", _cut("GIF", 0.5), ["not a readable image", "Replace it"]),
    "half a WebP": ("a.webp", _cut("WEBP", 0.5), ["not a readable image", "Replace it"]),
    "half a TIFF": ("a.tif", _cut("TIFF", 0.5), ["not a readable image", "Replace it"]),
    "half a BMP": ("a.bmp", _cut("BMP", 0.5), ["not a readable image", "Replace it"]),
    "a PNG with a flipped byte": ("a.png", _flipped, ["not a readable image", "Replace it"]),
    "a PNG without pixels": ("a.png", _holds(png(40, 30)), ["not a readable image", "Replace it"]),
    "a PNG without width": ("a.png", _holds(png(0, 30)), ["not a readable image"]),
    "a decompression bomb": ("a.png", _holds(png(50_000, 50_000)), ["decompression bomb", "Scale it down"]),
    "half a decompression bomb": ("a.png", _holds(png(12_000, 12_000)), ["decompression bomb", "Scale it down"]),
    "a bomb of text": ("a.png", _text_bomb, ["not a readable"]),
    "an EPS": ("a.eps", _holds(_EPS), ["not a readable image", "PostScript", "Convert it"]),
    "an EPS named .jpg": ("a.jpg", _holds(_EPS), ["not a readable image", "PostScript", "Convert it"]),
    "a PCX": ("a.pcx", lambda path: noise(12, 8).save(path), ["not a readable image", "Convert it"]),
    "an HEIC": ("a.heic", _holds(b"\0\0\0\x18ftypheic" + bytes(99)), ["not a readable image", "HEIC", "Convert it"]),
    "floating-point numbers": (
        "a.tif", lambda path: Image.new("F", (9, 9), 0.5).save(path), ["floating-point numbers", "Scale them"]
    ),
    "32-bit numbers": ("a.tif", lambda path: Image.new("I", (9, 9), 70_000).save(path), ["32-bit numbers", "Scale them"]),
    "a long bar": ("a.png", lambda path: Image.new("1", (65_000, 66)).save(path), ["65000 x 66", "square", "Scale it"]),
    "a strip of 1 x 10000": ("a.png", _holds(png(1, 10_000)), ["strip of 1 x 10000", "Cut it"]),
    "a strip of 40000 x 2": ("a.png", _holds(png(40_000, 2)), ["strip of 40000 x 2", "Cut it"]),
    "no file": ("none.png", lambda path: None, ["there is no image 'none.png'", "Add it"]),
    "an address": ("gs://example/a.png", lambda path: None, ["'gs:", "only those of http", "Save it"]),
    "a name of 5000 letters": ("x" * 5000, lambda path: None, ["there is no image 'xxx", "Add it"]),
    "a name with a line break": ("a\n\x1b[31mb.png", lambda path: None, [r"'a\n\x1b[31mb.png'", "Add it"]),
    "a pipe": ("a.png", os.mkfifo, ["'a.png'", "a pipe or a device", "Add it"]),
    "a socket": ("a.png", _socket, ["'a.png'", "a pipe or a device", "Add it"]),
    "a folder": ("a.png", os.mkdir, ["'a.png' is a folder", "Add it"]),
    "the folder itself": (".", lambda path: None, ["'.' is a folder", "Add it"]),
    "a dangling link": ("a.png", _link_to("gone.png"), ["'a.png'", "a link that leads nowhere", "Add it"]),
    "a link to itself": ("a.png", _link_to("a.png"), ["'a.png'", "a link that leads nowhere", "Add it"]),
    "a link out of the folder": ("a.png", _link_to("../secret.png"), ["'a.png' lies outside", "data.images"]),
    "a link to a device": ("a.png", _link_to("/dev/zero"), ["'a.png' lies outside", "data.images"]),
    "a way through a linked folder": ("up/secret.png", lambda path: path.parent.symlink_to(".."), ["lies outside"]),
    "a way up": ("../secret.png", lambda path: None, ["'../secret.png' lies outside", "data.images"]),
    "a way down and up": ("sub/../../secret.png", lambda path: None, ["lies outside", "data.images"]),
    "a path from the root": ("/etc/passwd", lambda path: None, ["'/etc/passwd' lies outside", "data.images"]),
    "a NUL in the name": ("a.png\0.jpg", lambda path: None, [r"'a.png\x00.jpg' lies outside", "data.images"]),
}  # fmt: skip


def _rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look right
    noise(12, 8).save(path, exif=exif)


def _palette(path: Path) -> None:
    source = noise(12, 8).convert("P")
    source.save(path, "PNG", transparency=bytes(range(256)))


def _animated(form: str) -> Make:
    def make(path: Path) -> None:
        frames = [noise(12, 8), Image.new("RGB", (12, 8))]
        frames[0].save(path, form, save_all=True, append_images=frames[1:], lossless=True)

    return make


def _as(mode: str, form: str = "PNG") -> Make:
    return lambda path: noise(12, 8).convert(mode).save(path, form)


FINE: dict[str, tuple[str, Make]] = {  # name -> file, how to make it: RGB values are those of LLaVA's convert("RGB")
    "CMYK": ("a.jpg", _as("CMYK", "JPEG")),
    "CMYK in a TIFF": ("a.tif", _as("CMYK", "TIFF")),
    "YCbCr": ("a.jpg", _as("YCbCr", "JPEG")),
    "a palette": ("a.png", _as("P")),
    "a palette with transparency": ("a.png", _palette),
    "transparency": ("a.png", _as("RGBA")),
    "grey": ("a.png", _as("L")),
    "grey with transparency": ("a.png", _as("LA")),
    "black and white": ("a.png", _as("1")),
    "an animated GIF": ("a.gif", _animated("GIF")),
    "an animated WebP": ("a.webp", _animated("WEBP")),
    "an animated PNG": ("a.png", _animated("PNG")),
    "turned by its EXIF": ("a.jpg", _rotated),
    "1 x 1": ("a.png", lambda path: noise(1, 1).save(path)),
    "1 x 999": ("a.png", lambda path: noise(1, 999).save(path)),
    "a PNG named .jpg": ("a.jpg", _as("RGB")),
    "a JPEG without a suffix": ("a", _as("RGB", "JPEG")),
    "capitals and spaces": ("A B é.PNG", _as("RGB")),
    "a link inside the folder": ("a.png", lambda path: (_as("RGB")(path.with_name("b")), path.symlink_to("b"))),
}
