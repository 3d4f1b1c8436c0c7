"""Checkpoints and exports of every engine: whole tensors, for any engine and any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.jobs import ENGINES, TOLERANCE, Lab, difference, trains, weights

NEXT = dict(zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True))
SAVED = {"checkpoint": {"every": 3, "keep": 9}}


def checkpoint(lab: Lab, engine: str, train: str = "lora") -> Path:
    """What two ranks of an engine wrote after three steps of five."""
    return lab.run(engine, 2, 4, **trains(train), **SAVED) / "checkpoints" / "step-000003"


def resumed(source: Path) -> dict[str, Any]:
    """The table that goes on from there."""
    return {"run": {"resume": str(source)}}


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_holds_whole_tensors_as_one_process_writes_them(lab: Lab, engine: str, train: str) -> None:
    ours, reference = checkpoint(lab, engine, train), lab.reference(**trains(train), **SAVED)
    for folder in ("", "engine"):
        mine, theirs = (
            {k: v for f in (path / folder).glob("*.safetensors") for k, v in load_file(f).items()}
            for path in (ours, reference / "checkpoints" / "step-000003")
        )
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].shape == tensor.shape and mine[name].dtype == tensor.dtype
            if not name.endswith("k_proj.bias"):  # a softmax does not depend on it: see `distance`
                assert torch.dist(mine[name].double(), tensor.double()) <= TOLERANCE * tensor.double().norm(), name
    assert {path.name for path in ours.iterdir()} == {
        path.name for path in (reference / "checkpoints" / "step-000003").iterdir()
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_very_same_weights(lab: Lab, engine: str) -> None:
    source = checkpoint(lab, engine)
    whole, again = (weights(run / "export") for run in (source.parents[1], lab.run(engine, 2, 4, **resumed(source))))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_resumed_by_another_engine_and_by_another_number_of_ranks(lab: Lab, engine: str) -> None:
    source, reference = checkpoint(lab, engine), lab.reference(**trains("lora"))
    assert difference(lab.run(NEXT[engine], 2, 4, **resumed(source)), reference) < TOLERANCE
    assert difference(lab.run("cpu", 1, 1, **resumed(source)), reference) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_one_process_is_resumed_by_two(lab: Lab, engine: str) -> None:
    source = lab.reference(**trains("lora"), **SAVED) / "checkpoints" / "step-000003"
    assert difference(lab.run(engine, 2, 2, **resumed(source)), lab.reference(**trains("lora"))) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_refused_where_a_step_is_another_portion_of_data(lab: Lab, engine: str) -> None:
    errors = lab.errors(engine, 2, 2, train={"accumulation_steps": 1}, **resumed(checkpoint(lab, engine)))
    assert len(errors) == 2 and all("counts steps of 8 examples" in error for error in errors)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_of_any_engine_starts_a_run_of_one_process_and_of_two(lab: Lab, engine: str) -> None:
    start = {"model": {"adapter": str(checkpoint(lab, engine))}}
    assert difference(lab.run(engine, 2, 1, **start), lab.reference(**start)) < TOLERANCE
