"""The rows of Parquet and Arrow files, as published on the Hugging Face hub and as `datasets` saves them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from llava_accel.sources.extraction import Extraction, has_bytes, rows_of
from llava_accel.sources.json_rows import FETCH, GIT_POINTER
from llava_accel.sources.problems import DataError

_ROWS, _ROWS_WITH_IMAGES = 4096, 32  # in memory at once
_Classes = Mapping[str, Sequence[str]]
"""Column -> the names of its classes, which are stored as numbers from 0."""


def parquet_rows(path: Path, extraction: Extraction) -> Iterator[bytes]:
    """Each row as JSON; images in it are copied to the cache, since Parquet keeps them compressed.

    Raises:
        DataError: the file is not Parquet, or a value in it cannot be read.
    """
    with _readable(path, "Parquet"):
        file = parquet.ParquetFile(path)
        size = _ROWS_WITH_IMAGES if has_bytes(file.schema_arrow) else _ROWS
        classes, number = _classes(file.schema_arrow), 0
        for batch in file.iter_batches(batch_size=size):
            for row in _values(batch, number, path):
                yield extraction.row(_with_names(row, classes))
            number += batch.num_rows


def arrow_rows(path: Path, extraction: Extraction) -> Iterator[bytes]:
    """Each row as JSON; images stay in the file, which is mapped, unless it is compressed.

    Raises:
        DataError: the file is not Arrow, or a value in it cannot be read.
    """
    with _readable(path, "Arrow"), pa.memory_map(str(path)) as mapped:
        whole = mapped.read_buffer(mapped.size())
        number = 0
        for batch in _batches(whole):
            classes = _classes(batch.schema)
            for start in range(0, batch.num_rows, _ROWS_WITH_IMAGES):
                for row in _values(batch[start : start + _ROWS_WITH_IMAGES], number + start, path):
                    yield extraction.row(_with_names(row, classes), whole)
            number += batch.num_rows


def _batches(whole: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """The batches of a file in either of Arrow's forms; `datasets` writes streams."""
    try:
        reader = pa.ipc.open_stream(whole)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(whole)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
        return
    yield from reader


def _classes(schema: pa.Schema) -> _Classes:
    """The columns that `datasets` calls a ClassLabel: their numbers mean names, which stand in the file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
        classes = {name: list(map(str, each["names"])) for name, each in features if each.get("_type") == "ClassLabel"}
    except (KeyError, AttributeError, TypeError, ValueError, RecursionError):  # the file is not of `datasets`
        return {}
    # Where the names are the numbers themselves, these are places in a list of choices.
    return {name: names for name, names in classes.items() if names != [str(place) for place in range(len(names))]}


def _with_names(row: dict[str, object], classes: _Classes) -> dict[str, object]:
    """The row with names of classes in place of their numbers; the -1 of a row without a class becomes null."""
    for column, names in classes.items():
        if isinstance(number := row.get(column), int):
            row[column] = names[number] if 0 <= number < len(names) else None
    return row


@contextmanager
def _readable(path: Path, form: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"not a readable {form} file: {' '.join(str(error).split())}"
        with path.open("rb") as file:
            is_pointer = file.read(len(GIT_POINTER)) == GIT_POINTER
        raise DataError("json", problem, FETCH if is_pointer else "Write the file again", file=str(path)) from None


def _values(batch: pa.RecordBatch, before: int, path: Path) -> list[dict[str, object]]:
    """The rows of a batch that follows `before` other rows; DataError for a value, such as a date, that Python lacks."""
    try:
        return list(rows_of(batch))
    except UnicodeDecodeError:
        raise
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError) as error:  # a year beyond 9999, a time zone
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            return _values(batch[:half], before, path) + _values(batch[half:], before + half, path)
        problem = f"a value cannot be read ({' '.join(str(error).split())})"
        remedy = "Write dates as text, or leave their column out"
        raise DataError("json", problem, remedy, file=str(path), row=before + 1) from None
