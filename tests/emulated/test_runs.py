"""Runs on an emulated GPU: no device or type error, the CPU's losses, and few waits of the host for the device.

The device is device.py: tensors that say cuda:0 and hold CPU values under CUDA's rules. It lives in a process of its own
(worker.py), which is started once. To add a way to train or a switch, write one line in `RUNS` of switches.py; its run is
then held to the budget below in fp32, and in 16 bits too where its name is in `IN_BF16` or `IN_FP16`.

The budget: one wait a step, for the norm that the update needs; none a micro-batch; one a line of the log.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from emulated.switches import RUNS, STEPS, TOKENS, Life, Seen

pytestmark = pytest.mark.slow

Card = Callable[..., Any]

IN_BF16 = ("lora, shared", "lora, dropout, checkpointing", "dora", "onevision")
IN_FP16 = ("lora, shared", "onevision")


def assert_within_budget(seen: Seen) -> None:
    """No more waits than the loop needs, which the message names with their places."""
    for stage, most in (("step", seen.steps), ("line", seen.lines)):
        waits = Counter(f"{wait.place}: {wait.kind}" for wait in seen.at(stage))
        assert waits.total() == most, f"{waits.total()} waits in {most} of {stage}: {dict(waits)}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_losses_of_the_cpu_and_waits_once_a_step(card: Card, name: str) -> None:
    expected, seen = card("run", name, "fp32")
    assert seen.steps == STEPS and seen.losses == pytest.approx(expected, rel=1e-5)
    assert_within_budget(seen)


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16") for name in IN_BF16), *((name, "fp16") for name in IN_FP16)]
)
def test_in_16_bits_it_rounds_and_waits_no_more(card: Card, name: str, precision: str) -> None:
    expected, seen = card("run", name, precision)
    rounding = {"bf16": 2e-2, "fp16": 2.5e-3}[precision]  # of 8 and 11 bits
    assert seen.losses == pytest.approx(expected, rel=rounding) and seen.losses != pytest.approx(expected, rel=1e-8)
    assert_within_budget(seen)


def test_a_step_that_overflows_waits_twice_more_and_is_the_same_step(card: Card) -> None:
    expected, seen, overflows = card("overflow")
    assert seen.losses == pytest.approx(expected, rel=1e-4) and overflows > 0
    assert len(seen.at("step")) == seen.steps + 2 * overflows


@pytest.mark.parametrize("how", ["a wait a step", "a wait a micro-batch"])
def test_a_wait_that_is_put_back_is_seen(card: Card, how: str) -> None:
    with pytest.raises(AssertionError, match=r"waits in 3 of step: .*loop/step.py"):
        assert_within_budget(card("spoilt", how))


def test_a_tensor_that_is_left_on_the_cpu_is_seen(card: Card) -> None:
    with pytest.raises(AssertionError, match=r"Refused: mul: .* on the CPU, .* on the device, at model/objective.py"):
        card("spoilt", "a tensor on the CPU")


@pytest.fixture(scope="module")
def lives(card: Card) -> tuple[Life, Life]:
    """The same run from its start to its end on the CPU and on the device."""
    return card("live", "lora", on_device=False), card("live", "lora", on_device=True)


def _numbers(life: Life) -> list[float]:
    found = [line["loss"] if "loss" in line else line["eval"] for line in life.lines]
    return [number for each in found for number in (each.values() if isinstance(each, dict) else [each])]


def test_a_run_with_evaluations_that_is_resumed_comes_to_the_numbers_of_the_cpu(lives: tuple[Life, Life]) -> None:
    on_cpu, on_device = lives
    assert [line["step"] for line in on_device.lines] == [line["step"] for line in on_cpu.lines]
    assert _numbers(on_device) == pytest.approx(_numbers(on_cpu), rel=1e-5)
    assert on_device.predictions == on_cpu.predictions
    assert "resumed from" in on_device.said


def test_its_export_is_verified_on_the_device_and_elsewhere(lives: tuple[Life, Life]) -> None:
    assert_proven(lives[1].said)
    for verb, (code, _, error) in lives[1].verbs.items():
        assert code == 0, f"{verb}: {error}"
    assert lives[1].verbs["chat"][1] == lives[0].verbs["chat"][1]
    assert lives[1].served == lives[0].served != ""


def assert_proven(said: str) -> None:
    """The export was loaded beside the run, on the same device, and computes the same."""
    assert "on the GPU in float32" in said and "3 of 3 answers are the same" in said, said[-2000:]


def test_all_weights_are_saved_resumed_and_proven_on_the_device(card: Card) -> None:
    assert_proven(card("live", "full", on_device=True).said)


def test_an_evaluation_waits_for_its_tokens_and_little_else(lives: tuple[Life, Life]) -> None:
    life = lives[1]
    waits = Counter(f"{wait.place}: {wait.kind}" for wait in life.waits if wait.stage == "evaluation")
    # Of a batch: where its answers grow, what ends them, the answers, their losses; of an evaluation its sums.
    assert 0 < waits.total() <= life.answered * (4 + TOKENS) + 6, dict(waits)


@pytest.mark.parametrize("then", ["skip", "stop"])
def test_a_gradient_that_is_not_finite_is_found_as_on_the_cpu(card: Card, then: str) -> None:
    lines, said = card("not_a_number", then, on_device=True)
    assert (lines, said) == card("not_a_number", then, on_device=False)
    assert lines and bool(said) == (then == "stop")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("step", r"out of memory in a micro-batch of 2 rows .*Set train.per_device_batch_size = 1"),
        ("update", r"out of memory in the optimizer's step"),
        ("evaluation", r"out of memory with \d questions at once; it went on with 1"),
    ],
)
def test_a_full_device_is_explained(card: Card, where: str, says: str) -> None:
    assert re.search(says, card("out_of_memory", where), re.DOTALL)


def test_a_bench_measures_steps_that_wait_once(card: Card) -> None:
    found, waits, steps = card("bench")
    assert found["tokens_per_s"] > 0 and waits == steps > 0


def test_a_plan_is_probed_on_the_device(card: Card) -> None:
    assert re.search(r"one GPU x 1: measured [\d.]+ MiB at most, planned [\d.]+", said := card("probe")), said[-2000:]
