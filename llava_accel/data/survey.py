"""Reads every record once before the first step: lengths for the order, and everything that is wrong with the data.

The outcome is kept in the cache, keyed by files, template, tokenizer and settings, so a second start reads nothing.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from llava_accel.data.corpus import Corpus
from llava_accel.data.problems import DataError

_CHUNK = 256  # records a worker reads before it reports
_SMALL = 4 * _CHUNK  # below this, starting workers costs more than it saves
_COLUMNS = ("lengths", "num_targets", "num_images", "num_turns", "image_keys")
_FORMAT = 2
_OF_PICTURES = ("missing_image", "broken_image", "unsafe_path")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What reading the data found. Arrays have one entry for each row; 0 where it cannot be used."""

    lengths: Int[np.ndarray, "rows"]
    """Tokens, picture tokens included."""
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


@dataclass(frozen=True)
class _Facts:
    length: int = 0
    num_targets: int = 0
    num_images: int = 0
    num_turns: int = 0
    image_key: int = 0
    num_dropped_turns: int = 0
    error: DataError | None = None


class _Reader(Dataset[_Facts]):
    def __init__(self, corpus: Corpus, decode: bool) -> None:
        self._corpus = corpus
        self._decode = decode

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, index: int) -> _Facts:
        try:
            encoded = self._corpus.encode(index)
            self._corpus.check_images(encoded.example, whole=self._decode)
        except DataError as error:
            return _Facts(error=error)
        images = encoded.example.images
        return _Facts(
            length=sum(len(example.input_ids) - example.num_repeated for example in encoded.examples),
            num_targets=sum(example.num_targets for example in encoded.examples),
            num_images=len(images),
            num_turns=encoded.num_turns,
            image_key=_image_key(images),
            num_dropped_turns=encoded.dropped_turns,
        )

    @staticmethod
    def columns(chunk: list[_Facts]) -> Int[np.ndarray, "rows columns"]:
        """The numbers of some records, in the order of `_COLUMNS`."""
        rows = [[f.length, f.num_targets, f.num_images, f.num_turns, f.image_key] for f in chunk]
        return np.array(rows, dtype=np.int64).reshape(len(chunk), len(_COLUMNS))


def _image_key(images: tuple[str, ...]) -> int:
    names = "\0".join(images).encode()
    return int.from_bytes(hashlib.sha256(names).digest()[:8], signed=True) if images else 0


def survey(corpus: Corpus, *, workers: int, decode: bool, progress: Callable[[int], None] = lambda _: None) -> Survey:
    """Read every record of the corpus.

    Args:
        workers: Processes to read with.
        decode: Decode every picture whole; else only its header is read.
        progress: Called with the number of records read since the last call.
    """
    blocks = [_Reader.columns([])]
    errors: dict[int, DataError] = {}
    num_dropped_turns = num_read = 0
    for chunk in _read(corpus, workers, decode):
        blocks.append(_Reader.columns(chunk))
        errors |= {num_read + place: facts.error for place, facts in enumerate(chunk) if facts.error is not None}
        num_dropped_turns += sum(facts.num_dropped_turns for facts in chunk)
        num_read += len(chunk)
        progress(len(chunk))
    columns = np.concatenate(blocks)
    found = {name: columns[:, place] for place, name in enumerate(_COLUMNS)}
    return Survey(**found, num_dropped_turns=num_dropped_turns, errors=errors)


def _read(corpus: Corpus, workers: int, decode: bool) -> Iterator[list[_Facts]]:
    workers = workers if len(corpus) > _SMALL else 0
    reader = _Reader(corpus, decode)
    yield from DataLoader(reader, batch_size=_CHUNK, num_workers=workers, collate_fn=_as_list)


def _as_list(facts: list[_Facts]) -> list[_Facts]:
    return facts


def cached_survey(corpus: Corpus, key: str, cache_dir: Path, read: Callable[[], Survey]) -> Survey:
    """The survey of an earlier start with the same data and settings, else `read()`, which is then kept.

    Rows whose pictures were missing or broken are read again: pictures get mended without a change to the files.

    Args:
        key: Fingerprint of everything besides the files that decides lengths: tokenizer, template, settings.
    """
    path = cache_dir / "surveys" / f"{corpus.fingerprint()}-{key}-{_FORMAT}.npz"
    if path.exists():
        return _mended(corpus, _load(path))
    found = read()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        columns = {name: value for name, value in vars(found).items() if name != "errors"}
        np.savez(file, errors=json.dumps({row: vars(error) for row, error in found.errors.items()}), **columns)
    os.replace(unfinished, path)
    return found


def _load(path: Path) -> Survey:
    with np.load(path) as stored:
        errors = json.loads(str(stored["errors"]))
        return Survey(
            **{name: stored[name] for name in _COLUMNS},
            num_dropped_turns=int(stored["num_dropped_turns"]),
            errors={int(row): DataError(**fields) for row, fields in errors.items()},
        )


def _mended(corpus: Corpus, found: Survey) -> Survey:
    reader = _Reader(corpus, decode=True)
    errors: dict[int, DataError] = {}
    num_dropped_turns = found.num_dropped_turns
    for row, error in found.errors.items():
        facts = reader[row] if error.kind in _OF_PICTURES else _Facts(error=error)
        if facts.error is not None:
            errors[row] = facts.error
        for name, value in zip(_COLUMNS, _Reader.columns([facts])[0], strict=True):
            vars(found)[name][row] = value
        num_dropped_turns += facts.num_dropped_turns
    return replace(found, num_dropped_turns=num_dropped_turns, errors=errors)
