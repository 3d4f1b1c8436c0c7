"""Rows -> a batch of tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llava_accel.data.feature_store import DIGEST_BYTES
from llava_accel.data.images import LoadedImage
from llava_accel.data.trie import Row


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch on one rank. Positions count through the flattened rows: row * seq + place in the row."""

    input_ids: Int[Tensor, "rows seq"]
    position_ids: Int[Tensor, "rows seq"]
    subtree_end: Int[Tensor, "rows seq"]
    """Token i of a row attends to j where j <= i < subtree_end[j]; 0 marks padding."""
    branched: bool
    """Whether a row is more than one chain; plain causal attention does for chains."""
    pixel_values: Float[Tensor, "images 3 height width"]
    """Each image of the batch once, unless it is among the next."""
    tower_features: Float[Tensor, "cached tokens channels"]
    """The vision tower's features of images that were found in the cache."""
    image_names: UInt8[Tensor, "named digest"]
    """Names under which features of `pixel_values` go into the cache; none where there is no cache."""
    image_positions: Int[Tensor, "places"]
    """Where the tokens of an image begin; an image may stand in several places."""
    image_index: Int[Tensor, "places"]
    """Which image stands there, counted in the order in which they first stand in the rows."""
    image_order: Int[Tensor, "different"]
    """For each of these images its place among `pixel_values` and, behind them, `tower_features`. Sums over images
    are taken in the order of the rows: were it that of the cache, it would depend on what the cache held already."""
    target_positions: Int[Tensor, "targets"]
    """Whose hidden states predict."""
    target_ids: Int[Tensor, "targets"]
    target_weights: Float[Tensor, "targets"]
    target_reads: Int[Tensor, "targets"]
    """Which of `read_positions` predicts each target."""
    read_positions: Int[Tensor, "read"]
    """`target_positions`, each once: the answers to one question begin at the same place."""
    indices: Int[Tensor, "examples"]
    """Places in the data of the records, for reports."""
    num_tokens: Int[Tensor, ""]
    """Tokens of the records, without padding and with a shared prefix counted for each of them."""


def collate(
    rows: Sequence[Row], images: Mapping[str, LoadedImage], image_shape: tuple[int, ...], pad_id: int = 0
) -> dict[str, Tensor | bool]:
    """Pad rows to the longest and put every image in once.

    Args:
        rows: May be empty: a rank without examples still computes one padding token, so that it takes part in every
            collective operation of the step.
        images: The images of the rows by file name.
        image_shape: Shape of every image's pixels.
        pad_id: Any id that the embedding holds; padding never reaches a target.

    Returns:
        The fields of `Batch` as a mapping, the form that models and engines take.
    """
    seq = max((len(row) for row in rows), default=1)
    shape = (max(len(rows), 1), seq)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    # Padding goes on counting, so that no attention kernel takes it for the start of another packed sequence.
    position_ids = np.tile(np.arange(seq, dtype=np.int64), (shape[0], 1))
    subtree_end = np.zeros(shape, dtype=np.int64)
    names = [name for row in rows for name in row.images]
    files = place_images(names, images)
    first = {name: place for place, name in enumerate(dict.fromkeys(names))}
    places: list[int] = []
    which: list[int] = []
    for number, row in enumerate(rows):
        length = len(row)
        input_ids[number, :length] = row.input_ids
        position_ids[number, :length] = row.position_ids
        subtree_end[number, :length] = row.subtree_end
        for start, name in zip(row.image_starts, row.images, strict=True):
            places.append(number * seq + start)
            which.append(first[name])
    positions = _joined([row.target_positions + n * seq for n, row in enumerate(rows)], torch.int64)
    read_positions, target_reads = positions.unique(return_inverse=True)
    batch = Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        subtree_end=torch.from_numpy(subtree_end),
        branched=any((row.subtree_end != len(row)).any() for row in rows),
        **stack_images([images[name] for name in files], image_shape),
        image_positions=torch.tensor(places, dtype=torch.int64),
        image_index=torch.tensor(which, dtype=torch.int64),
        image_order=torch.tensor([files[name] for name in first], dtype=torch.int64),
        target_positions=positions,
        target_ids=_joined([row.target_ids for row in rows], torch.int64),
        target_weights=_joined([row.target_weights for row in rows], torch.float32),
        target_reads=target_reads,
        read_positions=read_positions,
        indices=torch.tensor([index for row in rows for index in row.indices], dtype=torch.int64),
        num_tokens=torch.tensor(sum(row.num_example_tokens for row in rows), dtype=torch.int64),
    )
    return dict(vars(batch))


def place_images(names: Iterable[str], images: Mapping[str, LoadedImage]) -> dict[str, int]:
    """A number for each different name, those with pixels first: its place in what `stack_images` makes."""
    different = sorted(dict.fromkeys(names), key=lambda name: images[name].is_encoded)
    return {name: place for place, name in enumerate(different)}


def stack_images(images: Sequence[LoadedImage], image_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The three fields of a batch that hold images, which stand in the order of `place_images`."""
    pixels = [image.tensor for image in images if not image.is_encoded]
    features = [image.tensor for image in images if image.is_encoded]
    names = [list(image.name) for image in images if image.name and not image.is_encoded]
    return {
        "pixel_values": torch.stack(pixels) if pixels else torch.zeros((0, *image_shape)),
        "tower_features": torch.stack(features) if features else torch.zeros((0, 0, 0)),
        "image_names": torch.tensor(names, dtype=torch.uint8).reshape(len(names), DIGEST_BYTES),
    }


def _joined(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(dtype) if parts else torch.zeros(0, dtype=dtype)
