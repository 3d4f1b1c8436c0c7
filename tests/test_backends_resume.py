"""Checkpoints and exports of every engine: whole tensors, for any engine and any number of ranks.

The suite resumes whole models under every other engine, and adapters too with LLAVA_ACCEL_ALL_KINDS=1. Two micro-batches a
step are enough here: test_backends.py has the smallest ones, and ranks that have none.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import jobs
from helpers.jobs import ENGINES, TOLERANCE, Lab, difference, weights
from helpers.kinds import ALL_KINDS
from llava_accel.storage.atomic import is_complete

pytestmark = pytest.mark.slow

NEXT: dict[str, str] = dict(zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True))
SAVED: dict[str, Any] = {"checkpoint": {"every": 3, "keep": 9}}
BEHIND: dict[str, Any] = {"checkpoint": {**SAVED["checkpoint"], "background": True}}


def trains(what: str, **model: Any) -> dict[str, Any]:
    """Four steps that train this: what is saved after three, within an epoch, goes on to a short step."""
    return {**jobs.trains(what, **model), "train": {"max_steps": 4}}


def run_of(lab: Lab, engine: str, train: str = "lora") -> Path:
    """A run of two ranks of an engine. A whole model is written while the next steps are taken, an adapter before them."""
    if train == "lora":
        return lab.run(engine, 2, 2, **trains(train), **SAVED)
    return lab.run(engine, 2, 2, mutant="note_saves", **trains(train), **BEHIND)


def checkpoint(lab: Lab, engine: str, train: str = "lora") -> Path:
    """What it wrote after three steps of four."""
    return run_of(lab, engine, train) / "checkpoints" / "step-000003"


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
def test_whole_weights_come_from_accelerate_and_nothing_that_is_not_saved(lab: Lab, engine: str) -> None:
    # Trained layers and a projector that stays as it was, which is saved besides.
    settings = {**jobs.trains("lora", train_projector=False), "train": {"max_steps": 2}}
    run = lab.run(engine, 2, 2, mutant="note_state_dicts", **settings, checkpoint={"every": 1, "keep": 9})
    given = [set(json.loads(line)) for line in (run / "state-dicts.jsonl").read_text().splitlines()]
    assert len(given) == 3, "at both steps, and for the export"
    for names in given:
        assert {".lora_" in name or ".multi_modal_projector." in name for name in names} == {True}
        assert len(names) == len(weights(run / "export"))
    assert difference(run, lab.reference(**settings)) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_very_same_weights(lab: Lab, engine: str) -> None:
    source = checkpoint(lab, engine)
    whole, again = (
        weights(run / "export")
        for run in (source.parents[1], lab.run(engine, 2, 2, **trains("lora"), **resumed(source)))
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("fsdp2",))  # whole models: below
def test_a_checkpoint_is_resumed_by_another_engine_and_by_another_number_of_ranks(lab: Lab, engine: str) -> None:
    source, reference = checkpoint(lab, engine), lab.reference(**trains("lora"))
    assert difference(lab.run(NEXT[engine], 2, 2, **trains("lora"), **resumed(source)), reference) < TOLERANCE
    assert difference(lab.run("cpu", 1, 1, **trains("lora"), **resumed(source)), reference) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_model_is_written_by_all_ranks_behind_the_steps_and_resumed_by_others(lab: Lab, engine: str) -> None:
    run = run_of(lab, engine, "full")
    noted = [[json.loads(line) for line in (run / f"saves-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    written = [[line["written"] for line in lines if line.get("behind")] for lines in noted]
    assert len(written[0]) == len(written[1]) == 2, "at steps 3 and 4; the export is not written behind"
    assert all(0.9 < one / other < 1.1 for one, other in zip(*written, strict=True))
    sent = sum(line.get("sent", 0) for lines in noted for line in lines)
    assert 0 < sent < 0.05 * sum(map(sum, written)), "names, and no tensor"
    source, reference = run / "checkpoints" / "step-000003", lab.reference(**trains("full"))
    assert is_complete(source)
    assert difference(run, reference) < TOLERANCE
    assert difference(lab.run(NEXT[engine], 2, 2, **trains("full"), **resumed(source)), reference) < TOLERANCE
    assert difference(lab.run("cpu", 1, 1, **trains("full"), **resumed(source)), reference) < TOLERANCE
    again = weights(lab.run(engine, 2, 2, **trains("full"), **resumed(source)) / "export")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(run / "export").items())


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("zero3", "fsdp2"))  # which divide it
def test_a_whole_model_of_one_process_is_resumed_by_two(lab: Lab, engine: str) -> None:
    source = lab.reference(**trains("full"), **SAVED) / "checkpoints" / "step-000003"
    run = lab.run(engine, 2, 2, **trains("full"), **resumed(source))
    assert difference(run, lab.reference(**trains("full"))) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("ddp", "zero2"))
def test_a_checkpoint_of_one_process_is_resumed_by_two(lab: Lab, engine: str) -> None:
    source = lab.reference(**trains("lora"), **SAVED) / "checkpoints" / "step-000003"
    assert (
        difference(lab.run(engine, 2, 2, **trains("lora"), **resumed(source)), lab.reference(**trains("lora")))
        < TOLERANCE
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_refused_where_a_step_is_another_portion_of_data(lab: Lab, engine: str) -> None:
    other = {**resumed(checkpoint(lab, engine)), "train": {"max_steps": 4, "accumulation_steps": 1}}
    errors = lab.errors(engine, 2, 2, **other)
    assert len(errors) == 2 and all("counts steps of 8 examples" in error for error in errors)


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("zero3", "fsdp2"))  # all write the same, see above
def test_an_adapter_of_any_engine_starts_a_run_of_one_process_and_of_two(lab: Lab, engine: str) -> None:
    start: dict[str, Any] = {"model": {"adapter": str(checkpoint(lab, engine))}}
    assert difference(lab.run(engine, 2, 1, **start), lab.reference(**start)) < TOLERANCE
