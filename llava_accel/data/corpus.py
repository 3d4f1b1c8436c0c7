"""The files of `data.train` or `data.eval` as one sequence of rows, and the dataset that loaders read."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from llava_accel.data.examples import Encoded
from llava_accel.data.mapped_table import Table
from llava_accel.data.problems import DataError
from llava_accel.data.records import Record, parse_record, record_id
from llava_accel.data.trie import Row, chain

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Source:
    """One file: its rows, the folder of its images, and how often its rows occur in an epoch."""

    table: Table
    images: Path
    weight: float = 1.0


class Corpus:
    """The rows of all sources under one numbering.

    Args:
        sources: At least one.
        encoder: Turns records into examples: an `Encoder`, or `find_images`.
    """

    def __init__(self, sources: Sequence[Source], encoder: Callable[[Record, int, Path], Encoded]) -> None:
        self.sources = list(sources)
        self._encoder = encoder
        self._starts = list(accumulate((len(source.table) for source in sources), initial=0))
        self.roots = [source.images.resolve() for source in sources]
        """The folder of each source's images, without links."""
        self._root_numbers = [self.roots.index(root) for root in self.roots]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def ranges(self) -> list[range]:
        """The rows of each source."""
        return [range(start, stop) for start, stop in pairwise(self._starts)]

    @property
    def weights(self) -> np.ndarray:
        """Weight of every row: [rows]."""
        return np.concatenate([np.full(len(source.table), source.weight) for source in self.sources])

    def fingerprint(self) -> str:
        """Changes when a row does, or which files share a folder of images; not when files or folders move."""
        pairs = zip(self.sources, self._root_numbers, strict=True)
        text = " ".join(f"{source.table.fingerprint}:{root}" for source, root in pairs)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def image_name(self, index: int, file: str) -> str:
        """A name for an image file of a record that stays when the folder of images moves."""
        number = bisect_right(self._starts, index) - 1
        root = str(self.sources[number].images)
        name = file.removeprefix(f"{root}/")
        return f"{self._root_numbers[number]}/{os.path.relpath(file, root) if name == file else name}"

    def image_file(self, name: str) -> Path:
        """The file that `image_name` has named."""
        number, _, rest = name.partition("/")
        return self.roots[int(number)] / rest

    def root(self, index: int) -> Path:
        """The folder that the record's image names are relative to."""
        return self._find(index)[0].images

    def raw(self, index: int) -> bytes:
        """The row as JSON."""
        source, row = self._find(index)
        return source.table[row]

    def record(self, index: int) -> Record:
        """The checked record; DataError with file, row and id if it cannot be used."""
        source, row = self._find(index)
        try:
            record = parse_record(source.table[row], source.table.number(row))
            record.check_answers()
            return record
        except DataError as error:
            raise self.locate(error, index) from None

    def encode(self, index: int) -> Encoded:
        """The record as tokens and targets; DataError with file, row and id if it cannot be used."""
        record = self.record(index)
        try:
            return self._encoder(record, index, self.root(index))
        except DataError as error:
            raise self.locate(error, index) from None

    def image_files(self, index: int) -> list[Path]:
        """The record's image files."""
        return [self.root(index) / name for name in self.record(index).images]

    def locate(self, error: DataError, index: int) -> DataError:
        """The error with the file, row and id of the record that it is about."""
        if error.file:
            return error
        source, row = self._find(index)
        return error.at(str(source.table.path), source.table.number(row), record_id(source.table[row]))

    def place(self, index: int) -> str:
        """File and row of a record, for messages."""
        source, row = self._find(index)
        return f"{source.table.path}, row {source.table.number(row)}"

    def row(self, index: int) -> Row:
        """The record as a row of one chain."""
        return chain(self.encode(index).example)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


def open_sources(
    entries: Sequence[tuple[str, str, float]], cache_dir: Path, unreadable: list[DataError] | None = None
) -> list[Source]:
    """Open files and folders of files.

    Args:
        entries: (path, folder of images or "" for the file's own folder, weight).
        unreadable: Takes the errors of what cannot be opened, and the rest is opened nevertheless. By default the
            first one is raised.

    Raises:
        DataError: a path does not exist, holds no data file, or is not readable.
    """
    sources: list[Source] = []
    for name, images, weight in entries:
        for file in _files(Path(name)) or [Path(name)]:
            try:
                sources.append(_open(file, images, weight, cache_dir))
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(error)
    if sources and not any(len(source.table) for source in sources):
        error = DataError("empty", "the file has no records", "Check the file", file=str(sources[0].table.path))
        if unreadable is None:
            raise error
        unreadable.append(error)
    return [source for source in sources if len(source.table)]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else []


def _open(file: Path, images: str, weight: float, cache_dir: Path) -> Source:
    if file.is_dir():
        raise DataError("json", f"the folder {file} holds no data file", f"Expected one of {', '.join(_SUFFIXES)}")
    root = Path(images) if images else file.parent
    table = Table(file, cache_dir)
    if not root.is_dir():
        raise DataError("missing_image", f"data.images: there is no folder {root}", "Check the path", file=str(file))
    return Source(table, root, weight)
