"""Examples of tokens and images that share prefixes, and what can be read back from the row that they become."""

from collections.abc import Collection

import numpy as np
from hypothesis import strategies as st

from llava_accel.data.labels import Example
from llava_accel.data.tiling import ImageView
from llava_accel.data.trie import Row

IMAGE = 99
LENGTH = 3  # tokens of one image
Drawn = list[tuple[list[str | list[int]], set[int]]]
Key = tuple[int | tuple[str, int], ...]


def make(*parts: str | list[int], targets: Collection[int] = (), index: int = -1) -> Example:
    """An example of token lists and image names."""
    ids: list[int] = []
    starts, images = [], []
    for part in parts:
        if isinstance(part, str):
            starts.append(len(ids))
            images.append(ImageView(part, LENGTH))
        ids += [IMAGE] * LENGTH if isinstance(part, str) else part
    is_target = np.array([place in targets and id != IMAGE for place, id in enumerate(ids)])
    return Example(
        input_ids=np.array(ids), is_target=is_target, image_starts=tuple(starts), images=tuple(images), index=index
    )


tokens = st.lists(st.integers(1, 2), min_size=1, max_size=4)
parts = st.lists(tokens | st.sampled_from(["a", "b"]), min_size=1, max_size=5)
some = st.lists(st.tuples(parts, st.sets(st.integers(1, 20))), min_size=1, max_size=6)
"""Parts and targets of examples, alike enough to share much."""


def build(drawn: Drawn) -> list[Example]:
    return [make(*parts, targets=targets, index=10 * place) for place, (parts, targets) in enumerate(drawn)]


def keys(example: Example) -> Key:
    """The tokens, with an image's known by their file."""
    result: list[int | tuple[str, int]] = example.input_ids.tolist()
    for start, view in zip(example.image_starts, example.images, strict=True):
        result[start : start + LENGTH] = [(view.file, place) for place in range(LENGTH)]
    return tuple(result)


def paths(row: Row) -> list[list[int]]:
    """For every token of the row the tokens from its root to itself, from the depths alone."""
    found: list[list[int]] = []
    for token, depth in enumerate(row.position_ids.tolist()):
        # In depth-first order the parent is the last token before that stands one step higher.
        above = [] if depth == 0 else next(path for path in reversed(found) if len(path) == depth)
        found.append([*above, token])
    return found


def keys_of_tokens(row: Row) -> list[int | tuple[str, int]]:
    result: list[int | tuple[str, int]] = row.input_ids.tolist()
    for start, (name, *_) in zip(row.image_starts, row.images, strict=True):
        result[start : start + LENGTH] = [(name, place) for place in range(LENGTH)]
    assert IMAGE not in result, "an image's token belongs to no image"
    return result


def key_paths(row: Row) -> list[Key]:
    tokens = keys_of_tokens(row)
    return [tuple(tokens[place] for place in path) for path in paths(row)]
