"""Examples -> rows: chains, shared prefixes, packs. A row is a forest of sequences that holds a common prefix once.

The tokens of a row are in depth-first order, so the descendants of a token come right after it, up to `subtree_end`.
Token `i` attends to `j` exactly when `j <= i < subtree_end[j]`; its position is its depth. A chain, a
pack of chains and questions that share an image are all such forests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llava_accel.data.labels import Example
from llava_accel.data.tiling import ImageView


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A forest of sequences. A target is (token whose hidden state predicts, id to predict, weight)."""

    input_ids: Int[np.ndarray, "length"]
    position_ids: Int[np.ndarray, "length"]
    subtree_end: Int[np.ndarray, "length"]
    target_positions: Int[np.ndarray, "targets"]
    target_ids: Int[np.ndarray, "targets"]
    target_weights: Float[np.ndarray, "targets"]
    target_examples: Int[np.ndarray, "targets"]
    """`Example.number` of the example that each target belongs to."""
    image_starts: tuple[int, ...]
    images: tuple[ImageView, ...]
    indices: tuple[int, ...]
    """Places in the data of the records in this row; several answers to one record name it once."""
    num_example_tokens: int
    """Tokens of the records one by one, those of a shared prefix counted for each."""

    def __len__(self) -> int:
        return len(self.input_ids)


def chain(example: Example) -> Row:
    """A row that holds one example."""
    return build_row([example])


def build_row(examples: Sequence[Example]) -> Row:
    """Join examples, at least one, into one row that holds common prefixes once.

    An image is part of a shared prefix where its view and its place are the same.
    """
    known: dict[ImageView, int] = {}
    tree = _grown([_keys(example, known) for example in examples])
    positions, ids, weights, numbers = [], [], [], []
    images: dict[int, ImageView] = {}
    for example, stretches in zip(examples, tree.paths, strict=True):
        path = np.concatenate(stretches)
        (targets,) = np.nonzero(example.is_target)
        assert not len(targets) or targets[0] > 0, "the first token has nothing that could predict it"
        positions.append(path[targets - 1])
        ids.append(example.input_ids[targets])
        weights.append(np.full(len(targets), example.weight, dtype=np.float32))
        numbers.append(np.full(len(targets), example.number))
        for start, view in zip(example.image_starts, example.images, strict=True):
            images[int(path[start])] = view
    starts = sorted(images)
    return Row(
        input_ids=np.concatenate([examples[owner].input_ids[start:end] for owner, start, end in tree.owners]),
        position_ids=np.concatenate([np.arange(start, end) for _, start, end in tree.owners]),
        subtree_end=np.concatenate(tree.ends),
        target_positions=np.concatenate(positions),
        target_ids=np.concatenate(ids),
        target_weights=np.concatenate(weights),
        target_examples=np.concatenate(numbers),
        image_starts=tuple(starts),
        images=tuple(images[start] for start in starts),
        indices=tuple(example.index for example in examples if not example.num_repeated),
        num_example_tokens=sum(len(example.input_ids) - example.num_repeated for example in examples),
    )


def share_rows(examples: Sequence[Example], max_length: int) -> list[Row]:
    """Rows in which examples of the same images, and answers to the same record, share their prefix.

    A row longer than `max_length` is split at branches, and each part then holds the prefix.
    """
    groups: dict[object, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.images or example.index, []).append(example)
    return [build_row(part) for group in groups.values() for part in _split(group, max_length)]


