"""Two ranks take the same steps as one process. Scaling bugs are invisible on one process, so this is two real ones."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import (
    PARITY,
    Tables,
    distance,
    metrics,
    mixed_records,
    predictions,
    tables,
    talk,
    trained,
    without_times,
    write_records,
)

from llava_accel.recipe import make_recipe
from llava_accel.train import train

ROOT = PARITY.parents[1]
TOLERANCE = 1e-5
# Windows of four, the last with one row: fewer than there are ranks.
NUM_TRAINED, NUM_EVALUATED, STEPS = 13, 7, 8
MUTANTS = ("rank factor dropped", "per-rank target count")


@dataclass(frozen=True)
class Runs:
    """Folders of the runs of one process and of two."""

    alone: Path
    pair: Path
    alone_sgd: Path
    pair_sgd: Path
    mutants: dict[str, Path]


def _records() -> list[dict[str, object]]:
    texts = [talk(f"text{number}", "Tell me.", "a word " * (1 + number)) for number in range(6)]
    return [*mixed_records(NUM_TRAINED - len(texts)), *texts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trains in this process, and once more in two launched processes; the mutants in the same launch."""
    folder = tmp_path_factory.mktemp("two_ranks")
    data = write_records(folder / "data.json", _records())
    evaluation = write_records(folder / "eval.json", mixed_records(NUM_EVALUATED))

    def adam(name: str, size: int) -> Tables:
        return tables(
            folder / name,
            data,
            model={"train_vision": True},
            data={"eval": str(evaluation), "group_by_length": False},
            eval={"at_start": True},
            train={"max_steps": STEPS, "per_device_batch_size": size},
        )

    def sgd(name: str, size: int, accumulation: int) -> Tables:
        # Adam hides a wrong scale that is the same in every step, and so does clipping.
        return tables(
            folder / name,
            data,
            optim={"optimizer": "sgd", "learning_rate": 0.5, "projector_learning_rate": 0.5, "max_grad_norm": 0.0},
            train={"max_steps": STEPS, "per_device_batch_size": size, "accumulation_steps": accumulation},
        )

    jobs: list[dict[str, Any]] = [
        {"tables": adam("pair", 2), "mutant": ""},
        {"tables": sgd("pair_sgd", 1, 2), "mutant": ""},
    ]
    jobs += [{"tables": sgd(f"mutant {name}", 1, 2), "mutant": name} for name in MUTANTS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    profile = ["--config_file", str(ROOT / "launch" / "ddp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    command = [*launch, *profile, str(ROOT / "tests" / "drive_ranks.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    train(make_recipe(adam("alone", 4)))
    train(make_recipe(sgd("alone_sgd", 4, 1)))
    return Runs(
        *(folder / name / "run" for name in ("alone", "pair", "alone_sgd", "pair_sgd")),
        {name: folder / f"mutant {name}" / "run" for name in MUTANTS},
    )


def _differences(one: Path, other: Path) -> tuple[float, float]:
    """How far two runs are apart in weights, and in the losses of training and evaluation: relative."""
    pairs = [(a, b) for a, b in zip(metrics(one), metrics(other), strict=True)]
    losses = [
        (a.get("loss", a.get("eval", {}).get("loss")), b.get("loss", b.get("eval", {}).get("loss"))) for a, b in pairs
    ]
    assert sum("loss" in a for a, _ in pairs) == STEPS
    weights = distance(trained(one / "export"), trained(other / "export"))
    return weights, max(abs(a / b - 1) for a, b in losses)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_two_ranks_take_the_same_steps_as_one(runs: Runs, optimizer: str) -> None:
    pair, alone = (runs.pair, runs.alone) if optimizer == "adam" else (runs.pair_sgd, runs.alone_sgd)
    assert max(_differences(pair, alone)) < TOLERANCE


def test_two_ranks_see_the_same_examples_as_one(runs: Runs) -> None:
    counts = ("num_targets", "num_tokens", "num_examples")
    pair, alone = (
        [[line[c] for c in counts] for line in metrics(run) if "loss" in line] for run in (runs.pair, runs.alone)
    )
    assert pair == alone
    assert [numbers[2] for numbers in pair] == [4, 4, 4, 1] * 2


def test_the_rates_do_not_depend_on_the_number_of_ranks(runs: Runs) -> None:
    pair, alone = (
        [line["learning_rate"] for line in metrics(run) if "loss" in line] for run in (runs.pair, runs.alone)
    )
    assert pair == alone


def test_a_rank_had_text_alone_and_a_rank_had_nothing(runs: Runs) -> None:
    first, second = (json.loads((runs.pair / f"pictures-{rank}.json").read_text()) for rank in (0, 1))
    full = [(a, b) for step, (a, b) in enumerate(zip(first, second, strict=True)) if step % 4 != 3]
    assert any(min(pictures) == 0 and max(pictures) > 0 for pictures in full), "no rank had text beside pictures"
    assert all(second[step] == 0 for step in (3, 7)), "one row for two ranks"


def test_two_ranks_answer_every_row_once_and_like_one(runs: Runs) -> None:
    for step in (0, STEPS):
        file = f"predictions/step-{step:06d}.jsonl"
        (pair, losses), (alone, expected) = (predictions(run / file) for run in (runs.pair, runs.alone))
        assert [row["id"] for row in pair] == [f"r{number}" for number in range(NUM_EVALUATED)]
        assert pair == alone and losses == pytest.approx(expected, rel=TOLERANCE, abs=1e-5)
    scores = [
        [line["eval"] for line in without_times(metrics(run)) if "eval" in line] for run in (runs.pair, runs.alone)
    ]
    for one, other in zip(*scores, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_scale_over_ranks_would_be_seen(runs: Runs, mutant: str) -> None:
    assert _differences(runs.mutants[mutant], runs.alone_sgd)[0] > 10 * TOLERANCE
