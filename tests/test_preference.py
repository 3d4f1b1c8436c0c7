"""Preference tuning keeps the promises that training on answers keeps: one update however a step is split, and an exact
resume; what it learns is which of two answers is preferred."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.interrupted import train, train_until
from helpers.runs import distance, metrics, pairs, recipe, tables, trained, without_times, write_records
from llava_accel.evaluate import evaluate
from llava_accel.exceptions import UserError
from llava_accel.setup.reference import REFERENCE

pytestmark = pytest.mark.slow

# Without "pair_accuracy", which before the first update is that of rounding.
PAIR_MEASURES = (
    "reward_margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob", "kl",
)  # fmt: skip
STEPS = 4

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains with some keys changed and returns the run folder."""
    folder = tmp_path_factory.mktemp("preference")
    data = write_records(folder / "pairs.json", pairs(14))
    count = 0

    def go(*, place: Path | None = None, **changes: Mapping[str, Any]) -> Path:
        nonlocal count
        count += 1
        place = place or folder / f"run{count}"
        # Adam scales gradients that cancel to rounding noise up to whole steps.
        optim = {"optimizer": "sgd", "learning_rate": 0.5, "projector_learning_rate": 0.05, "max_grad_norm": 0}
        train = {"objective": "dpo", "max_steps": STEPS, "per_device_batch_size": 4, **changes.pop("train", {})}
        verb.train(recipe(place, data, train=train, optim=optim, **changes))
        return place / "run"

    return go


def test_a_step_is_the_same_however_it_is_split(run: Run) -> None:
    whole = run(preference={"sft_weight": 0.5})
    split = run(preference={"sft_weight": 0.5}, train={"per_device_batch_size": 2, "accumulation_steps": 2})
    # All pairs in every step, as shared prefixes change the order.
    apart, shared = (
        run(data={"share_prefix": share}, train={"per_device_batch_size": 14, "max_steps": 2})
        for share in (False, True)
    )
    for one, other in ((whole, split), (apart, shared)):
        assert distance(trained(other / "export"), trained(one / "export")) < 1e-5
        for first, second in zip(metrics(one), metrics(other), strict=True):
            assert [first[name] for name in ("loss", *PAIR_MEASURES)] == pytest.approx(
                [second[name] for name in ("loss", *PAIR_MEASURES)], rel=1e-4, abs=1e-5
            )


def test_the_first_loss_is_that_of_no_preference(run: Run) -> None:
    first = metrics(run(train={"max_steps": 1}))[0]
    assert first["loss"] == pytest.approx(float(torch.tensor(2.0).log()), abs=1e-5)
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert first["chosen_log_prob"] < 0


def test_a_run_that_broke_off_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data = write_records(tmp_path / "pairs.json", pairs(14))
    changes = {
        "data": {"eval_fraction": 0.3},
        "train": {"objective": "dpo", "max_steps": STEPS, "per_device_batch_size": 3},
        "eval": {"every": 2, "metric": "pair_accuracy"},
        "checkpoint": {"every": 2},
        "log": {"every": 3},
    }
    whole = train(tables(tmp_path / "whole", data, **changes))
    broken = tables(tmp_path / "broken", data, **changes)
    folder = train_until(broken, 3)
    (next((tmp_path / "broken" / "cache" / "reference").iterdir())).unlink()
    train(broken)
    assert without_times(metrics(folder)) == without_times(metrics(whole))
    ours, theirs = trained(folder / "export"), trained(whole / "export")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_whose_reference_is_lost_says_so(tmp_path: Path) -> None:
    data = write_records(tmp_path / "pairs.json", pairs(6))
    changes = {"train": {"objective": "dpo", "max_steps": 2, "per_device_batch_size": 3}, "checkpoint": {"every": 1}}
    broken = tables(tmp_path, data, **changes)
    folder = train_until(broken, 1)
    (folder / REFERENCE).unlink()
    next((tmp_path / "cache" / "reference").iterdir()).unlink()
    with pytest.raises(UserError, match=r"reference\.safetensors is missing.*because of model\.adapter"):
        train(broken)


def test_held_out_pairs_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    data = write_records(tmp_path / "pairs.json", pairs(8))
    held_out = write_records(tmp_path / "eval.json", pairs(12)[8:])
    changes = {
        "model": {"adapter": "", "train_projector": False},
        "data": {"eval": str(held_out)},
        "train": {"objective": "dpo", "max_steps": 4, "per_device_batch_size": 4},
        "eval": {"every": 4, "metric": "pair_accuracy"},
        "checkpoint": {"every": 2},
    }
    train_until(tables(tmp_path / "broken", data, **changes), 2)
    write_records(held_out, pairs(14)[8:])
    folder = train(tables(tmp_path / "broken", data, **changes))
    whole = train(tables(tmp_path / "whole", data, **changes))
    first, second = ([line["eval"] for line in metrics(run) if "eval" in line][-1] for run in (folder, whole))
    assert first["num_answers"] == 6 and abs(first["reward_margin"]) > 1e-3
    assert [first[name] for name in PAIR_MEASURES] == pytest.approx([second[name] for name in PAIR_MEASURES], abs=1e-5)

    trained_projector = tables(tmp_path / "other", data, **changes | {"model": {"adapter": ""}})
    train_until(trained_projector, 2)
    write_records(held_out, pairs(13)[8:])
    with pytest.raises(UserError, match=r"lacks data\.eval as it is now.*because of model\.train_projector"):
        train(trained_projector)


def test_preferences_are_learned_and_held_out_pairs_come_right(tmp_path: Path) -> None:
    words = ("red", "blue", "green", "circle")
    records = [
        {"id": f"{n}", "image": f"t{n % 8}.png", "question": f"What is number {n}?", "chosen": f"a {words[n % 4]}",
         "rejected": f"no {words[n % 4]}"}
        for n in range(48)
    ]  # fmt: skip
    data = write_records(tmp_path / "pairs.json", records)
    made = recipe(
        tmp_path,
        data,
        data={"eval_fraction": 0.25},
        train={"objective": "dpo", "epochs": 3, "per_device_batch_size": 6},
        eval={"every": 0, "at_start": True},
        checkpoint={"best": False},
    )
    verb.train(made)
    found = [line["eval"] for line in metrics(tmp_path / "run") if "eval" in line]
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found[-1]["pair_accuracy"] >= 0.95 and found[-1]["reward_margin"] > 0.1
    assert found[-1]["loss"] < found[0]["loss"]
    assert metrics(tmp_path / "run")[-2]["pair_accuracy"] > 0.9
    page = (tmp_path / "run" / "report.html").read_text()
    for shown in ("pairs right", "Reward margin", "Log-probability", "Distance to the reference", "kl"):
        assert shown in page
    harmful = tmp_path / "run" / "predictions" / "harmful.jsonl"
    named = [json.loads(line)["why"] for line in harmful.read_text().splitlines()] if harmful.exists() else []
    assert "answered wrong" not in named, "a pair that stands right is none, whatever is generated"
    evaluated = evaluate(made, adapter=str(tmp_path / "run"))
    for name in ("loss", *PAIR_MEASURES):
        assert evaluated.metrics[name] == pytest.approx(found[-1][name], rel=1e-4, abs=1e-5)
