"""Reads every record and image once before the first step: lengths for the order, what is wrong, and a cache of both."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Shaped
from torch.utils.data import DataLoader

from llava_accel.data.corpus import Corpus
from llava_accel.data.examples import Encoded
from llava_accel.data.images import check_images
from llava_accel.data.loader import worker_start
from llava_accel.sources.problems import DataError
from llava_accel.storage.kept_files import store, stored

_CHUNK = 256  # records a worker reads before it reports
_SMALL = 4 * _CHUNK  # below this, starting workers costs more than it saves
COLUMNS = dict.fromkeys(("lengths", "num_targets", "num_images", "num_turns"), np.int32) | dict.fromkeys(
    ("image_keys", "record_keys", "answer_keys"), np.int64
)
"""What is kept of each row: few bytes, as there may be ten million rows."""
_READ = np.dtype([*COLUMNS.items(), ("dropped_turns", np.int32), ("unpaired_turns", np.int32)])


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of the data. Arrays have one entry for each row; 0 where it cannot be used."""

    lengths: Int[np.ndarray, "rows"]
    """Tokens, image tokens included; several answers to a record share one prompt."""
    num_targets: Int[np.ndarray, "rows"]
    num_images: Int[np.ndarray, "rows"]
    num_turns: Int[np.ndarray, "rows"]
    image_keys: Int[np.ndarray, "rows"]
    """Equal where records show the same images; 0 without images."""
    record_keys: Int[np.ndarray, "rows"]
    """Equal where images and texts are the same."""
    answer_keys: Int[np.ndarray, "rows"]
    """Equal where the last answer is the same."""
    num_dropped_turns: int
    num_unpaired_turns: int = 0
    """Leading answers and trailing questions, see `Record.dropped_turns`."""
    errors: dict[int, DataError]
    """Row -> why it cannot be used."""
    traits: Counter[str] = field(default_factory=Counter)
    """Of the images: see `check_images`. Known where they were decoded, and not kept."""

    @property
    def usable(self) -> Int[np.ndarray, "usable"]:
        """Rows that can be trained on."""
        return np.nonzero(self.lengths)[0]

    def errors_by_kind(self) -> Counter[str]:
        """Number of unusable rows by kind of error."""
        return Counter(error.kind for error in self.errors.values())


def _read_rows(corpus: Corpus, rows: Sequence[int]) -> tuple[Shaped[np.ndarray, "rows"], dict[int, DataError]]:
    """Tokenise some rows, and find their images without opening them.

    Returns:
        Their `COLUMNS`, "dropped_turns" and "unpaired_turns", and by row what is wrong with those that cannot be used.
    """
    columns = np.zeros(len(rows), dtype=_READ)
    errors: dict[int, DataError] = {}
    for place, row in enumerate(rows):
        try:
            encoded = corpus.encode(row)
        except DataError as error:
            errors[row] = error
            continue
        columns[place] = _columns(corpus, row, encoded)
    return columns, errors


def _columns(corpus: Corpus, row: int, encoded: Encoded) -> tuple[int, ...]:
    images = [corpus.image_name(row, image) for image in encoded.example.images]
    examples, record = encoded.examples, encoded.record
    return (
        sum(len(example.input_ids) - example.num_repeated for example in examples),
        sum(example.num_targets for example in examples),
        len(images),
        encoded.num_turns,
        _key(*images) if images else 0,
        _key(*images, *(text for turn in record.turns for text in (turn.role, turn.text)), str(record.answers)),
        _key(record.turns[-1].text.strip()),
        encoded.dropped_turns,
        record.dropped_turns,
    )


def _key(*texts: str) -> int:
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(joined).digest()[:8], signed=True)


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
    for rows, (read, wrong) in zip(chunks, _in_parallel(partial(_read_rows, corpus), chunks, workers), strict=True):
        for name, column in columns.items():
            column[rows.start : rows.stop] = read[name]
        errors |= wrong
        progress(int(np.count_nonzero(read["num_images"] == 0)))
    broken, traits = _read_images(corpus, columns, workers, decode, progress)
    errors |= broken
    for column in columns.values():
        column[list(errors)] = 0
    dropped, unpaired = (int(columns.pop(name).sum()) for name in ("dropped_turns", "unpaired_turns"))
    return Survey(
        **columns,
        num_dropped_turns=dropped,
        num_unpaired_turns=unpaired,
        errors=dict(sorted(errors.items())),
        traits=traits,
    )


