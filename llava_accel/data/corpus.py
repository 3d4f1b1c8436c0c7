"""The files of `data.train` or `data.eval` as one sequence of rows, and the dataset that loaders read."""

import hashlib
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from llava_accel.data.columns import check_columns
from llava_accel.data.examples import Encoded
from llava_accel.data.images import find_image
from llava_accel.data.records import Record, parse_record, read_raw, record_id
from llava_accel.data.row_forms import RowForm
from llava_accel.data.trie import Row, chain
from llava_accel.exceptions import UserError
from llava_accel.sources import hub
from llava_accel.sources.downloads import DOWNLOADS, fetched, is_remote, may_hold
from llava_accel.sources.extraction import with_images
from llava_accel.sources.image_parts import part_of
from llava_accel.sources.mapped_table import Table
from llava_accel.sources.named import Named, files_of
from llava_accel.sources.problems import DataError

_TRIED = 64  # rows that data.reader is tried on first


@dataclass(frozen=True)
class Source:
    """One file: its rows, the folder of its images, and how often its rows occur in an epoch."""

    table: Table
    images: Path
    weight: float = 1.0
    rows: Int[np.ndarray, "rows"] | None = None
    """The rows of the table that are used; None: all."""
    downloads: Path = Path()
    """Folder of images from the network."""
    name: str = ""
    """Its name in the recipe, which several files may share."""

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def raw(self, place: int) -> bytes:
        """A row as JSON."""
        return self.table[self._row(place)]

    def whole(self, place: int) -> bytes:
        """A row as JSON that holds its images, to be written into another file."""
        return with_images(self.raw(place), self.table.files)

    def number(self, place: int) -> int:
        """The number of the row in the file."""
        return self.table.number(self._row(place))

    @property
    def fingerprint(self) -> str:
        """Changes when a row changes, or when other rows are used."""
        if self.rows is None:
            return self.table.fingerprint
        return f"{self.table.fingerprint}+{hashlib.sha256(self.rows.tobytes()).hexdigest()[:20]}"

    def address(self, name: str) -> str:
        """The address of an image that a row names: see `image_parts.py`.

        Raises:
            DataError: it is missing, or lies outside the folder.
        """
        if part_of(name):
            return name
        if is_remote(name):
            return str(fetched(name, self.downloads))
        return str(find_image(self.images, name))

    def _row(self, place: int) -> int:
        return place if self.rows is None else int(self.rows[place])


