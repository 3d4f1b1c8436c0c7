"""The order of the data: a pure function of (seed, epoch), so resume needs neither replay nor luck.

The global batch is the unit: its examples do not depend on the number of ranks and micro-batches, among which they are
dealt out afterwards. Lengths are real tokens, image tokens included.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from jaxtyping import Int

_WINDOWS_PER_POOL = 50  # examples of this many global batches are sorted by length together
_SORTED_AT_ONCE = 1 << 20  # examples

MicroBatch = list[int]
Window = list[MicroBatch]


def image_groups(image_keys: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "rows"]:
    """A number for each row that is equal for rows of the same images; a text-only row (key 0) has its own.

    Numbered as they come in the data, so that the order depends neither on names nor on the form of the files.
    """
    _, first, numbers = np.unique(image_keys, return_index=True, return_inverse=True)
    groups = np.argsort(np.argsort(first))[numbers]
    return np.where(image_keys == 0, len(image_keys) + np.arange(len(image_keys)), groups)


class Batches:
    """The global batches of an epoch: slices of one array, made when they are read.

    Args:
        examples: All of them, batch after batch.
        size: Examples of a batch; the last one may be smaller.
        numbers: The number of the batch at each place of the epoch.
    """

    def __init__(self, examples: Int[np.ndarray, "examples"], size: int, numbers: Int[np.ndarray, "batches"]) -> None:
        self._examples, self._size, self._numbers = examples, size, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Int[np.ndarray, "batch"]:
        start = int(self._numbers[place]) * self._size
        return self._examples[start : start + self._size]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which examples each step sees.

    Args:
        lengths: Tokens of every example that can be used; its indices are what the order deals out.
        seed: The run's seed.
        global_batch_size: Examples of one step over all ranks and micro-batches.
        shuffle: Draw a new order for each epoch, in place of the order of the data.
        group_by_length: Put examples of similar length into the same step.
        repeats: How often each example occurs in an epoch (data.train weights); fractions are drawn again each epoch.
        groups: Examples of equal number stay together and share their prefix; None keeps none together. A group is cut
            only where a global batch ends, so every step has as many examples as without groups.
    """

    lengths: Int[np.ndarray, "examples"]
    seed: int
    global_batch_size: int
    shuffle: bool = True
    group_by_length: bool = True
    repeats: np.ndarray | None = None
    groups: Int[np.ndarray, "examples"] | None = None

    @cached_property
    def sort_lengths(self) -> Int[np.ndarray, "examples"]:
        """The lengths by which examples are brought together: each one's own, or that of its whole group."""
        if self.groups is None:
            return self.lengths
        members = self._members
        return np.bincount(members, weights=self.lengths).astype(np.int64)[members]

    @cached_property
    def _members(self) -> Int[np.ndarray, "examples"]:
        """The group of each example, numbered from 0."""
        assert self.groups is not None
        return np.unique(self.groups, return_inverse=True)[1]

    @property
    def examples_per_epoch(self) -> int:
        """Examples dealt out in one epoch."""
        return len(self.lengths) if self.repeats is None else round(float(self.repeats.sum()))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may be smaller."""
        return -(-self.examples_per_epoch // self.global_batch_size)

    def fingerprint(self) -> str:
        """Equal for the same examples in the same places, as far as lengths, repeats and groups tell."""
        digest = hashlib.sha256()
        for column in (self.lengths, self.repeats, self.groups):
            digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:20]

    def epoch(self, epoch: int) -> Batches:
        """The global batches of one epoch, in order; only the last may be short."""
        random = np.random.default_rng((self.seed, epoch))
        order = self._shuffled(self._population(random), random)
        size, numbers = self.global_batch_size, np.arange(-(-len(order) // self.global_batch_size))
        if self.group_by_length:
            full = len(order) // size
            self._group(order[: full * size])
            numbers[:full] = random.permutation(full)
        return Batches(order, size, numbers)

    def _shuffled(self, population: np.ndarray, random: np.random.Generator) -> np.ndarray:
        if self.groups is None:
            return random.permutation(population) if self.shuffle else population
        groups = self._members.max() + 1
        places = random.permutation(groups) if self.shuffle else np.arange(groups)
        return population[np.argsort(places[self._members[population]], kind="stable")]

    def _population(self, random: np.random.Generator) -> Int[np.ndarray, "examples"]:
        indices = np.arange(len(self.lengths))
        if self.repeats is None:
            return indices
        whole = np.floor(self.repeats).astype(int)
        population = np.repeat(indices, whole)
        missing = self.examples_per_epoch - len(population)
        fractions = self.repeats - whole
        if missing <= 0:
            return population
        extra = random.choice(indices, size=missing, replace=False, p=fractions / fractions.sum())
        return np.concatenate([population, extra])

    def _group(self, order: np.ndarray) -> None:
        """Sort the examples of each pool by length, in place."""
        pool = self.global_batch_size * _WINDOWS_PER_POOL
        pools = order[: len(order) // pool * pool].reshape(-1, pool)
        step = max(1, _SORTED_AT_ONCE // pool)
        rest = order[pools.size :].reshape(1, -1)
        for some in [*(pools[start : start + step] for start in range(0, len(pools), step)), rest]:
            # A stable sort keeps the random order among equal lengths, and groups together.
            places = np.argsort(self.sort_lengths[some], axis=1, kind="stable")
            some[:] = np.take_along_axis(some, places, axis=1)


def deal(
    batch: Int[np.ndarray, "batch"],
    lengths: Int[np.ndarray, "examples"],
    *,
    per_device_batch_size: int,
    num_ranks: int,
    keeps_order: bool = False,
) -> list[Window]:
    """Deal a global batch to the ranks: for each rank its micro-batches, all ranks the same number of them.

    Neighbours in length share a micro-batch, and the ranks get micro-batches of similar length at the same time: each
    time the longest goes to the rank that has had the least. A short batch is spread evenly; a rank that has nothing
    left gets an empty micro-batch, which still takes part in every collective operation.

    Args:
        keeps_order: Neighbours in `batch` share a micro-batch instead.
    """
    if not keeps_order:
        batch = batch[np.argsort(lengths[batch], kind="stable")]
    num_turns = max(1, -(-len(batch) // (per_device_batch_size * num_ranks)))
    parts = np.array_split(batch, num_turns * num_ranks)
    dealt: list[Window] = [[] for _ in range(num_ranks)]
    work = np.zeros(num_ranks)
    for turn in range(num_turns):
        own = sorted(parts[turn * num_ranks : (turn + 1) * num_ranks], key=lambda part: -lengths[part].sum())
        for rank, part in zip(np.argsort(work, kind="stable"), own, strict=True):
            dealt[rank].append(part.tolist())
            work[rank] += lengths[part].sum()
    return dealt


def windows(
    order: Order, first_step: int, num_steps: int, *, keeps_order: bool = False, **sizes: int
) -> Iterator[list[Window]]:
    """Every step's micro-batches for all ranks, from `first_step` to `num_steps`, over as many epochs as it takes."""
    for epoch, steps in groupby(range(first_step, num_steps), lambda step: step // order.steps_per_epoch):
        batches = order.epoch(epoch)
        for step in steps:
            yield deal(batches[step % order.steps_per_epoch], order.sort_lengths, keeps_order=keeps_order, **sizes)