def _read_images(
    corpus: Corpus, columns: dict[str, np.ndarray], workers: int, decode: bool, progress: Callable[[int], None]
) -> tuple[dict[int, DataError], Counter[str]]:
    (shown,) = np.nonzero(columns["num_images"])
    _, first, counts = np.unique(columns["image_keys"][shown], return_index=True, return_counts=True)
    order = np.argsort(first)  # that of the data, in which neighbouring images are neighbours on the disk
    rows, counts = shown[first][order].tolist(), counts[order]
    chunks = [rows[start : start + _CHUNK // 8] for start in range(0, len(rows), _CHUNK // 8)]
    broken: dict[int, DataError] = {}
    traits: Counter[str] = Counter()
    done = 0
    read = partial(_check_rows, corpus, decode=decode)
    for chunk, (errors, seen) in zip(chunks, _in_parallel(read, chunks, workers), strict=True):
        traits += seen
        broken |= {int(columns["image_keys"][row]): error for row, error in errors.items()}
        progress(int(counts[done : done + len(chunk)].sum()))
        done += len(chunk)
    unusable = shown[np.isin(columns["image_keys"][shown], list(broken))].tolist() if broken else []
    return {row: corpus.locate(broken[int(columns["image_keys"][row])], row) for row in unusable}, traits


def _check_rows(corpus: Corpus, rows: Sequence[int], decode: bool) -> tuple[dict[int, DataError], Counter[str]]:
    """Row -> what is wrong with its images; and the traits of the others."""
    errors: dict[int, DataError] = {}
    traits: Counter[str] = Counter()
    for row in rows:
        try:
            traits += check_images(corpus.encode(row).example.images, decode)
        except DataError as error:
            errors[row] = error
    return errors, traits


def _in_parallel(read: Callable[[Any], Any], chunks: Sequence[Any], workers: int) -> Iterator[Any]:
    """What `read` makes of each chunk, in order; by worker processes where there are many."""
    workers = workers if len(chunks) * _CHUNK > _SMALL else 0
    yield from DataLoader(
        chunks,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=workers,
        collate_fn=read,
        worker_init_fn=worker_start(workers),
    )


_FORMAT = 6
_OF_IMAGES = ("missing_image", "broken_image", "unsafe_path")


def cached_survey(corpus: Corpus, key: str, cache_dir: Path, read: Callable[[], Survey]) -> Survey:
    """The survey of an earlier start with the same data and settings, else `read()`, which is then kept.

    Rows whose images were missing or broken are read again: images get mended without a change to the files.

    Args:
        key: Fingerprint of everything besides the files that decides lengths: tokenizer, template, settings.
    """
    files = hashlib.sha256(repr([str(source.table.path) for source in corpus.sources]).encode()).hexdigest()[:10]
    path = cache_dir / "surveys" / f"{corpus.fingerprint()}-{files}-{key}-{_FORMAT}.arrow"  # errors name files
    known = stored(path, _load)
    if known is not None:
        return _mended(corpus, known)
    found = read()
    return _load(path) if store(path, partial(_write, found)) else found


def _write(survey: Survey, path: Path) -> None:
    errors = json.dumps({row: vars(error) for row, error in survey.errors.items()})
    batch = pa.record_batch({name: getattr(survey, name) for name in COLUMNS})
    counts = {name: str(getattr(survey, name)) for name in ("num_dropped_turns", "num_unpaired_turns")}
    batch = batch.replace_schema_metadata({"errors": errors, **counts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _load(path: Path) -> Survey:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    errors = json.loads(batch.schema.metadata[b"errors"])
    return Survey(
        **{name: batch.column(name).to_numpy(zero_copy_only=True) for name in COLUMNS},
        num_dropped_turns=int(batch.schema.metadata[b"num_dropped_turns"]),
        num_unpaired_turns=int(batch.schema.metadata[b"num_unpaired_turns"]),
        errors={int(row): DataError(**fields) for row, fields in errors.items()},
    )


def _mended(corpus: Corpus, survey: Survey) -> Survey:
    rows = [row for row, error in survey.errors.items() if error.kind in _OF_IMAGES]
    if not rows:
        return survey
    columns, errors = _read_rows(corpus, rows)
    broken, _ = _check_rows(corpus, [row for row in rows if row not in errors], decode=True)
    errors |= {row: corpus.locate(error, row) for row, error in broken.items()}
    columns[[row in broken for row in rows]] = 0
    arrays = {name: np.array(getattr(survey, name)) for name in COLUMNS}  # a copy: files are not changed
    for name, array in arrays.items():
        array[rows] = columns[name]
    others = {row: error for row, error in survey.errors.items() if row not in set(rows)}
    return replace(
        survey,
        **arrays,
        num_dropped_turns=survey.num_dropped_turns + int(columns["dropped_turns"].sum()),
        num_unpaired_turns=survey.num_unpaired_turns + int(columns["unpaired_turns"].sum()),
        errors=dict(sorted((others | errors).items())),
    )
