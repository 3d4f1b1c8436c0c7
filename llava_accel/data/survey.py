"""Reads every record and image once before the first step: finds lengths for the order and errors, and caches both."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Shaped
from torch.utils.data import DataLoader

from llava_accel.data.conversation import IMAGE
from llava_accel.data.corpus import Corpus
from llava_accel.data.examples import Encoded
from llava_accel.data.image_digests import content_key
from llava_accel.data.images import check_images
from llava_accel.data.loader import worker_start
from llava_accel.data.records import Record
from llava_accel.sources.problems import DataError
from llava_accel.storage.arrow_columns import of_numbers
from llava_accel.storage.kept_files import store, stored

_CHUNK = 256  # records a worker reads before it reports
_SMALL = 4 * _CHUNK  # below this, starting workers costs more than it saves
COLUMNS = dict.fromkeys(("lengths", "num_targets", "num_images", "num_tiles", "num_turns"), np.int32) | dict.fromkeys(
    ("image_keys", "record_keys", "answer_keys", "question_keys", "id_keys"), np.int64
)
"""The fields that are kept for each row: few bytes, as there may be ten million rows."""
_COUNTS = ("num_dropped_turns", "num_unpaired_turns", "num_vanished", "num_ignored")
"""The fields that are kept as a sum over all rows."""
_READ = np.dtype([*COLUMNS.items(), *((name, np.int32) for name in _COUNTS)])
_NOTHING = (0,) * (len(COLUMNS) + len(_COUNTS))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The facts about the data. Arrays have one entry for each row, 0 if it cannot be used."""

    lengths: Int[np.ndarray, "rows"]
    """Tokens, image tokens included; several answers to a record share one prompt."""
    num_targets: Int[np.ndarray, "rows"]
    num_images: Int[np.ndarray, "rows"]
    num_tiles: Int[np.ndarray, "rows"]
    """Tiles of a record's images that the vision tower sees, whole images included."""
    num_turns: Int[np.ndarray, "rows"]
    image_keys: Int[np.ndarray, "rows"]
    """Equal where records show the same images; 0 without images."""
    record_keys: Int[np.ndarray, "rows"]
    """Equal where images and texts are the same."""
    answer_keys: Int[np.ndarray, "rows"]
    """Equal where the last answer is the same."""
    question_keys: Int[np.ndarray, "rows"]
    """Equal where the texts of all questions are the same, images aside."""
    id_keys: Int[np.ndarray, "rows"]
    """Equal where the id is the same."""
    num_dropped_turns: int
    num_unpaired_turns: int = 0
    """Leading answers and trailing questions, see `Record.dropped_turns`."""
    num_vanished: int = 0
    """Images whose tiles leave no token: see `ImageView.has_vanished`."""
    num_ignored: int = 0
    """Rejected answers that were not read, as only chosen ones are learned."""
    errors: dict[int, DataError]
    """Row -> why it cannot be used."""
    traits: Counter[str] = field(default_factory=Counter)
    """Traits of the images: see `check_images`. Known if they were decoded. Like all fields below, not cached."""
    contents: Int[np.ndarray, "files 2"] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """The image key, and the `content_key` of a file, for each file of each different set of images."""
    mentions: Counter[str] = field(default_factory=Counter)
    """How many records hold each of the texts that were `watched`."""

    @property
    def usable(self) -> Int[np.ndarray, "usable"]:
        """Rows that can be trained on."""
        return np.nonzero(self.lengths)[0]

    def errors_by_kind(self) -> Counter[str]:
        """Number of unusable rows by kind of error."""
        return Counter(error.kind for error in self.errors.values())


@dataclass(frozen=True, slots=True)
class _Rows:
    """The result of reading some rows."""

    columns: Shaped[np.ndarray, "rows"]
    """See `_READ`."""
    errors: dict[int, DataError]
    """Row -> why it cannot be used."""
    mentions: Counter[str]


def _read_rows(corpus: Corpus, rows: Sequence[int], watched: re.Pattern[str] | None = None) -> _Rows:
    """Tokenise some rows, and find their images without opening them."""
    columns: list[tuple[int, ...]] = []
    errors: dict[int, DataError] = {}
    mentions: Counter[str] = Counter()
    for row in rows:
        try:
            encoded = corpus.encode(row)
        except DataError as error:
            errors[row] = error
            columns.append(_NOTHING)
            continue
        images = [corpus.image_name(row, view.file) for view in encoded.example.images]
        texts = _texts(encoded.record)
        columns.append(_columns(encoded, images, texts))
        if watched and watched.search(texts):
            mentions.update({*watched.findall(texts)})
    return _Rows(np.array(columns, dtype=_READ), errors, mentions)


