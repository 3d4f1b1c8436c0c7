"""One file of the user's as a memory-mapped table of raw rows, so that ten million records cost no memory.

Each file is read once into an Arrow file of the cache, keyed by path, inode, size and times of change; every later start and
every rank maps the same file. The time that counts is the ctime: archives and copies may give two files the same size and
mtime, but only the system sets the ctime. Images inside a row are not in the table: see `extraction.py`.
"""

import hashlib
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from llava_accel.recipe.paths import OTHER_SUFFIXES, SUFFIXES, remedy_of
from llava_accel.sources.columnar import arrow_rows, parquet_rows
from llava_accel.sources.downloads import may_hold
from llava_accel.sources.extraction import Extraction
from llava_accel.sources.json_rows import json_array, json_lines
from llava_accel.sources.problems import DataError
from llava_accel.sources.shards import tar_rows
from llava_accel.storage.arrow_columns import of_bytes, of_numbers
from llava_accel.storage.kept_files import spare_folder, store, stored

_ROWS_PER_CHUNK = 4096  # random access finds a row by division, so every chunk but the last has this many
_FORMAT = "7"
_SCHEMA = pa.schema([("number", pa.int64()), ("row", pa.large_binary())])


class Table:
    """Rows of one file as raw JSON bytes: `table[i]` costs no more than the row itself.

    Args:
        path: A file with one of `SUFFIXES`; .json is an array, .tar a WebDataset shard.
        cache_dir: Folder for the Arrow file, and for images that are copied out of the rows.
        identity: That of a table that was opened before: a worker must read the rows that the run does, even if the file
            has changed meanwhile.

    `fingerprint` is a hash of all rows and their numbers, wherever the file is.
    `files` are the paths of the files that parts of rows are in: see `extraction.part_in`.
    `may_have_urls` is false if no text of any row begins as a URL.

    Raises:
        DataError: the file is missing or cannot be read; names file and remedy.
    """

    def __init__(self, path: Path, cache_dir: Path, identity: str = "") -> None:
        self.path = path
        self._cache_dir = cache_dir
        self._identity = identity or _identity(path)
        kept = _kept(path, cache_dir, self._identity)
        self._rows, self._numbers = kept.rows, kept.numbers
        self.fingerprint, self.may_have_urls = kept.digest, kept.may_have_urls
        self.files = (str(path.resolve()), str(kept.copies))

    def __reduce__(self) -> tuple[type["Table"], tuple[Path, Path, str]]:
        # A worker process maps the file itself; Arrow's own pickle would copy all of it.
        return Table, (self.path, self._cache_dir, self._identity)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> bytes:
        chunk, place = divmod(index, _ROWS_PER_CHUNK)
        return self._rows.chunk(chunk)[place].as_py()

    def number(self, index: int) -> int:
        """The number of the row in the file: its line, blank ones counted, or its place in the array, from 1."""
        chunk, place = divmod(index, _ROWS_PER_CHUNK)
        return self._numbers.chunk(chunk)[place].as_py()


def _identity(path: Path) -> str:
    if not path.is_file():
        remedy = f"Check data.train and data.eval. {remedy_of(str(path)).removesuffix('.')}"
        raise DataError("json", f"there is no such file: {path}", remedy, file=str(path))
    stat = path.stat()
    times = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr((_FORMAT, str(path.resolve()), *times)).encode()).hexdigest()[:20]


class _Kept(NamedTuple):
    rows: pa.ChunkedArray
    numbers: pa.ChunkedArray
    digest: str
    """A hash of both."""
    copies: Path
    """The file of images that were copied."""
    may_have_urls: bool


_DIGEST, _NUM_BYTES, _MAY_HAVE_URLS = b"rows", b"image_bytes", b"urls"


def _kept(source: Path, cache_dir: Path, identity: str) -> _Kept:
    for folder in (lambda: cache_dir, spare_folder):
        arrow = folder() / "tables" / f"{identity}.arrow"
        copies = folder() / "embedded" / f"{identity}.images"
        read = partial(_map, copies=copies)
        table = stored(arrow, read)
        if table is None and store(arrow, partial(_write_arrow, source, copies)):
            table = read(arrow)
        if table is not None:
            return table
    problem = f"there is no room for its rows in {spare_folder()}"
    raise DataError("json", problem, "Name a folder with room in data.cache_dir", file=str(source))


def _map(arrow: Path, copies: Path) -> _Kept:
    reader = pa.ipc.open_file(pa.memory_map(str(arrow)))
    _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    table = reader.read_all()
    num_bytes = int(metadata[_NUM_BYTES])
    if num_bytes and (not copies.is_file() or copies.stat().st_size != num_bytes):
        raise ValueError(f"{copies} is not whole")
    may_have_urls = metadata[_MAY_HAVE_URLS] == b"yes"
    return _Kept(table.column("row"), table.column("number"), metadata[_DIGEST].decode(), copies, may_have_urls)


def _write_arrow(source: Path, copies: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with (
        Extraction(source, copies) as extraction,
        pa.OSFile(str(target), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        numbers: list[int] = []
        rows: list[bytes] = []
        may_have_urls = False
        for number, row in _rows(source, extraction):
            digest.update(b"%d %d " % (number, len(row)))
            digest.update(row)
            may_have_urls = may_have_urls or may_hold(row)
            numbers.append(number)
            rows.append(row)
            if len(rows) == _ROWS_PER_CHUNK:
                writer.write_batch(_batch(numbers, rows))
                numbers, rows = [], []
        about = {_DIGEST: digest.hexdigest(), _NUM_BYTES: str(extraction.num_bytes)}
        about[_MAY_HAVE_URLS] = "yes" if may_have_urls else "no"
        writer.write_batch(_batch(numbers, rows), custom_metadata=about)


def _batch(numbers: list[int], rows: list[bytes]) -> pa.RecordBatch:
    return pa.record_batch([of_numbers(numbers, np.int64), of_bytes(rows, pa.large_binary())], schema=_SCHEMA)


def _rows(path: Path, extraction: Extraction) -> Iterator[tuple[int, bytes]]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return ((number, extraction.json_row(row)) for number, row in json_lines(path))
        case ".json":
            return enumerate(map(extraction.json_row, json_array(path)), start=1)
        case ".parquet":
            return enumerate(parquet_rows(path, extraction), start=1)
        case ".arrow":
            return enumerate(arrow_rows(path, extraction), start=1)
        case ".tar":
            return enumerate(tar_rows(path, extraction), start=1)
    problem = f"files ending in {path.suffix!r} are not read"
    remedy = OTHER_SUFFIXES.get(path.suffix.lower(), f"Give one of {', '.join(SUFFIXES)}")
    raise DataError("json", problem, remedy.format(shlex.quote(str(path))), file=str(path))
