"""A row is the examples that went into it: each path, place and target can be read back, and no prefix stands twice."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rows import LENGTH, Drawn, build, key_paths, keys, make, paths, some
from llava_accel.data.tiling import ImageView
from llava_accel.data.trie import build_row, chain


@settings(deadline=None, max_examples=150)
@given(drawn=some)
def test_every_example_is_a_path_of_the_row(drawn: Drawn) -> None:
    examples = build(drawn)
    row = build_row(examples)
    found = set(key_paths(row))
    assert all(keys(example) in found for example in examples)
    assert row.indices == tuple(example.index for example in examples)


@settings(deadline=None, max_examples=150)
@given(drawn=some)
def test_a_token_attends_to_its_own_path_and_to_nothing_else(drawn: Drawn) -> None:
    examples = build(drawn)
    row = build_row(examples)
    place = np.arange(len(row))
    attends = (place[None, :] <= place[:, None]) & (place[:, None] < row.subtree_end[None, :])
    for token, path in enumerate(paths(row)):
        assert np.flatnonzero(attends[token]).tolist() == path
        assert row.position_ids[token] == len(path) - 1


@settings(deadline=None, max_examples=150)
@given(drawn=some, weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=6, max_size=6))
def test_every_target_stands_once_behind_its_own_prefix_with_its_weight(drawn: Drawn, weights: list[float]) -> None:
    examples = [replace(each, weight=weight) for each, weight in zip(build(drawn), weights, strict=False)]
    row = build_row(examples)
    wanted = Counter(
        (keys(example)[:place], int(example.input_ids[place]), example.weight)
        for example in examples
        for place in np.flatnonzero(example.is_target)
    )
    behind = key_paths(row)
    targets = zip(row.target_positions, row.target_ids, row.target_weights, strict=True)
    assert Counter((behind[place], int(id), float(weight)) for place, id, weight in targets) == wanted


@settings(deadline=None, max_examples=150)
@given(drawn=some)
def test_a_shared_row_holds_every_prefix_exactly_once(drawn: Drawn) -> None:
    examples = build(drawn)
    row = build_row(examples)
    prefixes = {keys(example)[: end + 1] for example in examples for end in range(len(example.input_ids))}
    assert Counter(key_paths(row)) == Counter(prefixes)
    assert len(row) <= sum(len(example.input_ids) for example in examples)


def test_a_chain_is_one_example_with_weight_one() -> None:
    row = chain(make([1], "a", [2, 3], targets={4, 5}, index=7))
    assert row.input_ids.tolist() == [1, 99, 99, 99, 2, 3]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert row.subtree_end.tolist() == [6] * 6
    assert row.target_positions.tolist() == [3, 4] and row.target_ids.tolist() == [2, 3]
    assert row.target_weights.tolist() == [1.0, 1.0]
    assert (row.image_starts, row.images, row.indices) == ((1,), (ImageView("a", LENGTH),), (7,))


def test_questions_on_one_image_share_it_and_those_on_another_do_not() -> None:
    questions = [make([1], "a", [5, 6]), make([1], "a", [7]), make([1], "b", [5, 6])]
    row = build_row(questions)
    assert [view.file for view in row.images] == ["a", "b"]
    assert len(row) == (1 + 3 + 2 + 1) + (3 + 2)


def test_two_images_side_by_side_are_two_images() -> None:
    row = build_row([make("a", "b", [1]), make("a", "a", [1]), make("a", [1])])
    assert [view.file for view in row.images] == ["a", "b", "a"]
    assert len(row) == 3 + (3 + 1) + (3 + 1) + 1


def test_many_examples_that_each_go_on_from_the_last_fit_a_row() -> None:
    """A conversation cut at each of its turns: every branch lies in the one before."""
    row = build_row([make(list(range(1, 2 + n))) for n in range(1050)])
    assert len(row) == 1050
