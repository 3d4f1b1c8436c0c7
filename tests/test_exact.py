"""The same data gives the same update however a global batch is split into micro-batches, and wrong scales are seen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import llava_accel.train as verb
from helpers.runs import distance, metrics, mixed_records, recipe, trained, write_records
from llava_accel.loop import step as step_file
from llava_accel.loop.step import count_over_ranks, gradient_sync
from llava_accel.model.objective import Objective

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
STEPS = 5
# Three steps an epoch; the last of the first epoch has 3 examples, which 8x1 does not even fill.
NUM_RECORDS = 19
SPLITS = {"2x4": (2, 4), "4x2": (4, 2), "8x1": (8, 1)}

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains once for each (accumulation, micro-batch, settings) and returns the run folder."""
    folder = tmp_path_factory.mktemp("exact")
    data = write_records(folder / "data.json", mixed_records(NUM_RECORDS))
    finished: dict[str, Path] = {}

    def go(accumulation: int, size: int, name: str = "", share_prefix: bool = False, **optim: object) -> Path:
        key = f"{accumulation}x{size} {name} {share_prefix} {optim}"
        if key not in finished:
            place = folder / f"run{len(finished)}"
            verb.train(
                recipe(
                    place,
                    data,
                    model={"train_vision": True},
                    data={"share_prefix": share_prefix},
                    optim={"vision_learning_rate": 1e-3, **optim},
                    train={"max_steps": STEPS, "accumulation_steps": accumulation, "per_device_batch_size": size},
                )
            )
            finished[key] = place / "run"
        return finished[key]

    return go


def differences(one: Path, other: Path) -> dict[str, float]:
    """How far two runs are apart: relative, in every trained tensor, loss and gradient norm."""
    lines = list(zip(metrics(one), metrics(other), strict=True))
    assert len(lines) == STEPS
    return {
        "weights": distance(trained(one / "export"), trained(other / "export")),
        **{name: max(abs(a[name] / b[name] - 1) for a, b in lines) for name in ("loss", "grad_norm")},
    }


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("split", SPLITS)
def test_accumulation_takes_the_same_steps_as_one_batch(run: Run, split: str, max_grad_norm: float) -> None:
    whole, parts = (run(*sizes, max_grad_norm=max_grad_norm) for sizes in ((1, 8), SPLITS[split]))
    assert max(differences(parts, whole).values()) < TOLERANCE


@pytest.mark.parametrize("accumulation", [1, 4])
def test_shared_prefixes_take_the_same_steps_as_separate_rows(
    run: Run, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All data in every step, so that both ways see the same examples whatever order they prefer.
    # Without Adam, whose first steps scale the rounding of a tiny gradient up to the size of a step.
    optim = {"optimizer": "sgd", "learning_rate": 0.5, "projector_learning_rate": 0.5, "max_grad_norm": 0.0}
    separate = run(1, 20, **optim)
    branched, forward = [], Objective.forward

    def noting(self: Objective, **batch: Any) -> Tensor:
        branched.append(batch["branched"])
        return forward(self, **batch)

    monkeypatch.setattr(Objective, "forward", noting)
    shared = run(accumulation, 20 // accumulation, share_prefix=True, **optim)
    assert any(branched), "some of these records share an image"
    assert max(differences(shared, separate).values()) < TOLERANCE


def test_the_data_is_as_uneven_as_it_should_be(run: Run) -> None:
    lines = metrics(run(1, 8, max_grad_norm=0.0))
    assert [line["num_examples"] for line in lines] == [8, 8, 3, 8, 8]
    assert len({line["num_targets"] for line in lines}) > 3


def test_clipping_changes_the_update(run: Run) -> None:
    clipped = run(1, 8, max_grad_norm=0.1)
    assert all(line["grad_norm"] > 0.1 for line in metrics(clipped)), "every step is clipped"
    assert distance(trained(clipped / "export"), trained(run(1, 8, max_grad_norm=0.0) / "export")) > 1e-4


# Wrong ways to scale a window, as other trainers have had them. Each must be seen by the comparison above.


def _count_as(monkeypatch: pytest.MonkeyPatch, number: Callable[[Sequence[Tensor]], Tensor]) -> None:
    """Divide by another number, made of the weight of each micro-batch's targets."""
    monkeypatch.setattr(step_file, "count_over_ranks", lambda own, flags, _: (number(own), flags))


def _mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Objective.forward

    def mean(self: Objective, **batch: Any) -> Tensor:
        return forward(self, **batch) / batch["target_weights"].sum()

    monkeypatch.setattr(Objective, "forward", mean)
    _count_as(monkeypatch, lambda own: torch.tensor(float(len(own))))


def _count_of_the_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    _count_as(monkeypatch, lambda own: own[-1])


def _sum_without_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _count_as(monkeypatch, lambda own: torch.tensor(1.0))


def _divided_by_the_number_of_micro_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, flags = Accelerator(cpu=True), torch.zeros(1)
    _count_as(monkeypatch, lambda own: count_over_ranks(own, flags, accelerator)[0] * len(own))


def _only_the_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def forgetful(accelerator: Accelerator, model: nn.Module, *, enabled: bool) -> Iterator[None]:
        model.zero_grad()
        with gradient_sync(accelerator, model, enabled=enabled):
            yield

    monkeypatch.setattr(step_file, "gradient_sync", forgetful)


def _every_weight_the_same_whatever_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_examples(window: Sequence[dict[str, Any]], _: Any, __: str, ___: Accelerator, flags: Tensor) -> Any:
        number = torch.tensor(float(sum(len(micro_batch["indices"]) for micro_batch in window)))
        return [number] * len(window), flags

    monkeypatch.setattr(step_file, "loss_divisors", num_examples)


@pytest.mark.parametrize(
    "mutant",
    [
        _mean_of_means,
        _count_of_the_last_micro_batch,
        _sum_without_a_count,
        _divided_by_the_number_of_micro_batches_too,
        _only_the_last_micro_batch,
        _every_weight_the_same_whatever_the_example,
    ],
)
def test_a_wrong_scale_would_be_seen(
    run: Run, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(1, 8, max_grad_norm=0.0)
    mutant(monkeypatch)
    assert differences(run(4, 2, name=mutant.__name__, max_grad_norm=0.0), whole)["weights"] > 10 * TOLERANCE
