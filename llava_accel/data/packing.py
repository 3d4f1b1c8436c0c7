"""Short rows side by side in one: a forest may have any number of trees, and none of them sees another."""

from collections.abc import Sequence

import numpy as np

from llava_accel.data.trie import Row


def pack_rows(rows: Sequence[Row]) -> list[Row]:
    """The same rows, short ones side by side in one where fewer rows of the longest one's length then hold them all."""
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
        image_starts=tuple(moved([np.array(row.image_starts, dtype=np.int64) for row in rows]).tolist()),
        images=tuple(name for row in rows for name in row.images),
        indices=tuple(index for row in rows for index in row.indices),
        num_example_tokens=sum(row.num_example_tokens for row in rows),
    )
