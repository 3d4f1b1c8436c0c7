"""Short rows stand side by side where that saves positions; nothing of an example is lost or seen by another."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from helpers.rows import Drawn, build, key_paths, make, paths, some
from llava_accel.data.sampler import Order, windows
from llava_accel.data.trie import Row, chain, pack_rows, share_rows


@settings(deadline=None, max_examples=100)
@given(drawn=some)
def test_a_pack_holds_the_trees_of_its_rows_and_none_sees_another(drawn: Drawn) -> None:
    rows = share_rows(build(drawn), 1000)
    packed = pack_rows(rows)
    assert Counter(path for row in packed for path in key_paths(row)) == Counter(
        p for row in rows for p in key_paths(row)
    )
    assert Counter(map(_target, _targets(packed))) == Counter(map(_target, _targets(rows)))
    assert sorted(index for row in packed for index in row.indices) == sorted(i for row in rows for i in row.indices)
    assert sum(row.num_example_tokens for row in packed) == sum(row.num_example_tokens for row in rows)
    for row in packed:
        place = np.arange(len(row))
        attends = (place[None, :] <= place[:, None]) & (place[:, None] < row.subtree_end[None, :])
        assert [np.flatnonzero(line).tolist() for line in attends] == paths(row)


def _targets(rows: list[Row]) -> list[tuple[Row, int]]:
    return [(row, number) for row in rows for number in range(len(row.target_ids))]


def _target(found: tuple[Row, int]) -> tuple[object, ...]:
    row, number = found
    path = key_paths(row)[row.target_positions[number]]
    return path, int(row.target_ids[number]), float(row.target_weights[number])


def test_short_rows_fill_up_the_longest_ones_length() -> None:
    rows = [chain(make(list(range(1, 1 + length)), index=length)) for length in (2, 9, 3, 10, 5)]
    packed = pack_rows(rows)
    assert [len(row) for row in packed] == [10, 9, 10]
    assert [row.indices for row in packed] == [(10,), (9,), (2, 3, 5)]


def test_rows_stay_as_they_are_where_no_pack_is_saved() -> None:
    rows = [chain(make(list(range(1, 1 + length)))) for length in (6, 9, 7)]
    assert [id(row) for row in pack_rows(rows)] == [id(row) for row in rows]
    assert pack_rows([]) == []


def llava_like(count: int) -> np.ndarray:
    """Lengths of LLaVA-1.5's second stage: 576 tokens an image, short answers and dialogues, 6 % text alone."""
    random = np.random.default_rng(0)
    text = np.exp(random.normal(6.6, 0.7, count)).clip(30, 2048)
    dialogue = np.exp(random.normal(5.2, 0.7, count)).clip(10, 1400)
    image = 576 + 45 + np.where(random.random(count) < 0.45, random.integers(15, 40, count), dialogue)
    return np.where(random.random(count) < 40_688 / 665_298, text, image).astype(np.int64)


@pytest.mark.slow
def test_less_than_3_percent_is_padding_on_a_mix_like_llavas_and_ranks_work_equally() -> None:
    lengths = llava_like(3_840)
    for batch, per_device, ranks in ((128, 16, 8), (16, 16, 1), (16, 4, 2)):
        order = Order(lengths=lengths, seed=0, global_batch_size=batch)
        used = computed = 0
        spread = []
        for step in windows(order, 0, order.steps_per_epoch, per_device_batch_size=per_device, num_ranks=ranks):
            work = [sum(lengths[some].sum() for some in window) for window in step]
            spread.append(max(work) / np.mean(work) - 1)
            used += sum(work)
            computed += sum(_positions(lengths[some]) for window in step for some in window)
        assert used == lengths.sum() and 1 - used / computed < 0.03
        assert np.mean(spread) < 0.04, "the busiest rank of a step has that much more than the mean"


def _positions(lengths: np.ndarray) -> int:
    rows = pack_rows([chain(make([1] * length)) for length in lengths])
    return len(rows) * max(map(len, rows), default=0)
