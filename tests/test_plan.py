"""What is planned is what a run takes, without a weight being loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import mixed_records, recipe, write_records

import llava_accel.train as verb
from llava_accel import plan as plan_file
from llava_accel.model.objective import Objective
from llava_accel.plan import plan, verdict
from llava_accel.run.plan_memory import GIB, Layout, Plan
from llava_accel.run.plan_trace import Activations


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"gradient_checkpointing": True}},
        {"model": {"train": "full", "adapter": ""}},
        {"model": {"train": "projector", "adapter": ""}},
    ],
    ids=["lora", "checkpointed", "full", "projector"],
)
def test_the_plan_is_within_15_percent_of_what_a_step_takes(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = plan_file.measure_step

    def noting(*values: Any) -> int:
        measured.append(measure(*values))
        return measured[-1]

    monkeypatch.setattr(plan_file, "measure_step", noting)
    data = write_records(tmp_path / "data.json", mixed_records(24))
    found = plan(recipe(tmp_path, data, **changes), 24.0, 4, probe=True)
    assert found[0].total == pytest.approx(measured[0], rel=0.15)


def test_nothing_is_loaded_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "build_objective", None)
    for found in plan(recipe(tmp_path), None, 8, probe=False):
        assert found.total > 0


def _plan(fixed_gb: float, row_gb: float, batch: int = 4) -> Plan:
    return Plan(Layout("one GPU"), round(fixed_gb * GIB), 0, 0, 0, Activations(int(batch * row_gb * GIB), 0, 0))


def test_a_verdict_names_the_largest_batch_that_fits() -> None:
    assert verdict(_plan(10, 1), 24.0, 4) == "one GPU: fits 24 GB with batch 4; largest batch 10"
    assert "does not fit 24 GB with batch 4; train.per_device_batch_size = 2 fits" in verdict(_plan(10, 4), 24.0, 4)
    assert "none does: set model.gradient_checkpointing" in verdict(_plan(30, 1), 24.0, 4)


def test_out_of_memory_names_batch_plan_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Objective.forward

    def full(self: Objective, **batch: Any) -> torch.Tensor:
        if batch["input_ids"].device.type == "meta":  # the plan's own pass takes no memory
            return forward(self, **batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Objective, "forward", full)
    data = write_records(tmp_path / "data.json", mixed_records(3))
    with pytest.raises(
        ValueError, match=r"out of memory.*r\d, r\d, r\d\. Planned: .*Set model\.gradient_checkpointing"
    ):
        verb.train(recipe(tmp_path, data))
