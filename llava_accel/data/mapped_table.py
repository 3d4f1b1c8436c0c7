"""The user's files as one memory-mapped table of raw rows, so that ten million records cost no memory.

LLaVA JSON, JSON lines and Parquet are read once into an Arrow file of the cache, keyed by path, inode, size and times of
change; every later start and every rank maps the same file. The time that counts is the ctime: archives and copies may
give two files one size and one mtime, the ctime is the system's.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as parquet

from llava_accel.data.problems import DataError
from llava_accel.data.records import MAX_BYTES
from llava_accel.storage.kept_files import spare_folder, store, stored

_ROWS_PER_CHUNK = 4096  # random access finds a row by division, so every chunk but the last has this many
_BLOCK = 1 << 22  # characters read at once from a JSON array
_SPACE, _SEPARATOR = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
_FORMAT = "3"
_SCHEMA = pa.schema([("number", pa.int64()), ("row", pa.large_binary())])


class Table:
    """Rows of one file as raw JSON bytes: `table[i]` costs no more than the row itself.

    Args:
        path: A .json (an array), .jsonl/.ndjson, or .parquet file.
        cache_dir: Folder for the Arrow file.

    `fingerprint` is a hash of all rows and their numbers, wherever the file is.

    Raises:
        DataError: the file is missing or cannot be read; names file and remedy.
    """

    def __init__(self, path: Path, cache_dir: Path) -> None:
        self.path = path
        self._cache_dir = cache_dir
        if not path.is_file():
            raise DataError("json", f"there is no such file: {path}", "Check data.train and data.eval", file=str(path))
        stat = path.stat()
        times = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        identity = hashlib.sha256(repr((_FORMAT, str(path.resolve()), *times)).encode()).hexdigest()[:20]
        self._rows, self._numbers, self.fingerprint = _kept(path, cache_dir / "tables" / f"{identity}.arrow")

    def __reduce__(self) -> tuple[type["Table"], tuple[Path, Path]]:
        # A worker process maps the file itself; Arrow's own pickle would copy all of it.
        return Table, (self.path, self._cache_dir)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> bytes:
        chunk, place = divmod(index, _ROWS_PER_CHUNK)
        return self._rows.chunk(chunk)[place].as_py()

    def number(self, index: int) -> int:
        """Where the row is in the file: its line, blank ones counted, or its place in the array, from 1."""
        chunk, place = divmod(index, _ROWS_PER_CHUNK)
        return self._numbers.chunk(chunk)[place].as_py()


_Kept = tuple[pa.ChunkedArray, pa.ChunkedArray, str]
_DIGEST = b"rows"


def _kept(source: Path, arrow: Path) -> _Kept:
    """Rows, their numbers, and a hash of both."""
    found = stored(arrow, _map)
    if found is None:
        if not store(arrow, partial(_write_arrow, source)):
            arrow = spare_folder() / arrow.name
            if not store(arrow, partial(_write_arrow, source)):
                raise DataError(
                    "json", f"there is no room for its rows in {arrow.parent}", "Name a folder with room in data.cache_dir",
                    file=str(source),
                )  # fmt: skip
        found = _map(arrow)
    return found


def _map(arrow: Path) -> _Kept:
    reader = pa.ipc.open_file(pa.memory_map(str(arrow)))
    _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    table = reader.read_all()
    return table.column("row"), table.column("number"), metadata[_DIGEST].decode()


def _write_arrow(source: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        numbers: list[int] = []
        rows: list[bytes] = []
        for number, row in _rows(source):
            digest.update(b"%d %d " % (number, len(row)))
            digest.update(row)
            numbers.append(number)
            rows.append(row)
            if len(rows) == _ROWS_PER_CHUNK:
                writer.write_batch(_batch(numbers, rows))
                numbers, rows = [], []
        writer.write_batch(_batch(numbers, rows), custom_metadata={_DIGEST: digest.hexdigest()})


def _batch(numbers: list[int], rows: list[bytes]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(numbers, pa.int64()), pa.array(rows, pa.large_binary())], schema=_SCHEMA)


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".json":
        return enumerate(_json_array(path), start=1)
    raise DataError(
        "json", f"files ending in {path.suffix!r} are not read", "Give .json, .jsonl or .parquet", file=str(path)
    )


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            # A byte order mark is not part of the first record.
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            line = line if len(line) > MAX_BYTES else line.strip()
            if line:
                yield number, line


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long for a record only as much as shows that, never all of it."""
    while line := file.readline(MAX_BYTES + 4):
        end = line
        while len(end) == MAX_BYTES + 4 and not end.endswith(b"\n"):
            end = file.readline(MAX_BYTES + 4)
        yield line


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_CHUNK):
            for row in _as_dicts(batch, number, path):
                number += 1
                yield number, json.dumps(row, ensure_ascii=False, default=str).encode()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"not a readable Parquet file: {' '.join(str(error).split())}"
        raise DataError("json", problem, "Write the file again", file=str(path)) from None


def _as_dicts(batch: pa.RecordBatch, before: int, path: Path) -> list[dict[str, object]]:
    """The rows of a batch, which comes after so many others; DataError for a date that Python has no value for."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        raise
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError) as error:  # a year beyond 9999, a time zone
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            return _as_dicts(batch[:half], before, path) + _as_dicts(batch[half:], before + half, path)
        problem = f"a value cannot be read ({' '.join(str(error).split())})"
        remedy = "Write dates as text, or leave their column out"
        raise DataError("json", problem, remedy, file=str(path), row=before + 1) from None


def _json_array(path: Path) -> Iterator[bytes]:
    """Objects of a top-level array, one at a time and each on one line, whatever the size of the file."""
    decoder = json.JSONDecoder()
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read(_BLOCK).lstrip()
            if not text.startswith("["):
                remedy = "Write [record, ...], or one record a line in .jsonl"
                raise DataError("json", "the file is not a JSON array", remedy, file=str(path))
            place = 1
            while True:
                place = (_SPACE if number == 1 else _SEPARATOR).match(text, place).end()  # pyright: ignore[reportOptionalMemberAccess]  matches ""
                if text.startswith("]", place):
                    break
                try:
                    _, end = decoder.raw_decode(text, place)
                except (ValueError, RecursionError) as error:
                    left, cut = text[place:], _may_be_cut(error, text)
                    if cut and len(left) > MAX_BYTES:
                        problem = f"the record is longer than {MAX_BYTES >> 20} MiB, or a text in it is not closed"
                        remedy = "Write one conversation a record; images are files, named in 'image'"
                        raise DataError("json", problem, remedy, file=str(path), row=number) from None
                    # Doubling keeps the work on a huge record linear.
                    block = file.read(max(_BLOCK, len(left))) if cut else ""
                    if not block:
                        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                        problem = f"not valid JSON ({reason}){'; the file may be cut off' if cut else ''}"
                        raise DataError("json", problem, "Write the file again", file=str(path), row=number) from None
                    text, place = left + block, 0
                    continue
                # Between the tokens of JSON a line break means nothing, and inside them there is none.
                yield text[place:end].replace("\n", " ").replace("\r", " ").encode()
                place, number = end, number + 1
            if (text[place + 1 :] + file.read(_BLOCK)).strip():
                problem = "there is more text after the end of the array"
                raise DataError("json", problem, "Write one array a file", file=str(path))
    except UnicodeDecodeError as error:
        raise DataError("json", f"not UTF-8 ({error})", "Save it as UTF-8", file=str(path)) from None


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether the rest of the file could mend the error; what is wrong far from the end of `text` is simply wrong."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16  # longer than any escape or word