def _columns(encoded: Encoded, images: Sequence[str], texts: str) -> tuple[int, ...]:
    record = encoded.record
    length = num_targets = 0
    for example in encoded.examples:
        length += len(example.input_ids) - example.num_repeated
        num_targets += example.num_targets
    return (
        length,
        num_targets,
        len(images),
        encoded.example.num_tiles,
        encoded.num_turns,
        text_key("\0".join(images)) if images else 0,
        text_key("\0".join((*images, texts))),
        text_key(record.turns[-1].text.strip()),
        text_key("\0".join([turn.text.replace(IMAGE, "").strip() for turn in record.turns if turn.role == "user"])),
        text_key(record.id),
        encoded.dropped_turns,
        record.dropped_turns,
        sum(view.has_vanished for view in encoded.example.images),
        record.is_pair and record.rejected is None,
    )


def _texts(record: Record) -> str:
    """All texts of a record after the role that speaks first: from there on roles alternate."""
    texts = [record.turns[0].role, *[turn.text for turn in record.turns], *filter(None, [record.rejected])]
    return "\0".join(texts if not record.answers else [*texts, *[f"{text}\0{count}" for text, count in record.answers]])


def text_key(text: str) -> int:
    """A number that is equal for equal texts."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)


def survey(
    corpus: Corpus,
    *,
    workers: int,
    decode: bool,
    progress: Callable[[int], None] = lambda _: None,
    watched: Collection[str] = (),
) -> Survey:
    """Read every record of the corpus, and every set of images that records show once, however many show it.

    Args:
        workers: Processes to read with.
        decode: Decode every image whole; else only its header is read.
        progress: Called with the number of records that were done since the last call.
        watched: Texts to look for; of two that begin at one place the longer one counts.
    """
    columns: dict[str, Any] = {name: np.zeros(len(corpus), dtype=_READ[name]) for name in (*COLUMNS, *_COUNTS)}
    errors: dict[int, DataError] = {}
    mentions: Counter[str] = Counter()
    expression = re.compile("|".join(map(re.escape, sorted(watched, key=len, reverse=True)))) if watched else None
    chunks = [range(start, min(start + _CHUNK, len(corpus))) for start in range(0, len(corpus), _CHUNK)]
    work = partial(_read_rows, corpus, watched=expression)
    for rows, read in zip(chunks, _in_parallel(work, chunks, workers), strict=True):
        for name, column in columns.items():
            column[rows.start : rows.stop] = read.columns[name]
        errors |= read.errors
        mentions += read.mentions
        progress(int(np.count_nonzero(read.columns["num_images"] == 0)))
    seen = _read_images(corpus, columns, workers, decode, progress)
    errors |= seen.errors
    for column in columns.values():
        column[list(errors)] = 0
    return Survey(
        **{name: int(columns.pop(name).sum()) for name in _COUNTS},
        **columns,
        errors=dict(sorted(errors.items())),
        traits=seen.traits,
        contents=np.array(seen.contents, dtype=np.int64).reshape(-1, 2),
        mentions=mentions,
    )


@dataclass(slots=True)
class _Images:
    """The result of opening the images of some rows."""

    errors: dict[int, DataError] = field(default_factory=dict)
    """Row -> why its images cannot be used."""
    traits: Counter[str] = field(default_factory=Counter)
    """Traits of the other images."""
    contents: list[tuple[int, int]] = field(default_factory=list)
    """See `Survey`; from `_check_rows` with the row in place of the image key."""


def _read_images(
    corpus: Corpus, columns: dict[str, np.ndarray], workers: int, decode: bool, progress: Callable[[int], None]
) -> _Images:
    (shown,) = np.nonzero(columns["num_images"])
    keys = columns["image_keys"]
    _, first, counts = np.unique(keys[shown], return_index=True, return_counts=True)
    order = np.argsort(first)  # the order of the data, in which neighbouring images are neighbours on the disk
    rows, counts = shown[first][order].tolist(), counts[order]
    chunks = [rows[start : start + _CHUNK // 8] for start in range(0, len(rows), _CHUNK // 8)]
    broken: dict[int, DataError] = {}
    images = _Images()
    done = 0
    read = partial(_check_rows, corpus, decode=decode)
    for chunk, seen in zip(chunks, _in_parallel(read, chunks, workers), strict=True):
        images.traits += seen.traits
        images.contents += [(int(keys[row]), content) for row, content in seen.contents]
        broken |= {int(keys[row]): error for row, error in seen.errors.items()}
        progress(int(counts[done : done + len(chunk)].sum()))
        done += len(chunk)
    unusable = shown[np.isin(keys[shown], list(broken))].tolist() if broken else []
    images.errors = {row: corpus.locate(broken[int(keys[row])], row) for row in unusable}
    return images


def _check_rows(corpus: Corpus, rows: Sequence[int], decode: bool) -> _Images:
    seen = _Images()
    for row in rows:
        try:
            files = [view.file for view in corpus.encode(row).example.images]
            traits = check_images(files, decode)
            contents = [(row, content_key(file)) for file in files] if decode else []
        except DataError as error:
            seen.errors[row] = error
        else:
            seen.traits += traits
            seen.contents += contents
    return seen


def _in_parallel(read: Callable[[Any], Any], chunks: Sequence[Any], workers: int) -> Iterator[Any]:
    """The result of `read` for each chunk, in order; computed by worker processes if there are many chunks."""
    workers = workers if len(chunks) * _CHUNK > _SMALL else 0
    yield from DataLoader(
        chunks,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=workers,
        collate_fn=read,
        worker_init_fn=worker_start(workers),
    )


_FORMAT = 14
_OF_IMAGES = ("missing_image", "broken_image", "unsafe_path")


def cached_survey(corpus: Corpus, key: str, cache_dir: Path, read: Callable[[], Survey]) -> Survey:
    """The survey of an earlier start with the same data and settings, else `read()`, which is then kept.

    Rows whose images were missing or broken are read again: images can be mended without a change to the data files.

    Args:
        key: Fingerprint of everything besides the files that decides lengths: tokenizer, template, settings.
    """
    files = hashlib.sha256(repr([str(source.table.path) for source in corpus.sources]).encode()).hexdigest()[:10]
    path = cache_dir / "surveys" / f"{corpus.fingerprint()}-{files}-{key}-{_FORMAT}.arrow"  # errors name files
    known = stored(path, _load)
    if known is not None:
        return _mended(corpus, known)
    survey = read()
    return _load(path) if store(path, partial(_write, survey)) else survey


def _write(survey: Survey, path: Path) -> None:
    errors = json.dumps({row: vars(error) for row, error in survey.errors.items()})
    batch = pa.record_batch({name: of_numbers(getattr(survey, name), dtype) for name, dtype in COLUMNS.items()})
    counts = {name: str(getattr(survey, name)) for name in _COUNTS}
    batch = batch.replace_schema_metadata({"errors": errors, **counts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _load(path: Path) -> Survey:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    errors = json.loads(batch.schema.metadata[b"errors"])
    counts: dict[str, Any] = {name: int(batch.schema.metadata[name.encode()]) for name in _COUNTS}
    return Survey(
        **{name: np.from_dlpack(batch.column(name)) for name in COLUMNS},
        **counts,
        errors={int(row): DataError(**fields) for row, fields in errors.items()},
    )


def _mended(corpus: Corpus, survey: Survey) -> Survey:
    rows = [row for row, error in survey.errors.items() if error.kind in _OF_IMAGES]
    if not rows:
        return survey
    read = _read_rows(corpus, rows)
    columns, errors = read.columns, read.errors
    broken = _check_rows(corpus, [row for row in rows if row not in errors], decode=True).errors
    errors |= {row: corpus.locate(error, row) for row, error in broken.items()}
    columns[[row in broken for row in rows]] = 0
    arrays = {name: np.array(getattr(survey, name)) for name in COLUMNS}  # a copy: files are not changed
    for name, array in arrays.items():
        array[rows] = columns[name]
    others = {row: error for row, error in survey.errors.items() if row not in set(rows)}
    return replace(
        survey,
        **arrays,
        **{name: getattr(survey, name) + int(columns[name].sum()) for name in _COUNTS},
        errors=dict(sorted((others | errors).items())),
    )
