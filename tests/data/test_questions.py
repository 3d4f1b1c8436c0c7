"""Batches of an evaluation: as many questions as there may be, and fewer where prompts are long."""

import numpy as np
import pytest

from llava_accel.data.questions import USUAL_LENGTH, image_batches


def batches(lengths: list[int], images: list[int], size: int) -> list[list[int]]:
    return image_batches(np.arange(len(lengths)), np.array(lengths, dtype=int), np.array(images, dtype=int), size)


@pytest.mark.parametrize("longest", [700, USUAL_LENGTH])
def test_prompts_of_usual_length_fill_every_batch(longest: int) -> None:
    found = batches([longest - n % 5 for n in range(40)], [0] * 40, 16)
    assert [len(batch) for batch in found] == [16, 16, 8]


def test_a_batch_of_long_prompts_has_no_more_positions_than_a_full_one_of_usual_ones() -> None:
    lengths = [8765] * 7 + [3000] * 12 + [100] * 20
    found = batches(lengths, list(range(1, 40)), 16)
    assert sorted(row for batch in found for row in batch) == list(range(39))
    assert [len(batch) for batch in found] == [3, 3, 3, 10, 16, 4]
    for batch in found:
        assert len(batch) * max(lengths[row] for row in batch) <= 16 * USUAL_LENGTH


def test_questions_on_one_long_image_stay_together() -> None:
    """They share its tokens, which are computed once."""
    found = batches([8765] * 20, [1] * 10 + [2] * 10, 16)
    assert found == [list(range(10)), list(range(10, 20))]
    assert [len(batch) for batch in batches([8765] * 9, [1, 1, 1, 2, 2, 2, 3, 3, 3], 16)] == [9]


def test_a_prompt_longer_than_any_batch_stands_alone() -> None:
    assert batches([9000, 9000, 9000], [1, 2, 3], 2) == [[0], [1], [2]]


def test_nothing_to_evaluate_is_no_batch() -> None:
    assert batches([], [], 4) == []
