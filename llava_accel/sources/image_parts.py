"""Images that lie inside other files: a shard of a tar archive, an Arrow file, or a file of the cache.

An image has an address, a text: the path of its file; or, for an image inside another file, the path of that file, the range
of bytes, a digest of the content, and a name. All images are opened here, so that no other code needs to know the
difference.
"""

import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple

_END_BYTES = 8 << 10
"""Bytes at each end of an image that `digest_of_ends` reads."""
LARGEST = 256 << 20
"""Bytes of an image: no camera makes larger files, and all of it is held in memory."""
_MARK = "#bytes="
_ADDRESS = re.compile(
    r"(?P<file>.+)" + _MARK + r"(?P<start>\d{1,15})\+(?P<size>\d{1,10})#(?P<key>[0-9a-f]{32})#(?P<name>[^/]*)", re.S
)
_UNCOMPRESSED = (b"BM", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
"""First bytes of formats in which two pages with white edges have one size, and the same bytes at both ends."""
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"\0\0\0\x0cjP  ", *_UNCOMPRESSED)
SUFFIXES = ("jpg", "jpeg", "png", "gif", "webp", "avif", "bmp", "tif", "tiff", "ppm", "jp2")


class Part(NamedTuple):
    """The bytes of a file that are an image. `key` is equal for equal content, wherever the image is."""

    file: str
    start: int
    size: int
    key: str
    name: str = ""

    @property
    def address(self) -> str:
        """The part as one text, which `part_of` reads."""
        return f"{self.file}{_MARK}{self.start}+{self.size}#{self.key}#{self.name.rpartition('/')[2]}"


def part_of(address: str) -> Part | None:
    """The part that an address names; None if the address is the path of an image file."""
    match = _ADDRESS.fullmatch(address) if _MARK in address else None
    return Part(match["file"], int(match["start"]), int(match["size"]), match["key"], match["name"]) if match else None


def shown(address: str) -> str:
    """An address as messages show it."""
    part = part_of(address)
    if part is None:
        return address
    name = f"{part.name} " if part.name else ""
    return f"{name}(bytes {part.start} to {part.start + part.size} of {part.file})"


def open_image(address: str) -> io.BufferedIOBase:
    """The image's bytes as a file that can be read and sought; a part is read only as far as it is asked for.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    part = part_of(address)
    return Path(address).open("rb") if part is None else io.BufferedReader(_Range(part))


def read_image(address: str) -> bytes:
    """All bytes of the image; OSError as from `open_image`, or because it is larger than `LARGEST`."""
    with open_image(address) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise OSError(f"it has more than {LARGEST >> 20} MiB")
    return content


def digest_of_ends(file: io.BufferedIOBase) -> bytes:
    """Sixteen bytes that nearly always change with the content: a hash of its size, first and last 8 KiB; of a format
    without compression, of all of it.

    A PNG ends in checksums of all of it. JPEGs that differ only in their middle may have the same size and ends.
    """
    file.seek(0)
    if file.read(4).startswith(_UNCOMPRESSED):
        file.seek(0)
        return hashlib.sha256(file.read()).digest()[:16]
    digest = hashlib.sha256()
    size = file.seek(0, io.SEEK_END)
    digest.update(b"%d " % size)
    for start in (0, max(_END_BYTES, size - _END_BYTES)):
        file.seek(start)
        digest.update(file.read(_END_BYTES))
    return digest.digest()[:16]


def looks_like_image(head: bytes) -> bool:
    """Whether a file with these first bytes may be an image of a format that is read."""
    return head.startswith(_SIGNATURES) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis")


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of an image file."""
    return name.rpartition(".")[2].lower() in SUFFIXES


class _Range(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, part: Part) -> None:
        self._file = Path(part.file).open("rb", buffering=0)
        self._start, self._size, self._place = part.start, part.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = min(len(buffer), max(0, self._size - self._place))
        self._file.seek(self._start + self._place)
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
