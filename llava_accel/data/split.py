"""A held-out share of the data, split by image so that no image is on both sides."""

import hashlib
import os.path
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from llava_accel.data.corpus import Corpus
from llava_accel.exceptions import UserError
from llava_accel.sources.image_parts import part_of
from llava_accel.storage.kept_files import store, stored


def held_out(
    corpus: Corpus, rows: Int[np.ndarray, "rows"], fraction: float, seed: int, cache_dir: Path
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "eval"]]:
    """Split rows into training and evaluation.

    An image's side is a hash of its name and the seed, so it does not change when records are added. Records that share
    images, directly or through other records, stay together; a text-only record goes by its own id.

    Args:
        cache_dir: Where the outcome is kept for the next start, which then reads no record.

    Returns:
        The rows that stay and those held out, each in the given order.

    Raises:
        UserError: one of the sides would be empty.
    """
    draws = _kept(corpus, rows, seed, cache_dir)
    train, evaluation = rows[draws >= fraction], rows[draws < fraction]
    if not len(train) or not len(evaluation):
        raise UserError(
            f"data.eval_fraction = {fraction} leaves {len(train)} records for training and {len(evaluation)} for "
            "evaluation. Choose another share, or name a file in data.eval"
        )
    return train, evaluation


def _draw(corpus: Corpus, rows: Int[np.ndarray, "rows"], seed: int) -> Float[np.ndarray, "rows"]:
    """A number from 0 to 1 for each row, equal for rows whose images must stay together. Only the names of images
    that share a record or a file with others are held in memory."""
    groups = _Groups()
    several_roots = len({source.images for source in corpus.sources}) > 1
    names_of_files: dict[str, str] = {}
    draws = np.empty(len(rows))
    for place, row in enumerate(rows.tolist()):
        name, *others = _names(corpus, row)
        draws[place] = _uniform(name, seed)
        for other in others:
            groups.join(name, other)
        for shown in (name, *others) if several_roots and not name.startswith("\0") else ():
            groups.join(names_of_files.setdefault(os.path.normpath(corpus.root(row) / shown), shown), shown)
    joined = np.array([_uniform(name, seed) for name in groups.names()])
    for place in np.nonzero(np.isin(draws, joined))[0].tolist():
        draws[place] = _uniform(groups.find(_names(corpus, int(rows[place]))[0]), seed)
    return draws


def _names(corpus: Corpus, row: int) -> list[str]:
    """The record's images, or its own id where it has none."""
    record = corpus.record(row)
    # One file has many spellings, as in a/../b.png, and another name in each folder that holds it.
    return [_plain(name) for name in record.images] or [f"\0{record.id}"]


def _plain(name: str) -> str:
    part = part_of(name)
    return f"\0{part.key}" if part else os.path.normpath(name)


def _kept(corpus: Corpus, rows: Int[np.ndarray, "rows"], seed: int, cache_dir: Path) -> Float[np.ndarray, "rows"]:
    """The numbers that an earlier start drew; else those of `_draw`, which are then kept."""
    key = (corpus.fingerprint(), hashlib.sha256(rows.tobytes()).hexdigest(), seed)
    path = cache_dir / "splits" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.npy"
    draws = stored(path, lambda path: np.load(path, mmap_mode="r"))
    if draws is None:
        draws = _draw(corpus, rows, seed)
        store(path, partial(_save, draws))
    return draws


def _save(draws: Float[np.ndarray, "rows"], path: Path) -> None:
    with path.open("wb") as file:  # given a path, numpy adds its own ending
        np.save(file, draws)


def _uniform(name: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) / 2**64


class _Groups:
    """Union-find over names that were joined; other names cost nothing."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (parent := self._parents.get(name)) is not None:
            self._parents[name] = self._parents.get(parent, parent)  # halves the path for the next call
            name = parent
        return name

    def names(self) -> set[str]:
        """All names that were joined to another."""
        return {*self._parents, *self._parents.values()}

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        if first != second:
            self._parents[second] = first
