"""The nearest pictures are those of a search that compares all at once, and few are held at a time."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llava_accel.data import nearest as module
from llava_accel.data.nearest import nearest


def test_the_nearest_are_those_of_one_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 64)
    generator = torch.Generator().manual_seed(0)
    known, asked = torch.randn(1000, 16, generator=generator), torch.randn(7, 16, generator=generator)
    found = nearest(list(asked), ((10 * number, each) for number, each in enumerate(known)), 3)
    values, places = torch.nn.functional.cosine_similarity(asked[:, None], known[None], dim=2).topk(3)
    assert [[near.number for near in each] for each in found] == (10 * places).tolist()
    torch.testing.assert_close(torch.tensor([[near.similarity for near in each] for each in found]), values)


def test_where_there_are_few_or_none_all_of_them_are_found() -> None:
    one = torch.tensor([3.0, 4.0])
    assert nearest([one], iter([(5, 2 * one), (6, -one)]), 3) == [[(5, pytest.approx(1)), (6, pytest.approx(-1))]]
    assert nearest([one], iter([]), 3) == [[]] and nearest([], iter([(1, one)]), 3) == []


def test_of_many_pictures_few_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 64)
    alive = peak = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def pictures() -> Iterator[tuple[int, Tensor]]:
        nonlocal alive, peak
        for number in range(6400):
            each = torch.tensor([float(number % 977), 1.0, float(number == 4777)])
            weakref.finalize(each, gone)
            alive += 1
            peak = max(peak, alive)
            yield number, each
            del each

    ((first, *_),) = nearest([torch.tensor([0.0, 0.0, 1.0])], pictures(), 3)
    assert first.number == 4777 and peak <= 3 * module._AT_ONCE
