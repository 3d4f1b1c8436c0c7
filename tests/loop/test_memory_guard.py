"""Out of memory: what was loaded or computed, what it takes, and a remedy that helps there."""

from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.runs import metrics, mixed_records, recipe, write_records
from llava_accel.loop import validation
from llava_accel.scoring import held_out
from llava_accel.setup import assembly

pytestmark = pytest.mark.slow

FULL = torch.OutOfMemoryError("CUDA out of memory")


def run_out(*_: Any, **__: Any) -> Any:
    raise FULL


def test_loading_says_what_the_weights_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "load_model", run_out)
    with pytest.raises(
        ValueError, match=r"while the model was loaded: its [\d,]+ weights take .*quantization\.bits = 4"
    ):
        verb.train(recipe(tmp_path))


@pytest.mark.parametrize(
    ("optimizer", "remedy"), [("adamw", '"adamw_8bit"'), ("adamw_8bit", '"paged_adamw_8bit"'), ("sgd", r"lora\.rank")]
)
def test_the_first_update_says_what_the_optimizer_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, remedy: str
) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    monkeypatch.setattr(AcceleratedOptimizer, "step", run_out)
    with pytest.raises(ValueError, match=rf"in the optimizer's step, .*trained weights\. Planned: .*{remedy}"):
        verb.train(recipe(tmp_path, optim={"optimizer": optimizer}))


def test_an_evaluation_that_cannot_be_made_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(8))
    keys = {"data": {"eval": str(data)}, "train": {"max_steps": 3, "per_device_batch_size": 2, "epochs": 9}}
    settings = recipe(tmp_path, data, **keys, eval={"at_start": False, "every": 2}, checkpoint={"every": 3})
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "answer_batch", run_out)
        with pytest.raises(ValueError, match=r"in an evaluation, with one question at a time\. .*goes on from"):
            verb.train(settings)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert verb.train(settings).step == 3
    assert "at step 2 of 3" in capsys.readouterr().out
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval" in line] == [2, 3]


def test_steps_are_saved_before_they_are_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(4))
    saved: list[bool] = []

    def looking(*_: Any, **__: Any) -> Any:
        saved.append((tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json").is_file())
        raise RuntimeError("whatever goes wrong")

    monkeypatch.setattr(validation, "evaluate", looking)
    with pytest.raises(RuntimeError):
        verb.train(recipe(tmp_path, data, data={"eval": str(data)}, eval={"every": 0}, checkpoint={"every": 0}))
    assert saved == [True]


def test_an_evaluation_is_not_made_again_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(4))
    keys: dict[str, Any] = {"data": {"eval": str(data)}, "train": {"epochs": 2}, "optim": {"schedule": "constant"}}
    keys["optim"] |= {"warmup_fraction": 0.0}
    ends = recipe(tmp_path, data, **keys, eval={"every": 0}, checkpoint={"every": 0})
    verb.train(ends)
    before = metrics(tmp_path / "run")
    monkeypatch.setattr(validation, "evaluate", None)
    state = verb.train(ends)
    assert metrics(tmp_path / "run") == before
    assert state.best is not None
    assert (state.evaluated_step, state.best_step) == (2, 2 if before[-1]["eval"]["loss"] < state.best + 1e-9 else 1)
