"""A table's file -> its text and its delimiter. Encoding and delimiter are detected if the user does not name them."""

import codecs
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted

_DELIMITERS = ",;\t|"
_MARKS = {  # byte order marks, the longer first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_SAVE = 'Save it there as "CSV UTF-8", and give that file'
_OTHER_CONTENT = {
    b"PK\x03\x04": ("a spreadsheet (.xlsx, .ods) or another archive", _SAVE),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet of old Excel (.xls)", _SAVE),
    b"\x1f\x8b": ("packed with gzip", "Unpack it with gunzip, and give the unpacked file"),
    b"PAR1": ("Parquet", "Write it as CSV; data.train reads Parquet itself where it has LLaVA's columns"),
}
_EXCELS_LINE = re.compile(r'"?sep=([^"\r\n])"?\r?\n', re.IGNORECASE)


def read_text(file: Path, encoding: str) -> tuple[str, str, str]:
    """The text of a table.

    Args:
        encoding: Python's name of it; empty: from the byte order mark, else UTF-8, else Windows' Western European.

    Returns:
        The text, the encoding, and a note about it, which may be empty.

    Raises:
        UserError: with file and remedy.
    """
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        problem = "there is no such file" if isinstance(error, FileNotFoundError) else "this is a folder"
        raise DataError("json", problem, "Check --file", file=str(file)) from None
    for start, (content, remedy) in _OTHER_CONTENT.items():
        if raw.startswith(start):
            raise DataError("json", f"it is {content}, not CSV", remedy, file=str(file))
    if not raw.strip():
        raise DataError("json", "the file is empty", "Give a table with a header", file=str(file))
    name = encoding or _marked(raw) or "utf-8"
    try:
        return raw.decode(name).removeprefix("\ufeff"), name.removesuffix("-sig"), ""
    except LookupError:
        raise UserError(
            f"--encoding {encoding}: not known. Write for example utf-8, cp1252, utf-16 or gb18030."
        ) from None
    except UnicodeError as error:
        if encoding or name != "utf-8":
            raise DataError("json", f"it is not {name} ({error})", "Name another --encoding", file=str(file)) from None
    return _western(raw)


def find_delimiter(text: str, columns: Sequence[str]) -> str:
    """The character between cells: the one with which the header has most of `columns`, and then most cells."""

    def fit(delimiter: str) -> tuple[int, int]:
        cells = _header(text, delimiter)
        return len(set(columns) & set(cells)), len(cells)

    return max(_DELIMITERS, key=fit)


def take_excels_line(text: str) -> tuple[str, str]:
    """The text without the line "sep=;" that Excel writes and reads, and the delimiter that it names; else empty."""
    match = _EXCELS_LINE.match(text)
    return (text[match.end() :], match[1]) if match else (text, "")


def _marked(raw: bytes) -> str:
    for mark, name in _MARKS.items():
        if raw.startswith(mark):
            return name
    # UTF-16 without its mark: every other byte of plain letters is zero.
    first, second = raw[0::2].count(0), raw[1::2].count(0)
    return "" if 4 * (first + second) < len(raw) else "utf-16-le" if second > first else "utf-16-be"


def _western(raw: bytes) -> tuple[str, str, str]:
    try:
        name, text = "cp1252", raw.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no meaning in cp1252
        name, text = "latin-1", raw.decode("latin-1")
    example = re.search(r"\w*[^\x00-\x7f]+\w*", text)
    assert example is not None  # else it would be UTF-8
    shown = f"the file is not UTF-8; as {name} it reads for example {quoted(example.group())}"
    return text, name, f"{shown}. If that is wrong, name its encoding with --encoding"


def _header(text: str, delimiter: str) -> list[str]:
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return [cell.strip() for cell in next((row for row in rows if row), [])]
    except csv.Error:
        return []
