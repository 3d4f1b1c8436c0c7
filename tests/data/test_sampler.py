"""The order is a pure function of (seed, epoch): a step sees the same examples on any machine, from any start."""

from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_accel.data.sampler import Order, Window, deal, windows


def order(num: int, size: int = 8, seed: int = 0, **settings: object) -> Order:
    lengths = np.random.default_rng(1).integers(5, 500, num)
    return Order(lengths=lengths, seed=seed, global_batch_size=size, **settings)  # pyright: ignore[reportArgumentType]


def flat(step: list[Window]) -> list[int]:
    return [example for window in step for micro_batch in window for example in micro_batch]


@settings(deadline=None)
@given(num=st.integers(1, 300), size=st.integers(1, 40), epoch=st.integers(0, 5), grouped=st.booleans())
def test_every_example_stands_exactly_once_in_an_epoch(num: int, size: int, epoch: int, grouped: bool) -> None:
    data = order(num, size, group_by_length=grouped)
    batches = list(data.epoch(epoch))  # pyright: ignore
    assert sorted(np.concatenate(batches).tolist()) == list(range(num))
    assert len(batches) == data.steps_per_epoch
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size


def as_lists(data: Order, epoch: int) -> list[list[int]]:
    return [batch.tolist() for batch in data.epoch(epoch)]


@pytest.mark.parametrize("grouped", [True, False])
def test_the_order_is_a_pure_function_of_seed_and_epoch(grouped: bool) -> None:
    data = order(100, group_by_length=grouped)
    first = as_lists(data, 3)
    np.random.seed(5)
    as_lists(data, 0)
    assert as_lists(data, 3) == first == as_lists(order(100, group_by_length=grouped), 3)
    assert as_lists(data, 2) != first
    assert as_lists(order(100, seed=1, group_by_length=grouped), 3) != first


def test_grouping_puts_alike_lengths_together_and_still_shuffles_steps() -> None:
    data, loose = order(4000), order(4000, group_by_length=False)
    spread = [np.ptp(data.lengths[batch]) for batch in data.epoch(0)]
    assert np.mean(spread) < 0.1 * np.mean([np.ptp(data.lengths[batch]) for batch in loose.epoch(0)])
    means = [data.lengths[batch].mean() for batch in list(data.epoch(0))[:50]]  # pyright: ignore
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5


LAYOUTS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8), (2, 1, 4)]


@pytest.mark.parametrize(("per_device", "accumulation", "ranks"), LAYOUTS)
def test_a_step_sees_the_same_examples_in_any_layout(per_device: int, accumulation: int, ranks: int) -> None:
    data = order(45)
    steps = list(windows(data, 0, 12, per_device_batch_size=per_device, num_ranks=ranks))
    assert [sorted(flat(step)) for step in steps] == [
        sorted(batch.tolist()) for epoch in (0, 1) for batch in data.epoch(epoch)
    ]
    for step in steps:
        assert len(step) == ranks
        assert len({len(window) for window in step}) == 1, "a rank has more micro-batches than another"
        assert all(len(micro_batch) <= per_device for window in step for micro_batch in window)
        assert len(step[0]) <= accumulation
    full = steps[0]
    assert all(len(window) == accumulation for window in full)
    assert all(len(micro_batch) == per_device for window in full for micro_batch in window)


