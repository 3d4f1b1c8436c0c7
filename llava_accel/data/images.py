"""Image files: found below their folder, and decoded safely."""

import functools
import os
import stat
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from llava_accel.sources.image_parts import SUFFIXES, open_image, part_of, read_image, shown
from llava_accel.sources.json_rows import GIT_POINTER
from llava_accel.sources.problems import DataError, quoted

Exif = Literal["ignore", "apply"]
_MAX_RATIO = 1000  # longer side / shorter side: a longer strip, once enlarged, would fill the memory
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
"""The formats that are opened. Pillow knows more, but for EPS it starts Ghostscript, for others any registered program."""
_OTHER_CONTENT = {
    b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF", b"<svg": "SVG", b"<?xml": "XML",
    b"<!doctype html": "a web page", b"<html": "a web page", b"ftyphei": "HEIC", b"ftyphev": "HEIC", b"ftypmif1": "HEIF",
    b"ftypmsf1": "HEIF", b"ftyp": "a film", GIT_POINTER: "a Git LFS pointer: run git lfs pull",
}  # fmt: skip
"""First bytes, after white space or the length of a box, of files that people take for images."""
_ORIENTATION = 0x0112  # the number of the EXIF field; 1 or no field: as stored
_ON_THE_SIDE = range(5, 9)  # its values that swap width and height
_DARK = 4096  # 16-bit values that all lie below it come from 12 bits or less, and would be black
_BROKEN = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""The exceptions of Pillow's readers for files that are cut off or damaged; they differ between formats."""


def find_image(root: Path, name: str) -> Path:
    """The file that `name` means below `root`.

    Raises:
        DataError: the name, or a link on its path, leads out of `root`; or there is no plain file.
    """
    path = root / name
    if "\0" not in name and _is_plain_file(path) and _is_folder_inside(root, path.parent):
        return path  # nearly always, and each record asks
    # os.path, not pathlib: it takes looping links and overlong names for missing files, and pathlib raises.
    if "\0" in name or not _leads_into(root, path):
        raise DataError(
            "unsafe_path",
            f"the image {quoted(name)} lies outside {root}",
            "Name it relative to data.images, or set data.images to a folder that holds all images",
        )
    if not os.path.isfile(path):  # false for a folder, a pipe and a dangling link too
        raise DataError("missing_image", *_absence(path, name, root))
    return path


def _is_plain_file(path: Path) -> bool:
    """Whether it is a file and no link."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:  # missing, or an overlong name
        return False


def _leads_into(root: Path, path: Path) -> bool:
    """Whether a path is below `root` when all links have been followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


_is_folder_inside = functools.lru_cache(maxsize=1 << 14)(_leads_into)
"""The same, remembered: the images of a data set lie in few folders."""


def _absence(path: Path, name: str, root: Path) -> tuple[str, str]:
    """The problem with a name that no file has, and the remedy."""
    remedy = "Add it, or set data.images"
    if name.lower().startswith(("s3://", "gs://", "hf://", "ftp://", "file://")):
        problem = f"the image {quoted(name)} is an address, and only those of http and https are fetched"
        return problem, "Save it as a file below data.images, and write that file's name"
    if name.lower().startswith("data:"):
        problem = f"the image {quoted(name)} is not the base64 of an image of a format that is read"
        return problem, "Save it as a file below data.images, and write that file's name"
    if os.path.isdir(path):
        return f"the image {quoted(name)} is a folder in {root}", remedy
    if os.path.exists(path):
        return f"the image {quoted(name)} in {root} is a pipe or a device, which is never opened", remedy
    if os.path.islink(path):
        return f"the image {quoted(name)} in {root} is a link that leads nowhere", remedy
    problem = f"there is no image {quoted(name)} in {root if root != Path() else root.absolute()}"
    similar = next((other for other in _spellings(name) if _is_inside(root, other)), None)
    if similar is None:
        return problem, remedy
    if unicodedata.normalize("NFC", similar) == unicodedata.normalize("NFC", name):
        return problem, "A file there has this name in another Unicode normal form. Rename it, or write its form here"
    if "\\" in name:
        return problem, f"Write / in place of \\: {quoted(similar)} is there"
    return problem, f"Write {quoted(similar)}, which is there, or add it"


def _spellings(name: str) -> Iterable[str]:
    """Other spellings of a name to try. Few, and no folder is listed, as it may hold millions of files."""
    plain = name.replace("\\", "/").strip()
    stem, suffix = os.path.splitext(plain)
    forms = [plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))]
    forms += [stem + suffix.lower(), stem + suffix.upper(), plain.lower(), stem.upper() + suffix, plain.upper()]
    forms += [f"{stem}.{other}" for each in SUFFIXES for other in (each, each.upper())]
    return (form for form in dict.fromkeys([*forms, os.path.basename(plain)]) if form != name)


def _is_inside(root: Path, name: str) -> bool:
    path = root / name
    return os.path.isfile(path) and _leads_into(root, path)


def image_size(path: Path | str, exif: Exif = "ignore") -> tuple[int, int]:
    """Width and height in pixels, from the file's header: nothing is decoded.

    Args:
        path: The file, or an address: see `image_parts.py`.
        exif: See `decode`.

    Raises:
        DataError: its format or type is not read, or it is too large, as it is or padded to a square.
    """
    with _open(path) as image:
        width, height = image.size
        lies = exif == "apply" and _orientation(image) in _ON_THE_SIDE
    return (height, width) if lies else (width, height)


