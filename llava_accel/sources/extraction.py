"""Takes images out of rows: bytes and base64 become `{"llava_accel.part": [file, start, size, key, name]}`, where the file
is the row's own (an Arrow file, a tar shard) or one of the cache, which the bytes are copied to.
"""

import base64
import binascii
import hashlib
import io
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from llava_accel.sources.image_parts import Part, digest_of_ends, looks_like_image, part_of, read_image
from llava_accel.sources.problems import DataError, quoted
from llava_accel.storage.atomic import atomic_file

PART = "llava_accel.part"
OWN, COPIED = 0, 1
"""The file that a part is in: the one that the row comes from, or that of the cache."""
_TEXTS = ("value", "content", "text")  # fields whose value is a text even if it looks like base64
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,)?(?P<data>[A-Za-z0-9+/\s_-]{40,}(?:={1,2}\s*)?)")
_MAY_HOLD = re.compile(rb'"(?:data:image\\?/|[A-Za-z0-9+/\\_-]{40})')  # some writers escape each slash
_REMEMBERED = 1 << 16  # images: neighbouring rows often show the same one


class Extraction(ExitStack):
    """Takes the images out of the rows of one file; rows that show the same image share one copy of it.

    Args:
        source: The file that the rows come from.
        copies: File of the cache for images that cannot be read in `source`. Made when the first one comes.
    """

    def __init__(self, source: Path, copies: Path) -> None:
        super().__init__()
        self._source, self._copies = source, copies
        self._files: dict[int, IO[bytes]] = {}
        self._known: OrderedDict[str, tuple[list[int], str]] = OrderedDict()
        self.num_bytes = 0
        """Bytes copied so far."""

    def row(self, row: object, own: pa.Buffer | None = None) -> bytes:
        """The row as JSON, its images taken out.

        Args:
            own: The file that the row comes from, mapped: images in it stay where they are.
        """
        return json.dumps(self._without(row, own), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")

    def json_row(self, raw: bytes) -> bytes:
        """A row of JSON, unchanged unless it holds an image. One that is not JSON is refused elsewhere."""
        if not _MAY_HOLD.search(raw):
            return raw
        try:
            row = self.row(json.loads(raw))
        except (ValueError, RecursionError):
            return raw
        return row if PART.encode() in row else raw

    def _without(self, value: object, own: pa.Buffer | None) -> object:
        if (content := _bytes_of(value)) is not None:
            return self._taken(content, "", own)
        if isinstance(value, dict):
            if (content := _bytes_of(value.get("bytes"))) is not None:  # the form of the hub
                path = value.get("path")
                return self._taken(content, path if isinstance(path, str) else "", own)
            return {
                key: item if key in _TEXTS and isinstance(item, str) else self._without(item, own)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._without(item, own) for item in value]
        return value

    def _taken(self, content: pa.Buffer, name: str, own: pa.Buffer | None) -> object:
        """The part that stands for an image; text that was stored as bytes becomes text."""
        whole = memoryview(content).cast("B")
        if not looks_like_image(bytes(whole[:16])):
            try:
                return bytes(whole).decode()
            except UnicodeDecodeError:
                pass  # whatever it is, it is refused as an image
        key = digest_of_ends(io.BytesIO(whole)).hex()
        is_mapped = own is not None and own.address <= content.address < own.address + own.size
        place = [OWN, content.address - own.address, content.size] if own is not None and is_mapped else None
        return self.part(key, name, lambda: whole, lambda: place or [COPIED, *self._copy(whole)])

    def part(
        self, key: str, name: str, read: Callable[[], bytes | memoryview], find: Callable[[], list[int]]
    ) -> dict[str, object]:
        """The value that stands for an image in its row.

        Args:
            key: `digest_of_ends` of its content.
            read: Gives its content.
            find: Gives the number of its file, its start and its size; called if no recent row has shown it.
        """
        if key in self._known and self._content(*self._known[key][0]) != (content := read()):
            key = hashlib.sha256(content).hexdigest()[:32]  # another image, whose ends are the same
        if key not in self._known:
            self._known[key] = find(), name
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        place, name = self._known[key]  # the first name: it is one image
        return {PART: [*place, key, name]}

    def _content(self, number: int, start: int, size: int) -> bytes:
        """The bytes at a place in one of the two files."""
        if number not in self._files:
            self._files[number] = self.enter_context(self._source.open("rb"))
        file = self._files[number]
        file.seek(start)
        content = file.read(size)
        file.seek(0, io.SEEK_END)  # where the next copy goes
        return content

    def _copy(self, content: memoryview) -> tuple[int, int]:
        if COPIED not in self._files:
            unfinished = self.enter_context(atomic_file(self._copies, is_private=True))
            self._files[COPIED] = self.enter_context(unfinished.open("w+b"))
        self._files[COPIED].write(content)
        self.num_bytes += len(content)
        return self.num_bytes - len(content), len(content)


def _bytes_of(value: object) -> pa.Buffer | None:
    """The bytes of a value that is bytes or the base64 of an image; None if it is neither."""
    if isinstance(value, str):
        value = image_of_base64(value)
    return pa.py_buffer(value) if isinstance(value, bytes) else value if isinstance(value, pa.Buffer) else None


def image_of_base64(text: str) -> bytes | None:
    """The image that a text is the base64 of, with or without `data:image/...;base64,`; None for any other text."""
    match = _BASE64.fullmatch(text)
    if match is None:
        return None
    data = match["data"].translate(str.maketrans("-_", "+/"))
    try:
        content = base64.b64decode(data + "=" * (-len(data.strip()) % 4))
    except (binascii.Error, ValueError):
        return None
    return content if looks_like_image(content[:16]) else None


def part_in(value: object, files: Sequence[str]) -> Part | None:
    """The part that a value of a row stands for; None if it is something else.

    Args:
        files: Paths of the row's own file and of the cache's, in the order of `OWN` and `COPIED`.
    """
    fields = value.get(PART) if isinstance(value, dict) else None
    if not isinstance(fields, list) or len(fields) != 5:
        return None
    number, start, size, key, name = fields
    if not (isinstance(number, int) and 0 <= number < len(files) and isinstance(start, int) and isinstance(size, int)):
        return None
    if min(start, size) < 0 or not isinstance(key, str) or not isinstance(name, str):
        return None
    return Part(files[number], start, size, key, name.replace("\n", " "))


def with_addresses(fields: Mapping[str, object], files: Sequence[str]) -> dict[str, object]:
    """The fields of a row with addresses in the place of parts."""
    return {name: _replaced(value, files, lambda part: part.address) for name, value in fields.items()}


def _replaced(value: object, files: Sequence[str], stand_in: Callable[[Part], object]) -> object:
    """A value of a row with something else in the place of each part in it."""
    if part := part_in(value, files):
        return stand_in(part)
    if isinstance(value, dict):
        return {key: _replaced(item, files, stand_in) for key, item in value.items()}
    return [_replaced(item, files, stand_in) for item in value] if isinstance(value, list) else value


def check_parts(images: Sequence[str], files: Sequence[str]) -> None:
    """DataError if an image is a part of a file that is not one of its row's: then a text of the data wrote its address."""
    for image in images:
        part = part_of(image)
        if part and part.file not in files:
            problem = f"the image {quoted(image)} names a part of a file"
            raise DataError("unsafe_path", problem, "Name the file of the image itself")


def check_texts(texts: Iterable[str], files: Sequence[str]) -> None:
    """DataError if a text is the address of a part: the row holds bytes there, and the address would be learned."""
    for text in texts:
        if (part := part_of(text)) and part.file in files:
            problem = "a question or an answer is an image, or bytes that are not UTF-8"
            raise DataError("fields", problem, "Write it as text; data.columns names the columns that are read")


def with_images(raw: bytes, files: Sequence[str]) -> bytes:
    """The row with its images in base64 in place of parts, to be written into another file; OSError if one is gone."""
    if PART.encode() not in raw:
        return raw

    def inline(part: Part) -> object:
        return {"bytes": base64.b64encode(read_image(part.address)).decode(), "path": part.name or None}

    row = _replaced(json.loads(raw), files, inline)
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")


def rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, object]]:
    """The rows of a batch as Python values, but bytes as Arrow's buffers, so that they are not copied."""
    held = [_has_bytes(field.type) for field in batch.schema]
    plain = [None if has else column.to_pylist() for column, has in zip(batch.columns, held, strict=True)]
    for place in range(batch.num_rows):
        yield {
            name: _value(column, place) if values is None else values[place]
            for name, column, values in zip(batch.schema.names, batch.columns, plain, strict=True)
        }


def has_bytes(schema: pa.Schema) -> bool:
    """Whether a column holds bytes, on any level of nesting."""
    return any(_has_bytes(field.type) for field in schema)


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _value(array: pa.Array, place: int) -> object:
    kind = array.type
    if not _has_bytes(kind):
        return array[place].as_py()
    if array.slice(place, 1).null_count:  # a scalar would be a copy
        return None
    if pa.types.is_struct(kind):
        return {kind.field(number).name: _value(array.field(number), place) for number in range(kind.num_fields)}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        start, end = array.offsets[place].as_py(), array.offsets[place + 1].as_py()
        return [_value(array.values, item) for item in range(start, end)]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        _, offsets, data = array.buffers()
        width = np.dtype(np.int64 if pa.types.is_large_binary(kind) else np.int32)
        ends = np.frombuffer(offsets, width, 2, (array.offset + place) * width.itemsize)
        return data.slice(int(ends[0]), int(ends[1] - ends[0])) if data is not None else pa.py_buffer(b"")
    return array[place].as_py()