@settings(deadline=None)
@given(num=st.integers(1, 64), per_device=st.integers(1, 8), ranks=st.integers(1, 8))
def test_a_short_batch_is_spread_evenly(num: int, per_device: int, ranks: int) -> None:
    lengths = np.arange(100, 200)
    dealt = deal(np.arange(num), lengths, per_device_batch_size=per_device, num_ranks=ranks)
    sizes = [len(micro_batch) for window in dealt for micro_batch in window]
    assert sorted(flat(dealt)) == list(range(num))
    assert len(dealt) == ranks and len({len(window) for window in dealt}) == 1
    assert max(sizes) - min(sizes) <= 1
    assert len(dealt[0]) == -(-num // (per_device * ranks)), "more micro-batches than it takes"


def test_a_rank_without_examples_still_takes_part() -> None:
    dealt = deal(np.array([4]), np.full(10, 7), per_device_batch_size=2, num_ranks=3)
    assert sorted(dealt, key=str) == [[[4]], [[]], [[]]]


def test_ranks_work_on_alike_lengths_at_the_same_time() -> None:
    lengths = np.arange(64)
    dealt = deal(np.random.default_rng(0).permutation(64), lengths, per_device_batch_size=4, num_ranks=4)
    for turn in range(4):
        together = list(chain.from_iterable(window[turn] for window in dealt))
        assert np.ptp(lengths[together]) < 16


def test_ranks_have_equal_work_over_a_window() -> None:
    lengths = 100 + np.arange(64)
    dealt = deal(np.random.default_rng(0).permutation(64), lengths, per_device_batch_size=4, num_ranks=4)
    work = [lengths[list(chain.from_iterable(window))].sum() for window in dealt]
    assert max(work) < 1.005 * min(work), "dealt in one direction the last rank would have a tenth more than the first"


@pytest.mark.parametrize("first", [0, 1, 5, 6, 7, 11, 12, 17])
def test_resuming_at_any_step_gives_the_same_tail(first: int) -> None:
    data = order(45, repeats=np.full(45, 1.3))
    sizes: Any = {"per_device_batch_size": 2, "num_ranks": 2}
    whole = list(windows(data, 0, 18, **sizes))
    assert len(whole) == 18
    assert list(windows(data, first, 18, **sizes)) == whole[first:]


def test_the_order_has_no_end_but_the_number_of_steps() -> None:
    steps = windows(order(20), 10**6, 10**6 + 2, per_device_batch_size=8, num_ranks=1)
    assert len(list(islice(steps, 5))) == 2


def test_whole_repeats_are_exact() -> None:
    repeats = np.array([1.0, 2.0, 3.0, 0.0])
    data = Order(lengths=np.full(4, 9), seed=0, global_batch_size=4, repeats=repeats)
    assert data.examples_per_epoch == 6 and data.steps_per_epoch == 2
    for epoch in range(3):
        assert np.bincount(np.concatenate(data.epoch(epoch)), minlength=4).tolist() == [1, 2, 3, 0]


def test_fractions_of_repeats_are_drawn_anew_each_epoch_and_come_out_on_average() -> None:
    repeats = np.repeat([0.25, 1.5], 40)
    data = Order(lengths=np.full(80, 9), seed=0, global_batch_size=7, repeats=repeats)
    assert data.examples_per_epoch == 70
    counts = np.array([np.bincount(np.concatenate(data.epoch(epoch)), minlength=80) for epoch in range(200)])
    assert (counts.sum(axis=1) == 70).all()
    assert set(counts[:, :40].flat) == {0, 1} and set(counts[:, 40:].flat) == {1, 2}
    assert np.abs(counts.mean(axis=0) - repeats).max() < 0.15
    assert (counts[0] != counts[1]).any()


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.01, 3), min_size=1, max_size=50), epoch=st.integers(0, 3))
def test_any_weights_give_an_epoch_of_their_sum(weights: list[float], epoch: int) -> None:
    repeats = np.array(weights)
    data = Order(lengths=np.full(len(weights), 9), seed=0, global_batch_size=3, repeats=repeats)
    counts = np.bincount(np.concatenate([np.zeros(0, dtype=int), *data.epoch(epoch)]), minlength=len(weights))
    assert counts.sum() == data.examples_per_epoch == round(float(repeats.sum()))
    assert (np.abs(counts - repeats) <= 1).all()


def test_a_batch_may_keep_its_order() -> None:
    batch, lengths = np.array([5, 0, 3, 1, 4, 2, 7, 6]), np.arange(8)
    (rank,) = deal(batch, lengths, per_device_batch_size=2, num_ranks=1, keeps_order=True)
    assert rank == [[5, 0], [3, 1], [4, 2], [7, 6]]
    two = deal(batch, lengths, per_device_batch_size=2, num_ranks=2, keeps_order=True)
    assert sorted(part for own in two for part in own) == sorted(rank)
