"""The same update on any number of ranks, in any number of micro-batches, under every engine: real runs on the CPU.

The suite takes each engine with each split and each kind of training that they could disagree on, and with
LLAVA_ACCEL_ALL_KINDS=1 every combination of them.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from helpers.jobs import (
    ENGINES,
    GLOBAL_BATCH,
    TOLERANCE,
    Lab,
    assert_same_metrics,
    difference,
    trains,
    weights,
)
from helpers.kinds import ALL_KINDS
from helpers.mutants import MUTANTS
from helpers.runs import metrics, mixed_records, predictions, write_records

pytestmark = pytest.mark.slow

TRAINED = ("lora", "projector", "full")


def some_splits() -> Iterator[tuple[int, int, str, str]]:
    """Ranks, micro-batches, engine and what is trained: every engine's smallest micro-batches on two ranks with what it
    divides least and most, and beside them one other split on two ranks and one on a single rank. The tests below have two
    micro-batches on each of two ranks.
    """
    alone = dict(zip(ENGINES, (1, 2, 4, 2), strict=True))
    for engine, ranks, micro_batches, train in product(ENGINES, (1, 2), (1, 2, 4), TRAINED):
        smallest = (ranks, micro_batches) == (2, 4) and (train != "projector" or engine == "zero3")
        other = (ranks, micro_batches) in ((2, 1), (1, alone[engine]))
        if ALL_KINDS or smallest or (other and train == ("full" if ranks == 1 else "projector")):
            yield ranks, micro_batches, engine, train


@pytest.mark.parametrize(("ranks", "micro_batches", "engine", "train"), some_splits())
def test_any_split_under_any_engine_ends_as_one_micro_batch_on_one_process(
    lab: Lab, ranks: int, micro_batches: int, engine: str, train: str
) -> None:
    # With 2 x 4 a micro-batch is one record: of text alone on one rank, or none at all at the end of a short window.
    run, reference = lab.run(engine, ranks, micro_batches, **trains(train)), lab.reference(**trains(train))
    assert difference(run, reference) < TOLERANCE
    assert_same_metrics(run, reference)


def test_the_data_is_as_uneven_as_it_should_be(lab: Lab) -> None:
    lines = metrics(lab.reference(**trains("lora")))
    assert sorted(line["num_examples"] for line in lines) == [5, 8, 8]
    assert len({line["num_targets"] for line in lines}) > 2
    assert all(line["grad_norm"] > 1.0 for line in lines), "every step is clipped"


def test_a_rank_had_text_alone_and_a_rank_had_nothing(lab: Lab) -> None:
    run = lab.run("ddp", 2, 4, mutant="note_images")
    first, second = (
        [tuple(map(int, line.split())) for line in (run / f"seen-{rank}.txt").read_text().splitlines()]
        for rank in (0, 1)
    )
    together = list(zip(first, second, strict=True))
    assert any(min(a[0], b[0]) == 0 < max(a[0], b[0]) and min(a[1], b[1]) for a, b in together), "text beside images"
    assert any(min(a[1], b[1]) == 0 < max(a[1], b[1]) for a, b in together), "nothing beside something"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_data_goes_through_a_short_window_with_the_others(lab: Lab, engine: str) -> None:
    # The second window is that of the end of an epoch: three micro-batches on each rank, of four.
    run = lab.run(engine, 2, 4, mutant="no_data_for_the_second_step")
    assert [line["step"] for line in metrics(run)] == [1], "no rank has taken the second step"
    assert weights(run / "export")


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_gradient_descent_hides_no_wrong_scale(lab: Lab, engine: str) -> None:
    # Adam hides a scale that is the same in every step, and so does clipping.
    sgd = {"optimizer": "sgd", "learning_rate": 0.5, "projector_learning_rate": 0.5, "max_grad_norm": 0.0}
    reference = lab.reference(optim=sgd)
    assert difference(lab.run(engine, 2, 2, optim=sgd), reference) < TOLERANCE
    # Else an engine that clips as its profile or its default says could not be told from one that follows the recipe.
    assert difference(reference, lab.reference(optim=sgd | {"max_grad_norm": 1.0})) > 100 * TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_means_of_micro_batches_are_the_same_wherever_these_are_computed(lab: Lab, engine: str) -> None:
    data = write_records(lab.folder / "full-windows.json", mixed_records(2 * GLOBAL_BATCH))
    means: dict[str, Any] = {
        "data": {"train": str(data)},
        "train": {"loss": "micro_batch_mean", "max_steps": 2},
        "optim": {"optimizer": "sgd", "learning_rate": 0.5, "projector_learning_rate": 0.5, "max_grad_norm": 0.0},
    }
    run, reference = lab.run(engine, 2, 2, **means), lab.run("cpu", 1, 4, **means)
    assert difference(run, reference) < TOLERANCE
    assert_same_metrics(run, reference)
    means["train"] = {"max_steps": 2}
    assert difference(reference, lab.run("cpu", 1, 4, **means)) > 100 * TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluations_and_answers_are_those_of_one_process(lab: Lab, engine: str) -> None:
    few = write_records(lab.folder / "held-out.json", mixed_records(5))  # an odd number, on two ranks
    evaluated: dict[str, Any] = {
        "data": {"eval": str(few)},
        "train": {"max_steps": 2},
        "eval": {"at_start": True, "every": 2, "max_new_tokens": 3},
    }
    run, reference = lab.run(engine, 2, 2, **evaluated), lab.reference(**evaluated)
    assert [line["step"] for line in metrics(run) if "eval" in line] == [0, 2]
    assert_same_metrics(run, reference)
    found, losses = predictions(run / "predictions/step-000002.jsonl")
    expected, expected_losses = predictions(reference / "predictions/step-000002.jsonl")
    assert found == expected and [row["id"] for row in found] == [f"r{number}" for number in range(5)]
    assert losses == pytest.approx(expected_losses, rel=TOLERANCE, abs=1e-5)


@pytest.mark.parametrize(
    ("engine", "train"),
    [
        (engine, train)
        for engine, train in product(ENGINES, TRAINED)
        if ALL_KINDS or (engine, train) in zip(ENGINES, ("projector", "full", "lora", "full"), strict=True)
    ],
)
def test_every_engine_takes_its_best_weights_back_for_the_export(lab: Lab, engine: str, train: str) -> None:
    # No answer is ever right, so that the first evaluation stays the best.
    worsening: dict[str, Any] = {
        "data": {"eval": str(lab.folder / "data.json")},
        "eval": {"metric": "exact_match", "every": 2, "max_new_tokens": 1, "blind_limit": 0, "limit": 4},
    }
    run = lab.run(engine, 2, 2, **trains(train), **worsening)
    best, exported, last = (weights(run / place) for place in ("best", "export", "checkpoints/step-000003"))
    assert all(torch.equal(exported[name], best[name]) for name in best) and exported.keys() == best.keys()
    assert any(not torch.equal(exported[name], last[name]) for name in last), "the last step must not be the best"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_exactness_fails_with(lab: Lab, mutant: str) -> None:
    assert difference(lab.run("ddp", 2, 4, mutant=mutant), lab.reference(**trains("lora"))) > 100 * TOLERANCE
