"""The ledger knows at each moment of a step what is there, and forgets none that could be the peak."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_accel.estimate.peak_memory import Layout, Weights, plan_for
from llava_accel.estimate.trace import Ledger, Moment, highest
from llava_accel.recipe import make_recipe

ROWS, WIDTH, VOCABULARY = 7, 64, 100


def test_every_tensor_counts_once_as_what_it_is_until_it_is_gone() -> None:
    with FakeTensorMode():
        first = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(WIDTH, VOCABULARY, bias=False))
        with Ledger(model, [VOCABULARY]) as ledger:
            inputs = torch.empty(ROWS, WIDTH)
            logits = model[2](model[1](model[0](inputs.bfloat16())).float())
            forward = ledger.moments[-1]
            logits.sum().backward()
            del logits
            torch.empty(())
            end = ledger.moments[-1]
    assert forward.logits == 4 * ROWS * VOCABULARY and forward.gradients == forward.copies == 0
    # Inputs in both types, what ReLU keeps, and that in fp32.
    assert forward.activations == (4 + 2 + 2 + 4) * ROWS * WIDTH
    assert end.gradients == 2 * WIDTH * WIDTH + 4 * WIDTH * VOCABULARY and end.logits == 0
    assert end.activations < forward.activations


def test_copies_of_weights_are_told_from_activations() -> None:
    with FakeTensorMode():
        model = nn.Linear(WIDTH, WIDTH, bias=False)
        with Ledger(model, []) as ledger, torch.autocast("cpu", torch.bfloat16):
            model(torch.empty(ROWS, WIDTH))
    assert max(moment.copies for moment in ledger.moments) == 2 * WIDTH * WIDTH


def test_the_peak_of_ranks_that_divide_gradients_may_be_another_moment() -> None:
    copies, backward = Moment(activations=10, copies=60), Moment(activations=10, gradients=80)
    assert set(highest([copies, backward, Moment(activations=9, gradients=70)])) == {copies, backward}


def test_gradients_replace_activations_unless_they_are_of_an_earlier_micro_batch() -> None:
    weights = Weights(100, 100, 0, 0, 0, 0, 100, 1, 400)
    settings = make_recipe({"run": {"name": "t"}, "model": {"base": "x", "train": "full"}, "data": {"train": "x.json"}})
    replaced = plan_for(Layout("one GPU"), weights, settings, [Moment(1000), Moment(300, gradients=400)], on_gpu=False)
    beside = plan_for(Layout("one GPU"), weights, settings, [Moment(1000, gradients=400)], on_gpu=False)
    assert (replaced.total, beside.total) == (1200 + 1000, 1200 + 1400)
