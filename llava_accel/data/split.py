"""A held-out share of the data, split by picture so that no picture is on both sides."""

import hashlib
import os.path

import numpy as np
from jaxtyping import Int

from llava_accel.data.corpus import Corpus


def held_out(
    corpus: Corpus, rows: Int[np.ndarray, "rows"], fraction: float, seed: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "eval"]]:
    """Split rows into training and evaluation.

    A picture's side is a hash of its name and the seed, so it does not change when records are added. Records that
    share pictures over several steps stay together; a text-only record goes by its own id.

    Returns:
        The rows that stay and those held out, each in the given order.

    Raises:
        ValueError: one of the sides would be empty.
    """
    groups = _Groups()
    names: list[str] = []
    several_roots = len({source.images for source in corpus.sources}) > 1
    names_of_files: dict[str, str] = {}
    for row in rows:
        record = corpus.record(int(row))
        # One file has many spellings, as in a/../b.png, and another name in each folder that holds it.
        images = [os.path.normpath(name) for name in record.images] or [f"\0{record.id}"]
        names.append(images[0])
        for other in images[1:]:
            groups.join(images[0], other)
        for name in images if several_roots and record.images else ():
            groups.join(names_of_files.setdefault(os.path.normpath(corpus.root(int(row)) / name), name), name)
    draws = np.array([_uniform(groups.find(name), seed) for name in names])
    train, evaluation = rows[draws >= fraction], rows[draws < fraction]
    if not len(train) or not len(evaluation):
        raise ValueError(
            f"data.eval_fraction = {fraction} leaves {len(train)} records for training and {len(evaluation)} for "
            "evaluation. Choose another share, or name a file in data.eval"
        )
    return train, evaluation


def _uniform(name: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) / 2**64


class _Groups:
    """Union-find over names that were joined; names that never were stand alone and cost nothing."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (parent := self._parents.get(name)) is not None:
            self._parents[name] = self._parents.get(parent, parent)  # halves the way for the next one
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        if first != second:
            self._parents[second] = first
