"""fp16: an overflow costs time and nothing else, and the numbers are those of fp32, rounded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import llava_accel.train as verb
from helpers.interrupted import train_until
from helpers.runs import distance, losses, metrics, mixed_records, recipe, tables, trained, without_times, write_records
from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.loop import loss_scale
from llava_accel.loop.loss_scale import LossScale
from llava_accel.model.objective import Objective
from llava_accel.recipe import make_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.state import TrainState

STEPS = 5
ROUNDING = 2.0**-11
"""fp16 has 11 bits: what each number of a forward pass may be off by, as a share of it."""
FINITE, INFINITE = [torch.tensor(2.0)], [torch.tensor(float("inf"))]


def scale(folder: Path, precision: str = "fp16", **state: float | int) -> tuple[LossScale, TrainState]:
    found = TrainState(num_steps=10, steps_per_epoch=10)
    vars(found).update(state)
    run = RunContext(recipe(folder, run={"precision": precision}), Accelerator(cpu=True), Console())
    return LossScale(run, found), found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_other_types_have_no_scale(tmp_path: Path, precision: str) -> None:
    found, state = scale(tmp_path, precision)
    assert found.value == 1.0 and not found.repeats(FINITE, float("inf"))
    assert (state.loss_scale, state.num_overflows) == (2.0**16, 0)


def test_an_overflow_halves_the_scale_and_is_said_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, state = scale(tmp_path, steps_without_overflow=7, step=4)
    assert found.repeats(FINITE, float("nan")) and found.repeats(FINITE, float("inf"))
    assert not found.repeats(FINITE, 1.0)
    assert (found.value, state.num_overflows, state.steps_without_overflow) == (2.0**14, 2, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("step 5: a gradient is larger than fp16 holds") == 2
    assert "at a loss scale of 65,536; the step is computed once more at 32,768, and nothing of it is lost" in said


@pytest.mark.parametrize(("losses_found", "lowest"), [(FINITE, 1.0), (INFINITE, 2.0**16)])
def test_what_no_scale_can_change_is_not_repeated_and_leaves_the_scale_as_it_was(
    tmp_path: Path, losses_found: list[torch.Tensor], lowest: float
) -> None:
    found, state = scale(tmp_path)
    values = [found.value]
    while found.repeats(losses_found, float("inf")):
        values.append(found.value)
    assert values[-1] == lowest and found.value == 2.0**16
    assert state.num_overflows == len(values) - 1 <= 16


def test_the_scale_grows_again_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "_GROWS_AFTER", 3)
    found, _ = scale(tmp_path, loss_scale=2.0**22)
    values = [(found.repeats(FINITE, 1.0), found.value)[1] for _ in range(12)]
    assert values == [2.0**22] * 2 + [2.0**23] * 3 + [2.0**24] * 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("fp16") / "data.json", mixed_records(17))


def keys(folder: Path, data: Path, precision: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """Plain gradient descent hides no wrong scale, as Adam and clipping do; every second step is clipped."""
    return tables(
        folder,
        data,
        run={"precision": precision},
        model={"lora": {"dropout": 0.1}},
        optim={"optimizer": "sgd", "learning_rate": 0.2, "projector_learning_rate": 0.2, "max_grad_norm": 1.0},
        train={"max_steps": STEPS, "per_device_batch_size": 2, "accumulation_steps": 2},
        **changes,
    )


def run(folder: Path, data: Path, precision: str, start: float = 2.0**16, **changes: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        made = TrainState.of
        patch.setattr(TrainState, "of", lambda *given: _started(made(*given), start))
        verb.train(make_recipe(keys(folder, data, precision, **changes)))
    return folder / "run"


def _started(state: TrainState, start: float) -> TrainState:
    state.loss_scale = start
    return state


def assert_same_bits(one: Path, other: Path) -> None:
    before, after = trained(one / "export"), trained(other / "export")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.fixture(scope="module")
def exact(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("fp32"), data, "fp32")


@pytest.fixture(scope="module")
def overflowing(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts at a scale at which every gradient overflows."""
    return run(tmp_path_factory.mktemp("high"), data, "fp16", 2.0**30, checkpoint={"every": 1, "keep": 10})


def test_it_trains_as_in_fp32_up_to_rounding(exact: Path, overflowing: Path) -> None:
    assert losses(overflowing) == pytest.approx(losses(exact), rel=4 * ROUNDING)
    assert losses(overflowing) != losses(exact), "it was not computed in fp16"
    norms = [[line["grad_norm"] for line in metrics(folder)] for folder in (overflowing, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=20 * ROUNDING)
    assert distance(trained(overflowing / "export"), trained(exact / "export")) < 20 * ROUNDING
    assert not any("loss_scale" in line for line in metrics(exact))


def test_an_overflow_changes_neither_schedule_nor_order_nor_any_number(
    data: Path, exact: Path, overflowing: Path, tmp_path: Path
) -> None:
    lines = metrics(overflowing)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["num_overflows"] >= 5 and lines[0]["loss_scale"] == 2.0 ** (30 - lines[0]["num_overflows"])
    for key in ("learning_rate", "num_targets", "num_examples"):
        assert [line[key] for line in lines] == [line[key] for line in metrics(exact)]
    # The same from a scale on at which the first step does not overflow.
    straight = run(tmp_path, data, "fp16", lines[0]["loss_scale"])
    counts = [line["num_overflows"] - lines[0]["num_overflows"] for line in lines]
    assert [line["num_overflows"] for line in metrics(straight)] == counts and counts[0] == 0
    assert losses(straight) == losses(overflowing)
    assert_same_bits(straight, overflowing)


def test_a_run_that_broke_off_goes_on_with_its_scale_and_counts(data: Path, overflowing: Path, tmp_path: Path) -> None:
    settings = keys(tmp_path, data, "fp16", checkpoint={"every": 1, "keep": 10})
    with pytest.MonkeyPatch.context() as patch:
        made = TrainState.of
        patch.setattr(TrainState, "of", lambda *given: _started(made(*given), 2.0**30))
        train_until(settings, 3)
    verb.train(make_recipe(settings))
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(overflowing))
    assert_same_bits(tmp_path / "run", overflowing)


def test_a_loss_that_is_no_number_is_reported_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = Objective.forward, []

    def poisoned(self: Objective, **batch: Any) -> torch.Tensor:
        calls.append(1)
        return right(self, **batch) * float("nan")

    monkeypatch.setattr(Objective, "forward", poisoned)
    with pytest.raises(UserError, match=r'step 1: .* not finite .* run\.precision = "fp32"'):
        run(tmp_path, data, "fp16")
    assert len(calls) == 4, "two micro-batches, and two to find the module"


def test_frozen_weights_are_kept_in_fp16_and_trained_ones_in_fp32(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, data, "fp16")
    said = " ".join(capsys.readouterr().out.split())
    assert "in float16" in said and "in float32" in said and "device CPU, fp16" in said
