"""One digest of all image files that a corpus shows: a run that is resumed must find the same images, wherever they are.

Of each file it covers the size and the first and last 8 KiB, so that no compressed file is read whole. Digests are kept
together with size and times of the files, so a later start opens only files that have changed. Images inside other files
need none: the rows themselves hold a digest of each.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from llava_accel.data.corpus import Corpus
from llava_accel.data.images import content_of
from llava_accel.sources.image_parts import digest_of_ends, part_of
from llava_accel.storage.arrow_columns import of_bytes, of_numbers
from llava_accel.storage.kept_files import file_status, store, stored

_THREADS = 16  # on a network disk each waits for an answer
_CHUNK = 512  # files
_R = TypeVar("_R")


class _Known(NamedTuple):
    names: list[str]
    """From `Corpus.image_name`, in the order of the data."""
    statuses: list[tuple[int, int, int]]
    """Size, mtime and ctime when the digest was made."""
    digests: list[bytes]


def images_digest(corpus: Corpus, image_keys: Int[np.ndarray, "rows"], cache_dir: Path) -> str:
    """A SHA-256 over all images that rows of the corpus show.

    Args:
        image_keys: See `Survey`; rows with the key 0 show none.
        cache_dir: Where the digests of files are kept.
    """
    name = hashlib.sha256(corpus.fingerprint().encode() + np.ascontiguousarray(image_keys).tobytes()).hexdigest()[:24]
    path = cache_dir / "images" / f"{name}.arrow"
    kept = stored(path, _load)
    known = kept or _unread(corpus, image_keys)
    files = [corpus.image_file(name) for name in known.names]
    statuses = _in_threads(file_status, files)
    pairs = zip(statuses, known.statuses, strict=True)
    changed = [place for place, (now, then) in enumerate(pairs) if now != then]
    if changed:
        digests = _in_threads(_digest, [files[place] for place in changed])
        for place, digest in zip(changed, digests, strict=True):
            known.digests[place] = digest
    if changed or kept is None:  # also if no image is a file of its own, so that rows are not read again
        store(path, partial(_write, _Known(known.names, statuses, known.digests)))
    return hashlib.sha256(b"".join(known.digests)).hexdigest()


def _unread(corpus: Corpus, image_keys: Int[np.ndarray, "rows"]) -> _Known:
    keys, first = np.unique(image_keys, return_index=True)
    rows = np.sort(first[keys != 0]).tolist()
    files = ((row, file) for row in rows for file in corpus.image_files(row) if part_of(file) is None)
    names = list(dict.fromkeys(corpus.image_name(row, file) for row, file in files))
    return _Known(names, [(0, 0, 0)] * len(names), [b""] * len(names))


def _digest(file: Path) -> bytes:
    """Sixteen bytes; for a file that cannot be read, the hash of nothing."""
    try:
        with file.open("rb") as opened:
            return digest_of_ends(opened)
    except OSError:
        return hashlib.sha256().digest()[:16]


def content_key(file: str) -> int:
    """A number that is equal for images of the same content, whatever their names, in files of their own or in others.

    Raises:
        DataError: it cannot be read.
    """
    return int.from_bytes(hashlib.sha256(content_of(file)).digest()[:8], signed=True)


def _in_threads(work: Callable[[Path], _R], files: Sequence[Path]) -> list[_R]:
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return [result for chunk in threads.map(lambda chunk: list(map(work, chunk)), chunks) for result in chunk]


def _write(known: _Known, path: Path) -> None:
    batch = pa.record_batch(
        {
            "name": of_bytes([name.encode() for name in known.names], pa.large_string()),
            "status": pa.FixedSizeListArray.from_arrays(of_numbers(np.ravel(known.statuses), np.int64), 3),
            "digest": of_bytes(known.digests, pa.large_binary()),
        }
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _load(path: Path) -> _Known:
    with pa.OSFile(str(path), "rb") as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    names, statuses, digests = (batch.column(name).to_pylist() for name in ("name", "status", "digest"))
    return _Known(names, [tuple(status) for status in statuses], digests)
