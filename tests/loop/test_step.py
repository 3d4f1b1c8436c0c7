"""Windows: one count, one synchronisation, and randomness that is a function of (seed, step, rank)."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from llava_accel.data.collate import collate
from llava_accel.loop.step import clip_gradients, count_targets, gradient_sync
from llava_accel.setup.state import seed_step


def test_the_count_is_over_the_whole_window_and_an_empty_micro_batch_adds_nothing() -> None:
    empty = collate([], {}, (3, 4, 4))
    window = [{**empty, "target_weights": torch.tensor([1.0, 0.5])}, empty, {**empty, "target_weights": torch.ones(3)}]
    assert count_targets(window, Accelerator(cpu=True)).item() == 4.5


def test_gradients_are_synchronised_where_it_is_enabled_alone() -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(1, 1)
    seen = []
    for enabled in (False, False, True):
        with gradient_sync(accelerator, model, enabled=enabled):
            seen.append(accelerator.sync_gradients)
        assert accelerator.sync_gradients is enabled, "the optimizer asks after the block"
    assert seen == [False, False, True]


def test_a_window_that_is_left_early_is_no_silent_step() -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(1, 1)
    with gradient_sync(accelerator, model, enabled=False):
        model(torch.ones(1)).backward()
    with pytest.raises(AssertionError, match="before its last micro-batch"):
        clip_gradients(accelerator, model, 1.0)
    with gradient_sync(accelerator, model, enabled=True):
        pass


def test_the_norm_is_the_one_before_clipping_and_0_clips_nothing() -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(2, 1, bias=False)
    for limit, expected in ((0.0, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip_gradients(accelerator, model, limit).item() == pytest.approx(5.0)
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def _draw(seed: int, step: int, rank: int) -> tuple[float, ...]:
    seed_step(seed, step, rank)
    return tuple(torch.rand(4).tolist())


def test_every_seed_step_and_rank_draws_its_own_numbers_and_the_same_again() -> None:
    places = list(itertools.product((0, 1, 42, 2**31), range(6), range(4)))
    draws = {_draw(*place) for place in places}
    assert len(draws) == len(places)
    assert _draw(42, 3, 1) == _draw(42, 3, 1)