def decode(path: Path | str, exif: Exif = "ignore") -> Image.Image:
    """The image in RGB. As in LLaVA, an animation is its first frame, and transparent parts show the colours stored there.

    Args:
        path: The file, or an address: see `image_parts.py`.
        exif: "apply" turns it as its EXIF orientation says; LLaVA does not.

    Raises:
        DataError: the file is cut off, not an image that is read, or too large.
    """
    with _open(path) as image:
        return _decoded(image, path, exif)


def _decoded(image: Image.Image, path: Path | str, exif: Exif) -> Image.Image:
    try:
        image.load()
        if exif == "apply" and _is_turned(image):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits to white
            image = image.convert("I")
            _check_range(image, path)
            image = image.point(lambda value: value / 256).convert("L")
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB")
    except DataError:
        raise
    except _BROKEN as error:
        raise broken(path, error) from None
    # The colour that is marked as transparent stays marked in RGB, and transformers would then make it white.
    image.info.pop("transparency", None)
    return image


def _check_range(image: Image.Image, path: Path | str) -> None:
    highest = image.getextrema()[1]
    if 0 < highest < _DARK:  # pyright: ignore[reportOperatorIssue]  a number, as there is one channel
        problem = f"{named(path)} would be black: its highest 16-bit value is {highest} of 65535"
        raise DataError("broken_image", problem, "Scale its values to 8 bits, and save it as PNG")


def content_of(path: Path | str) -> bytes:
    """All bytes of an image file; DataError if it cannot be read."""
    try:
        return read_image(str(path))
    except OSError as error:
        raise broken(path, error) from None


def check_images(paths: Iterable[Path | str], whole: bool) -> Counter[str]:
    """Open images: only their headers, or `whole`, which decodes them.

    Returns:
        How many are "turned" by their EXIF, and how many are "transparent" in parts; empty unless `whole`.

    Raises:
        DataError: about the first image that cannot be used.
    """
    traits: Counter[str] = Counter()
    for path in paths:
        with _open(path) as image:
            if whole:
                _decoded(image, path, "ignore")
                traits.update(turned=_is_turned(image), transparent=_is_transparent(image))
    return traits


def _is_turned(image: Image.Image) -> bool:
    return _orientation(image) in range(2, 9)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:  # the pixels may be fine
        return 1


def _is_transparent(image: Image.Image) -> bool:
    may_be = "A" in image.getbands() or "transparency" in image.info
    if not may_be or image.mode.startswith("I"):
        return False
    return image.convert("RGBA").getchannel("A").getextrema()[0] < 255  # pyright: ignore[reportOperatorIssue]


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # else only a few are registered, and older versions of Pillow have no AVIF
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextmanager
def _open(path: Path | str) -> Iterator[Image.Image]:
    with ExitStack() as stack:
        try:
            # Pillow opens files itself, and looks at their names; parts are files that are open already.
            file: Any = stack.enter_context(open_image(str(path))) if part_of(str(path)) else path
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = stack.enter_context(Image.open(file, formats=_formats()))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise DataError(
                "broken_image",
                f"{named(path)} has more than {Image.MAX_IMAGE_PIXELS:,} pixels and may be a decompression bomb",
                "Scale it down before training: the tower sees a few hundred pixels a side",
            ) from None
        except UnidentifiedImageError:
            raise _of_another_format(path) from None
        except _BROKEN as error:
            raise broken(path, error) from None
        if problem := _unusable(image):
            raise DataError("broken_image", f"{named(path)} {problem[0]}", problem[1])
        yield image


def _unusable(image: Image.Image) -> tuple[str, str] | None:
    """The problem with an image whose header can be read, and the remedy; None if there is no problem."""
    width, height = image.size
    if max(image.size) > _MAX_RATIO * min(image.size):
        return f"is a strip of {width} x {height} pixels", "Cut it into images whose sides are less unequal"
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and max(image.size) ** 2 > most:
        return f"has {width} x {height} pixels, and the square around it more than {most:,}", "Scale it down, or cut it"
    # PNG and PPM give 16 bits as "I"; there is no such rule for what a TIFF's numbers mean.
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit numbers"
        return f"holds {kind}, and nothing says which are black and white", "Scale them to 8 bits, and save it as PNG"
    return None


def _of_another_format(path: Path | str) -> DataError:
    """The error for a file whose first bytes match no format that is read."""
    try:
        with open_image(str(path)) as file:
            head = file.read(64)
    except OSError as error:
        return broken(path, error)
    starts = (head.lower().lstrip(), head[4:].lower())
    kinds = (kind for mark, kind in _OTHER_CONTENT.items() if any(start.startswith(mark.lower()) for start in starts))
    kind = next(kinds, "nothing" if not head else "of no format that is read, or cut off")
    problem = f"{named(path)} is not a readable image (its content is {kind})"
    return DataError("broken_image", problem, "Convert it to JPEG or PNG, replace it, or drop the record")


def broken(path: Path | str, error: Exception) -> DataError:
    """The error for an image file that cannot be read."""
    problem = f"{named(path)} is not a readable image ({' '.join(str(error).split())})"
    return DataError("broken_image", problem, "Replace it or drop the record")


def named(path: Path | str) -> str:
    """An image file as messages call it."""
    return quoted(shown(str(path)), 200)
