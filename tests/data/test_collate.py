"""A batch is its rows, padded: nothing of the padding is seen, every image is encoded once, no rank has no batch."""

import numpy as np
import torch

from helpers.rows import IMAGE, LENGTH, make
from llava_accel.data.collate import Batch, collate
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.tiling import WHOLE, ImageView
from llava_accel.data.trie import Row, build_row, chain, pack_rows

SHAPE = (3, 2, 2)
IMAGES = {
    ImageView(name, LENGTH): LoadedImage(torch.full((1, *SHAPE), float(number))) for number, name in enumerate("abc")
}


def batch_of(*rows: Row) -> Batch:
    return Batch(**collate(rows, IMAGES, SHAPE))


LONG = chain(make([1], "a", [2, 3, 4], targets={4, 6}, index=5))
SHORT = chain(make([7, 8], targets={1}, index=9))


def test_rows_are_padded_to_the_longest_and_padding_sees_and_is_seen_by_nothing() -> None:
    batch = batch_of(LONG, SHORT)
    assert batch.input_ids.tolist() == [[1, 99, 99, 99, 2, 3, 4], [7, 8, 0, 0, 0, 0, 0]]
    assert batch.subtree_end.tolist() == [[7] * 7, [2, 2, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    assert batch.num_tokens == 9
    assert not batch.branched


def test_target_positions_count_through_the_flattened_rows() -> None:
    batch = batch_of(LONG, SHORT)
    flat = batch.input_ids.flatten()
    assert batch.target_positions.tolist() == [3, 5, 7]
    assert batch.target_ids.tolist() == flat[batch.target_positions + 1].tolist() == [2, 4, 8]
    assert batch.target_weights.tolist() == [1.0, 1.0, 1.0]
    assert batch.indices.tolist() == [5, 9]


def test_every_image_is_there_once_and_stands_wherever_it_is_used() -> None:
    rows = [chain(make("b", [1])), chain(make([1], "a", "b")), SHORT]
    batch = batch_of(*rows)
    assert batch.pixel_values.shape == (2, *SHAPE)
    names = ["abc"[int(pixels.flatten()[0])] for pixels in batch.pixel_values]
    used = [names[batch.tile_order[which // LENGTH]] for which in batch.image_index[::LENGTH]]
    assert used == ["b", "a", "b"] and batch.image_layouts == (WHOLE, WHOLE)
    assert batch.image_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    flat = batch.input_ids.flatten()
    assert batch.image_positions.tolist() == [0, 1, 2, 8, 9, 10, 11, 12, 13]
    assert (flat[batch.image_positions] == IMAGE).all()


def test_text_alone_has_images_of_no_number_and_the_right_shape() -> None:
    batch = batch_of(SHORT)
    assert batch.pixel_values.shape == (0, *SHAPE)
    assert batch.image_positions.shape == batch.image_index.shape == (0,)


def test_no_rows_are_a_batch_of_one_padding_token_without_a_target() -> None:
    batch = batch_of()
    assert batch.input_ids.tolist() == [[0]] and batch.subtree_end.tolist() == [[0]]
    for empty in (batch.target_positions, batch.target_ids, batch.target_weights, batch.indices, batch.image_index):
        assert len(empty) == 0
    assert batch.num_tokens == 0 and batch.target_weights.dtype == torch.float32
    assert batch.target_positions.dtype == batch.target_ids.dtype == batch.indices.dtype == torch.int64


def test_a_row_with_branches_or_neighbours_says_so() -> None:
    row = build_row([make([1, 2], [3]), make([1, 2], [4])])
    assert batch_of(row).branched and batch_of(LONG, row).branched
    packed = pack_rows([LONG, SHORT, SHORT])
    assert len(packed) == 2 and batch_of(*packed).branched
    assert not batch_of(chain(make([1, 2, 3]))).branched
    assert not batch_of(build_row([make([1, 2]), make([1, 2, 3])])).branched, "one is the start of the other"


def test_a_batch_is_a_mapping_of_exactly_the_fields_of_batch() -> None:
    fields = collate([LONG], IMAGES, SHAPE)
    others = ("branched", "image_layouts")
    assert list(fields) == list(Batch.__dataclass_fields__)
    assert np.all([isinstance(value, torch.Tensor) for name, value in fields.items() if name not in others])
