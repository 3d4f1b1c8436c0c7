"""Windows: one count, one synchronisation, and randomness that is a function of (seed, step, rank)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import llava_accel.train as verb
from helpers.runs import metrics, mixed_records, recipe, trained, write_records
from llava_accel.data.collate import collate
from llava_accel.loop import step as step_file
from llava_accel.loop.step import Step, clip_gradients, count_over_ranks, gradient_sync, loss_divisors
from llava_accel.setup.state import seed_step

FLAGS = torch.zeros(3)


def test_the_count_is_over_the_whole_window_and_an_empty_micro_batch_adds_nothing() -> None:
    own = [torch.tensor(1.5), torch.tensor(0.0), torch.tensor(3.0)]
    assert count_over_ranks(own, FLAGS, Accelerator(cpu=True))[0].item() == 4.5


def test_what_ranks_know_of_signals_is_summed_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, own = Accelerator(cpu=True), [torch.tensor(2.0)]
    monkeypatch.setattr(accelerator, "reduce", lambda sums, reduction: sums + torch.tensor([5.0, 0.0, 0.0, 1.0]))
    number, flags = count_over_ranks(own, torch.tensor([0.0, 1.0, 0.0]), accelerator)
    assert (number.item(), flags.tolist()) == (7.0, [0.0, 1.0, 1.0])
    number, _ = count_over_ranks(own, torch.tensor([math.nan, 0.0, 0.0]), accelerator)
    assert math.isnan(number), "a rank has no data"


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


def weight(batch: Mapping[str, Any]) -> Tensor:
    return batch["target_weights"].sum()


def test_divisors_of_means_leave_out_a_micro_batch_without_targets() -> None:
    empty = collate([], {}, (3, 4, 4))
    weights = [torch.tensor([1.0, 0.5]), torch.zeros(0), torch.ones(3)]
    window = [{**empty, "target_weights": own} for own in weights]
    accelerator = Accelerator(cpu=True)
    assert [float(own) for own in loss_divisors(window, weight, "tokens", accelerator, FLAGS)[0]] == [4.5] * 3
    means, _ = loss_divisors(window, weight, "micro_batch_mean", accelerator, FLAGS)
    assert [float(own) for own in means] == [1.5 * 2, 1.0 * 2, 3.0 * 2]
    means, _ = loss_divisors([empty], weight, "micro_batch_mean", accelerator, FLAGS)
    assert [float(own) for own in means] == [0.0], "then it is refused"


SGD = {"optimizer": "sgd", "learning_rate": 0.5, "projector_learning_rate": 0.5, "max_grad_norm": 0.0}
SGD |= {"schedule": "constant", "warmup_fraction": 0.0}


def one_update(folder: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights after one plain step over eight records and its line; (loss sum, targets) of each micro-batch in it."""
    data = write_records(folder / "data.json", mixed_records(8))
    seen: list[tuple[float, float]] = []
    right = step_file.train_step

    def noting(run: Any, prepared: Any, window: Sequence[Any], *rest: Any) -> Step:
        found = right(run, prepared, window, *rest)
        assert found is not None
        seen.extend((float(s), float(b["target_weights"].sum())) for s, b in zip(found.losses, window, strict=True))
        return found

    monkeypatch.setattr(verb, "train_step", noting)
    folder = folder / "-".join(map(str, train.values()))
    verb.train(recipe(folder, data, optim=SGD, train={"max_steps": 1, **train}))
    (line,) = metrics(folder / "run")
    return trained(folder / "run" / "export"), line | {"seen": seen}


def test_the_loss_and_gradient_of_means_are_the_mean_of_the_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 x 4 against the formula: the update is the mean of those of its micro-batches, each by its own tokens."""
    split = {"per_device_batch_size": 2, "accumulation_steps": 4}
    means, line = one_update(tmp_path, monkeypatch, **split, loss="micro_batch_mean")
    assert len(line["seen"]) == 4 and len({number for _, number in line["seen"]}) > 1
    assert line["loss"] == pytest.approx(sum(total / number for total, number in line["seen"]) / 4, rel=1e-6)
    tokens, other = one_update(tmp_path, monkeypatch, **split, loss="tokens")
    assert other["loss"] == pytest.approx(
        sum(total for total, _ in line["seen"]) / sum(number for _, number in line["seen"]), rel=1e-6
    )
    # By hand: the summed gradient of each micro-batch alone, from updates in which only its loss counts.
    parts = []
    for place in range(4):

        def only(
            window: Sequence[Any], _: Any, loss: str, accelerator: Accelerator, flags: Tensor, place: int = place
        ) -> Any:
            numbers = [batch["target_weights"].sum() for batch in window]
            return [number if own == place else torch.tensor(torch.inf) for own, number in enumerate(numbers)], flags

        with monkeypatch.context() as patch:
            patch.setattr(step_file, "loss_divisors", only)
            parts.append(one_update(tmp_path, monkeypatch, **split, spike_factor=float(place + 2))[0])
    for name, tensor in means.items():
        torch.testing.assert_close(tensor, torch.stack([part[name] for part in parts]).mean(0), rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(means[name], tokens[name], rtol=1e-4, atol=1e-5) for name in means)
