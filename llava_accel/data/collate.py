"""Rows -> a batch of tensors: padding, each image once, targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llava_accel.data.feature_store import DIGEST_BYTES
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.tiling import ImageLayout, ImageView
from llava_accel.data.trie import Row


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one rank. Positions count through the flattened rows: row * seq + place in the row."""

    input_ids: Int[Tensor, "rows seq"]
    position_ids: Int[Tensor, "rows seq"]
    subtree_end: Int[Tensor, "rows seq"]
    """Token i of a row attends to j where j <= i < subtree_end[j]; 0 marks padding."""
    branched: bool
    """Whether any row holds more than one chain; for single chains plain causal attention is enough."""
    pixel_values: Float[Tensor, "tiles 3 height width"]
    """Tiles of the batch's images, each image once, without those whose features are in `tower_features`."""
    tower_features: Float[Tensor, "cached tokens channels"]
    """The vision tower's features of the tiles that were found in the cache."""
    image_names: UInt8[Tensor, "named digest"]
    """For each of `pixel_values` the name under which its image's features go into the cache, or zeros if it is not the
    first tile of its image: two neighbouring images may be equal. Empty without a cache."""
    tile_order: Int[Tensor, "all_tiles"]
    """For each tile of the different images, in the order in which they first occur in the rows, its place among
    `pixel_values` and, after them, `tower_features`. Sums over images are taken in that order: were it that of the cache, it
    would depend on what the cache held already."""
    image_layouts: tuple[ImageLayout, ...]
    """Layouts of these images, in the same order."""
    image_positions: Int[Tensor, "places"]
    """Positions of image tokens; an image may occur in several places."""
    image_index: Int[Tensor, "places"]
    """Which image token is at each of these positions, counted over the different images."""
    target_positions: Int[Tensor, "targets"]
    """Positions whose hidden states predict the targets."""
    target_ids: Int[Tensor, "targets"]
    target_weights: Float[Tensor, "targets"]
    target_examples: Int[Tensor, "targets"]
    """The example of the micro-batch that each target belongs to. The two of a pair are adjacent, the chosen one first."""
    reference: Float[Tensor, "answers"]
    """For pairs the log-probability of each example's answer before training; else empty."""
    target_reads: Int[Tensor, "targets"]
    """For each target the index of its position in `read_positions`."""
    read_positions: Int[Tensor, "read"]
    """`target_positions`, each once: the answers to one question begin at the same place."""
    indices: Int[Tensor, "examples"]
    """Places in the data of the records, for reports."""
    num_tokens: Int[Tensor, ""]
    """Tokens of the records, without padding and with a shared prefix counted for each of them."""


IMAGE_FIELDS = ("pixel_values", "tower_features", "image_names", "tile_order", "image_layouts")
"""The fields that image tokens are computed from."""


def collate(
    rows: Sequence[Row],
    images: Mapping[ImageView, LoadedImage],
    image_shape: tuple[int, ...],
    reference: Sequence[float] = (),
) -> dict[str, Any]:
    """Pad rows to the longest one and include every image once.

    Args:
        rows: May be empty: a rank without examples still computes one padding token, so that it takes part in every
            collective operation of the step.
        images: The images of the rows.
        image_shape: Shape of every tile's pixels.
        reference: See `Batch`.

    Returns:
        The fields of `Batch` as a mapping, the form that models and engines take.
    """
    seq = max((len(row) for row in rows), default=1)
    shape = (max(len(rows), 1), seq)
    input_ids = np.zeros(shape, dtype=np.int64)  # any id that the embedding holds: padding never reaches a target
    # Padding goes on counting, so that no attention kernel takes it for the start of another packed sequence.
    position_ids = np.tile(np.arange(seq, dtype=np.int64), (shape[0], 1))
    subtree_end = np.zeros(shape, dtype=np.int64)
    different = list(dict.fromkeys(view for row in rows for view in row.images))
    first_token = dict(zip(different, accumulate((view.num_tokens for view in different), initial=0), strict=False))
    places: list[np.ndarray] = []
    which: list[np.ndarray] = []
    for number, row in enumerate(rows):
        length = len(row)
        input_ids[number, :length] = row.input_ids
        position_ids[number, :length] = row.position_ids
        subtree_end[number, :length] = row.subtree_end
        for start, view in zip(row.image_starts, row.images, strict=True):
            places.append(np.arange(view.num_tokens) + number * seq + start)
            which.append(np.arange(view.num_tokens) + first_token[view])
    positions = _joined([row.target_positions + n * seq for n, row in enumerate(rows)], torch.int64)
    read_positions, target_reads = positions.unique(return_inverse=True)
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        subtree_end=torch.from_numpy(subtree_end),
        branched=any((row.subtree_end != len(row)).any() for row in rows),
        **stack_images([images[view] for view in different], image_shape),
        image_layouts=tuple(view.layout for view in different),
        image_positions=_joined(places, torch.int64),
        image_index=_joined(which, torch.int64),
        target_positions=positions,
        target_ids=_joined([row.target_ids for row in rows], torch.int64),
        target_weights=_joined([row.target_weights for row in rows], torch.float32),
        target_examples=_joined([row.target_examples for row in rows], torch.int64),
        reference=torch.tensor(reference, dtype=torch.float32),
        target_reads=target_reads,
        read_positions=read_positions,
        indices=torch.tensor([index for row in rows for index in row.indices], dtype=torch.int64),
        num_tokens=torch.tensor(sum(row.num_example_tokens for row in rows), dtype=torch.int64),
    )
    return dict(vars(batch))


def stack_images(images: Sequence[LoadedImage], image_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The fields of a batch that hold the tiles of these images and give their order."""
    pixels = [image.tensor for image in images if not image.is_encoded]
    features = [image.tensor for image in images if image.is_encoded]
    named = [image for image in images if image.name and not image.is_encoded]
    names = [name for image in named for name in (list(image.name), *[[0] * DIGEST_BYTES] * (len(image.tensor) - 1))]
    tiles = np.repeat([image.is_encoded for image in images], [len(image.tensor) for image in images])
    return {
        "pixel_values": torch.cat(pixels) if pixels else torch.zeros((0, *image_shape)),
        "tower_features": torch.cat(features) if features else torch.zeros((0, 0, 0)),
        "image_names": torch.tensor(names, dtype=torch.uint8).reshape(len(names), DIGEST_BYTES),
        # The place of each tile when those with pixels come first.
        "tile_order": torch.from_numpy(np.argsort(np.argsort(tiles, kind="stable"), kind="stable")),
    }


def _joined(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.zeros(0, dtype=dtype)