class Corpus:
    """The rows of all sources under one numbering.

    Args:
        sources: At least one.
        encoder: Turns records into examples: an `Encoder`, or `find_images`.
        form: How rows are read.

    Raises:
        DataError: no row has a column that `form` names.
        UserError: `form.reader` makes something else of a row when it is called again.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Callable[[Record, int, Callable[[str], str]], Encoded],
        form: RowForm = RowForm(),  # noqa: B008  it cannot be changed
    ) -> None:
        self.sources = list(sources)
        self.form = form
        try:
            check_columns((source.raw(row) for source in sources for row in range(len(source))), form.columns)
        except DataError as error:
            raise replace(error, file=", ".join({str(source.table.path): None for source in sources})) from None
        self._encoder = encoder
        self._starts = list(accumulate(map(len, sources), initial=0))
        self.roots = [source.images.resolve() for source in sources]
        """The folder of each source's images, without links."""
        self._root_numbers = [self.roots.index(root) for root in self.roots]
        self.reference: Float[np.ndarray, "rows 2"] | None = None
        """For pairs the log-probability of the chosen and of the rejected answer before training."""
        self._makes_urls = form.reader is not None and self._try_reader(form.reader.name)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def ranges(self) -> list[range]:
        """The rows of each source."""
        return [range(start, stop) for start, stop in pairwise(self._starts)]

    @property
    def weights(self) -> np.ndarray:
        """Weight of every row: [rows]."""
        return np.concatenate([np.full(len(source), source.weight) for source in self.sources])

    def fingerprint(self) -> str:
        """Changes when a row changes, or how it is read, or which files share an image folder; not when files move."""
        pairs = zip(self.sources, self._root_numbers, strict=True)
        text = " ".join(f"{source.fingerprint}:{root}" for source, root in pairs)
        text += f" {self.form}" if self.form != RowForm() else ""
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def image_name(self, index: int, file: str) -> str:
        """A name for a record's image that stays when files and folders move; for one inside a file, its content's key."""
        if part := part_of(file):
            return part.key
        number = bisect_right(self._starts, index) - 1
        if file.startswith(f"{self.sources[number].downloads}/"):
            return f"{DOWNLOADS}/{os.path.basename(file)}"
        root = str(self.sources[number].images)
        name = file.removeprefix(f"{root}/")
        return f"{self._root_numbers[number]}/{os.path.relpath(file, root) if name == file else name}"

    def image_file(self, name: str) -> Path:
        """The file of a name from `image_name`, for images that are files of their own."""
        number, _, rest = name.partition("/")
        if number == DOWNLOADS:
            return self.sources[0].downloads / rest
        return self.roots[int(number)] / rest

    def root(self, index: int) -> Path:
        """The folder that the record's image names are relative to."""
        return self._find(index)[0].images

    @property
    def may_have_urls(self) -> bool:
        """Whether a text of any row may begin as a URL."""
        return self._makes_urls or any(source.table.may_have_urls for source in self.sources)

    def rows_with_urls(self) -> Iterator[int]:
        """Rows in which a text may begin as a URL; a file that cannot have any is not read."""
        for start, source in zip(self._starts, self.sources, strict=False):
            rows = range(len(source)) if source.table.may_have_urls or self._makes_urls else ()
            yield from (start + row for row in rows if self._makes_urls or may_hold(source.raw(row)))

    def record(self, index: int) -> Record:
        """The checked record; DataError with file, row and id if it cannot be used."""
        source, row = self._find(index)
        try:
            record = parse_record(source.raw(row), source.number(row), self.form, source.table.files)
            record.check_answers()
            return record
        except DataError as error:
            raise self.locate(error, index) from None

    def encode(self, index: int) -> Encoded:
        """The record as tokens and targets; DataError with file, row and id if it cannot be used."""
        record = self.record(index)
        try:
            return self._encoder(record, index, self._find(index)[0].address)
        except DataError as error:
            raise self.locate(error, index) from None

    def reference_of(self, index: int) -> list[float]:
        """The row's part of `reference`: zeros until that is known, empty if rows are not pairs.

        Raises:
            DataError: it was computed without this row, which could not be read then.
        """
        if not self.form.pairs:
            return []
        log_probs = [0.0, 0.0] if self.reference is None else self.reference[index].tolist()
        if math.isnan(log_probs[0]):
            problem = "it could not be read when the run began"
            raise DataError(
                "pair", problem, 'Correct it, and start the run from the beginning with run.resume = "never"'
            )
        return log_probs

    def image_files(self, index: int) -> list[str]:
        """The addresses of the record's images.

        Raises:
            DataError: see `Source.address`.
        """
        return list(map(self._find(index)[0].address, self.record(index).images))

    def locate(self, error: DataError, index: int) -> DataError:
        """The error with the file, row and id of the record that it is about."""
        if error.file:
            return error
        source, row = self._find(index)
        return error.at(str(source.table.path), source.number(row), record_id(source.raw(row), self.form))

    def place(self, index: int) -> str:
        """File and row of a record as one text, for messages."""
        return "{}, row {}".format(*self.file_and_row(index))

    def file_and_row(self, index: int) -> tuple[str, int]:
        """File and row of a record."""
        source, row = self._find(index)
        return str(source.table.path), source.number(row)

    def row(self, index: int) -> Row:
        """The record as a row of one chain."""
        return chain(self.encode(index).example)

    def _try_reader(self, name: str) -> bool:
        """Whether data.reader makes URLs of images, tried on the first rows; UserError if a second call differs."""
        made = [(self._made(row), self._made(row)) for row in range(min(_TRIED, len(self)))]
        for row, (once, again) in enumerate(made):
            if once != again:
                raise UserError(
                    f"data.reader: {name} returned something else for {self.place(row)} when it was called again. Rows are "
                    "read often, in any order and in several processes: make what it returns depend on the row alone"
                )
        return any(may_hold(once) for once, _ in made)

    def _made(self, index: int) -> bytes:
        source, row = self._find(index)
        try:
            return read_raw(source.raw(row), self.form, source.table.files)
        except DataError as error:  # reported with all others when all rows are read
            return str(error).encode("utf-8", "surrogatepass")

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._starts, index) - 1
        return self.sources[number], index - self._starts[number]


def open_sources(entries: Sequence[Named], cache_dir: Path, unreadable: list[DataError] | None = None) -> list[Source]:
    """Open everything that a recipe names.

    Args:
        entries: See `Named`; each may name many files.
        unreadable: Collects the errors of files that cannot be opened, and the rest is opened nevertheless. By default
            the first error is raised.

    Raises:
        DataError: a path does not exist, holds no data file, or is not readable.
    """
    sources: list[Source] = []

    @contextmanager
    def errors_collected() -> Iterator[None]:
        try:
            yield
        except DataError as error:
            if unreadable is None:
                raise
            unreadable.append(error)

    for named in entries:
        files, opened = list[Path](), list[Source]()
        with errors_collected():
            files = files_of(named)
        for file in files:
            with errors_collected():
                opened.append(_open(file, named, cache_dir))
        sources += _limited(opened, named.limit)
    with errors_collected():
        if sources and not any(map(len, sources)):
            raise DataError("empty", "the file has no records", "Check the file", file=str(sources[0].table.path))
    return [source for source in sources if len(source)]


def _open(file: Path, named: Named, cache_dir: Path) -> Source:
    root = Path(named.images) if named.images else _own_root(file, named)
    table = Table(file, cache_dir)
    if not root.is_dir():
        raise DataError("missing_image", f"data.images: there is no folder {root}", "Check the path", file=str(file))
    return Source(table, root, named.weight, downloads=cache_dir / DOWNLOADS, name=named.name)


def _own_root(file: Path, named: Named) -> Path:
    """The folder that image names are relative to if the recipe does not name one."""
    if Path(named.path).is_dir():
        return Path(named.path)  # whose files may lie elsewhere, if it is a data set of the hub's form
    return hub.cache_root() if hub.is_name(named.path) and not file.is_relative_to(named.path) else file.parent


def _limited(sources: list[Source], limit: int) -> list[Source]:
    """At most `limit` rows of all sources together, spread evenly, since files are often sorted."""
    total = sum(map(len, sources))
    if not limit or total <= limit:
        return sources
    taken = np.arange(limit) * total // limit
    ends = np.cumsum(list(map(len, sources)))
    return [
        replace(source, rows=taken[(taken >= end - len(source)) & (taken < end)] - (end - len(source)))
        for source, end in zip(sources, ends.tolist(), strict=True)
    ]
