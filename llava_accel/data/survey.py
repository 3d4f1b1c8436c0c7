"""Reads every record once before the first step: lengths for the order, and everything that is wrong with the data."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from torch.utils.data import DataLoader, Dataset

from llava_accel.data.corpus import Corpus
from llava_accel.data.images import check_pictures
from llava_accel.data.problems import DataError

_CHUNK = 256  # records a worker reads before it reports
_SMALL = 4 * _CHUNK  # below this, starting workers costs more than it saves
COLUMNS = {
    "lengths": np.int32,
    "num_targets": np.int32,
    "num_images": np.int32,
    "num_turns": np.int32,
    "image_keys": np.int64,
}
"""What is kept of each row: few bytes, as there may be ten million."""
_READ = np.dtype([*COLUMNS.items(), ("dropped_turns", np.int32)])


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What reading the data found. Arrays have one entry for each row; 0 where it cannot be used."""

    lengths: Int[np.ndarray, "rows"]
    """Tokens, picture tokens included; several answers to a record stand behind one prompt."""
    num_targets: Int[np.ndarray, "rows"]
    num_images: Int[np.ndarray, "rows"]
    num_turns: Int[np.ndarray, "rows"]
    image_keys: Int[np.ndarray, "rows"]
    """Equal where records show the same pictures; 0 without pictures."""
    num_dropped_turns: int
    errors: dict[int, DataError]
    """Row -> why it cannot be used."""

    @property
    def usable(self) -> Int[np.ndarray, "usable"]:
        """Rows that can be trained on."""
        return np.nonzero(self.lengths)[0]

    def errors_by_kind(self) -> Counter[str]:
        """Number of unusable rows by kind of error."""
        return Counter(error.kind for error in self.errors.values())


Found = tuple[Shaped[np.ndarray, "rows"], dict[int, DataError]]
"""Of some rows: their `COLUMNS` and "dropped_turns", and what is wrong with those that cannot be used."""


def read_rows(corpus: Corpus, rows: Sequence[int]) -> Found:
    """Tokenise some rows. Their pictures are there; whether they can be read is not looked at."""
    columns = np.zeros(len(rows), dtype=_READ)
    errors: dict[int, DataError] = {}
    for place, row in enumerate(rows):
        try:
            encoded = corpus.encode(row)
        except DataError as error:
            errors[row] = error
            continue
        images, examples = encoded.example.images, encoded.examples
        columns[place] = (
            sum(len(example.input_ids) - example.num_repeated for example in examples),
            sum(example.num_targets for example in examples),
            len(images),
            encoded.num_turns,
            _image_key(images),
            encoded.dropped_turns,
        )
    return columns, errors


def _image_key(images: tuple[str, ...]) -> int:
    names = "\0".join(images).encode()
    return int.from_bytes(hashlib.sha256(names).digest()[:8], signed=True) if images else 0


def survey(corpus: Corpus, *, workers: int, decode: bool, progress: Callable[[int], None] = lambda _: None) -> Survey:
    """Read every record of the corpus, and every set of pictures that records show once, however many show it.

    Args:
        workers: Processes to read with.
        decode: Decode every picture whole; else only its header is read.
        progress: Called with the number of records that are done since the last call.
    """
    columns = {name: np.zeros(len(corpus), dtype=_READ[name]) for name in _READ.names or ()}
    errors: dict[int, DataError] = {}
    chunks = [range(start, min(start + _CHUNK, len(corpus))) for start in range(0, len(corpus), _CHUNK)]
    for rows, (found, bad) in zip(chunks, _in_parallel(_Records(corpus, chunks), workers), strict=True):
        for name, column in columns.items():
            column[rows.start : rows.stop] = found[name]
        errors |= bad
        progress(int(np.count_nonzero(found["num_images"] == 0)))
    errors |= _broken_pictures(corpus, columns, workers, decode, progress)
    for column in columns.values():
        column[list(errors)] = 0
    num_dropped_turns = int(columns.pop("dropped_turns").sum())
    return Survey(**columns, num_dropped_turns=num_dropped_turns, errors=dict(sorted(errors.items())))


def _broken_pictures(
    corpus: Corpus,
    columns: dict[str, np.ndarray],
    workers: int,
    decode: bool,
    progress: Callable[[int], None],
) -> dict[int, DataError]:
    (shown,) = np.nonzero(columns["num_images"])
    keys, first, counts = np.unique(columns["image_keys"][shown], return_index=True, return_counts=True)
    order = np.argsort(first)  # that of the data, in which neighbouring pictures lie side by side on the disk
    keys, rows, counts = keys[order], shown[first][order], counts[order]
    chunks = [range(start, min(start + _CHUNK // 8, len(rows))) for start in range(0, len(rows), _CHUNK // 8)]
    broken: dict[int, DataError] = {}
    reader = _Pictures(corpus, [rows[chunk.start : chunk.stop].tolist() for chunk in chunks], decode)
    for chunk, found in zip(chunks, _in_parallel(reader, workers), strict=True):
        broken |= {int(keys[chunk.start + place]): error for place, error in found.items()}
        progress(int(counts[chunk.start : chunk.stop].sum()))
    bad = shown[np.isin(columns["image_keys"][shown], list(broken))].tolist() if broken else []
    return {row: corpus.locate(broken[int(columns["image_keys"][row])], row) for row in bad}


class _Records(Dataset[Found]):
    def __init__(self, corpus: Corpus, chunks: Sequence[range]) -> None:
        self._corpus, self._chunks = corpus, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> Found:
        return read_rows(self._corpus, self._chunks[number])


class _Pictures(Dataset[dict[int, DataError]]):
    """Index: rows that stand for all with their pictures -> what is wrong, by place among these rows."""

    def __init__(self, corpus: Corpus, chunks: Sequence[list[int]], decode: bool) -> None:
        self._corpus, self._chunks, self._decode = corpus, chunks, decode

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> dict[int, DataError]:
        errors: dict[int, DataError] = {}
        for place, row in enumerate(self._chunks[number]):
            try:
                check_pictures(map(Path, self._corpus.encode(row).example.images), self._decode)
            except DataError as error:
                errors[place] = error
        return errors


def _in_parallel(reader: _Records | _Pictures, workers: int) -> Iterator[Any]:
    workers = workers if len(reader) * _CHUNK > _SMALL else 0
    yield from DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_as_is)  # pyright: ignore[reportArgumentType]


def _as_is(found: Any) -> Any:
    return found