def _split(group: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Parts of a group whose rows fit `max_length`, as far as its examples do. Branches stay together."""
    numbers: dict[ImageView, int] = {}
    keys = [_keys(example, numbers) for example in group]
    # Sorted by their tokens' bytes, examples are in the depth-first order of their tree, up to the order of
    # branches: each then adds to the row what comes after its common prefix with the one before.
    order = sorted(range(len(group)), key=lambda place: keys[place].tobytes())
    parts: list[list[int]] = []
    length = 0
    for last, place in zip([-1, *order], order, strict=False):
        added = len(keys[place]) - num_common(keys[last], keys[place]) if parts else 0
        if not parts or length + added > max_length:
            parts.append([])
            length, added = 0, len(keys[place])
        parts[-1].append(place)
        length += added
    return [[group[place] for place in sorted(part)] for part in parts]


def num_common(one: Int[np.ndarray, "length"], other: Int[np.ndarray, "other"]) -> int:
    """Leading tokens that two sequences have in common."""
    length = min(len(one), len(other))
    return int(np.argmin(np.append(one[:length] == other[:length], False)))


def _keys(example: Example, numbers: dict[ImageView, int]) -> Int[np.ndarray, "length"]:
    """Ids in which an image is a run of one negative number, the same for the same view only."""
    keys = example.input_ids.copy()
    for start, view in zip(example.image_starts, example.images, strict=True):
        keys[start : start + view.num_tokens] = -1 - numbers.setdefault(view, len(numbers))
    return keys


class _Tree(NamedTuple):
    paths: list[list[np.ndarray]]
    """Places of each example's tokens in the row, stretch by stretch."""
    owners: list[tuple[int, int, int]]
    """Example, first depth and last of each stretch, in the order of the row."""
    ends: list[np.ndarray]
    """`Row.subtree_end` of each stretch."""


def _grown(keys: list[np.ndarray]) -> _Tree:
    """The tree of these sequences, depth first. A stack, not recursion: a row may branch at each of its tokens."""
    tree, length = _Tree([[] for _ in keys], [], []), 0
    waiting: list[tuple[list[int], int] | int] = [(list(range(len(keys))), 0)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, int):
            tree.ends[item][:] = length  # all its descendants are placed by now
            continue
        group, depth = item
        first = keys[group[0]]
        common = min(len(keys[member]) for member in group)
        for member in group[1:]:
            differs = np.nonzero(first[depth:common] != keys[member][depth:common])[0]
            common = depth + int(differs[0]) if len(differs) else common
        stretch = np.arange(length, length + common - depth)
        length += len(stretch)
        tree.owners.append((group[0], depth, common))
        branches: dict[int, list[int]] = {}
        for member in group:
            tree.paths[member].append(stretch)
            if len(keys[member]) > common:
                branches.setdefault(int(keys[member][common]), []).append(member)
        waiting.append(len(tree.ends))
        tree.ends.append(np.zeros_like(stretch))
        waiting += [(branch, common) for branch in reversed(branches.values())]
    return tree


def pack_rows(rows: Sequence[Row]) -> list[Row]:
    """The same rows, with short ones side by side in one row if that makes fewer rows, none longer than the longest."""
    room: list[int] = []
    packs: list[list[int]] = []
    longest = max(map(len, rows), default=0)
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        fitting = [number for number, left in enumerate(room) if left >= len(rows[place])]
        if not fitting:
            packs.append([])
            room.append(longest)
        number = fitting[0] if fitting else -1
        packs[number].append(place)
        room[number] -= len(rows[place])
    if len(packs) == len(rows):
        return list(rows)
    return [_side_by_side([rows[place] for place in sorted(pack)]) for pack in packs]


def _side_by_side(rows: Sequence[Row]) -> Row:
    starts = np.cumsum([0, *map(len, rows)])

    def moved(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([array + start for start, array in zip(starts, arrays, strict=False)])

    return Row(
        input_ids=np.concatenate([row.input_ids for row in rows]),
        position_ids=np.concatenate([row.position_ids for row in rows]),
        subtree_end=moved([row.subtree_end for row in rows]),
        target_positions=moved([row.target_positions for row in rows]),
        target_ids=np.concatenate([row.target_ids for row in rows]),
        target_weights=np.concatenate([row.target_weights for row in rows]),
        target_examples=np.concatenate([row.target_examples for row in rows]),
        image_starts=tuple(moved([np.array(row.image_starts, dtype=np.int64) for row in rows]).tolist()),
        images=tuple(view for row in rows for view in row.images),
        indices=tuple(index for row in rows for index in row.indices),
        num_example_tokens=sum(row.num_example_tokens for row in rows),
    )
