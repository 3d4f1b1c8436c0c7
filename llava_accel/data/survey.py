"""Reads every record once before the first step: lengths for the order, and everything that is wrong with the data."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Shaped
from torch.utils.data import DataLoader, Dataset

from llava_accel.data.corpus import Corpus
from llava_accel.data.images import check_images
from llava_accel.data.problems import DataError
from llava_accel.storage.atomic import atomic_file

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
    """Tokens, image tokens included; several answers to a record stand behind one prompt."""
    num_targets: Int[np.ndarray, "rows"]
    num_images: Int[np.ndarray, "rows"]
    num_turns: Int[np.ndarray, "rows"]
    image_keys: Int[np.ndarray, "rows"]
    """Equal where records show the same images; 0 without images."""
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
    """Tokenise some rows. Their images are there; whether they can be read is not looked at."""
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
    """Read every record of the corpus, and every set of images that records show once, however many show it.

    Args:
        workers: Processes to read with.
        decode: Decode every image whole; else only its header is read.
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
    errors |= _broken_images(corpus, columns, workers, decode, progress)
    for column in columns.values():
        column[list(errors)] = 0
    num_dropped_turns = int(columns.pop("dropped_turns").sum())
    return Survey(**columns, num_dropped_turns=num_dropped_turns, errors=dict(sorted(errors.items())))


def _broken_images(
    corpus: Corpus,
    columns: dict[str, np.ndarray],
    workers: int,
    decode: bool,
    progress: Callable[[int], None],
) -> dict[int, DataError]:
    (shown,) = np.nonzero(columns["num_images"])
    keys, first, counts = np.unique(columns["image_keys"][shown], return_index=True, return_counts=True)
    order = np.argsort(first)  # that of the data, in which neighbouring images lie side by side on the disk
    keys, rows, counts = keys[order], shown[first][order], counts[order]
    chunks = [range(start, min(start + _CHUNK // 8, len(rows))) for start in range(0, len(rows), _CHUNK // 8)]
    broken: dict[int, DataError] = {}
    reader = _Images(corpus, [rows[chunk.start : chunk.stop].tolist() for chunk in chunks], decode)
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


class _Images(Dataset[dict[int, DataError]]):
    """Index: rows that stand for all with their images -> what is wrong, by place among these rows."""

    def __init__(self, corpus: Corpus, chunks: Sequence[list[int]], decode: bool) -> None:
        self._corpus, self._chunks, self._decode = corpus, chunks, decode

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> dict[int, DataError]:
        errors: dict[int, DataError] = {}
        for place, row in enumerate(self._chunks[number]):
            try:
                check_images(map(Path, self._corpus.encode(row).example.images), self._decode)
            except DataError as error:
                errors[place] = error
        return errors


def _in_parallel(reader: _Records | _Images, workers: int) -> Iterator[Any]:
    workers = workers if len(reader) * _CHUNK > _SMALL else 0
    yield from DataLoader(reader, batch_size=None, num_workers=workers, collate_fn=_as_is)  # pyright: ignore[reportArgumentType]


def _as_is(found: Any) -> Any:
    return found


_FORMAT = 3
_OF_IMAGES = ("missing_image", "broken_image", "unsafe_path")


def cached_survey(corpus: Corpus, key: str, cache_dir: Path, read: Callable[[], Survey]) -> Survey:
    """The survey of an earlier start with the same data and settings, else `read()`, which is then kept.

    Rows whose images were missing or broken are read again: images get mended without a change to the files.

    Args:
        key: Fingerprint of everything besides the files that decides lengths: tokenizer, template, settings.
    """
    path = cache_dir / "surveys" / f"{corpus.fingerprint()}-{key}-{_FORMAT}.arrow"
    if path.exists():
        return _mended(corpus, _load(path))
    _write(read(), path)
    return _load(path)


def _write(found: Survey, path: Path) -> None:
    errors = json.dumps({row: vars(error) for row, error in found.errors.items()})
    batch = pa.record_batch({name: getattr(found, name) for name in COLUMNS})
    batch = batch.replace_schema_metadata({"errors": errors, "num_dropped_turns": str(found.num_dropped_turns)})
    with (
        atomic_file(path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _load(path: Path) -> Survey:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    errors = json.loads(batch.schema.metadata[b"errors"])
    return Survey(
        **{name: batch.column(name).to_numpy(zero_copy_only=True) for name in COLUMNS},
        num_dropped_turns=int(batch.schema.metadata[b"num_dropped_turns"]),
        errors={int(row): DataError(**fields) for row, fields in errors.items()},
    )


def _mended(corpus: Corpus, found: Survey) -> Survey:
    rows = [row for row, error in found.errors.items() if error.kind in _OF_IMAGES]
    if not rows:
        return found
    columns, errors = read_rows(corpus, rows)
    for place, row in enumerate(rows):
        if row not in errors:
            try:
                check_images(map(Path, corpus.encode(row).example.images), whole=True)
            except DataError as error:
                columns[place] = 0
                errors[row] = corpus.locate(error, row)
    arrays = {name: np.array(getattr(found, name)) for name in COLUMNS}  # a copy: files are not changed
    for name, array in arrays.items():
        array[rows] = columns[name]
    others = {row: error for row, error in found.errors.items() if row not in set(rows)}
    return replace(
        found,
        **arrays,
        num_dropped_turns=found.num_dropped_turns + int(columns["dropped_turns"].sum()),
        errors=dict(sorted((others | errors).items())),
    )
