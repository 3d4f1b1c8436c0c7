"""The same data, base and settings give LLaVA's own losses and weights (tests/parity was made by LLaVA's own code)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.runs import PARITY, losses, metrics, recipe, trained
from helpers.verbs import start, write_recipe
from llava_accel.train import train

STEPS = 20
# The reference's log is rounded to 4 decimals, so half a unit of the last is 5e-5.
LOSS_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of stage 1."""
    folder = tmp_path_factory.mktemp("stage_1")
    train(
        recipe(
            folder,
            PARITY / "traj_projector.json",
            model={"adapter": "", "train": "projector", "template": "plain", "lora": {"rank": 128, "alpha": 256}},
            optim={"projector_learning_rate": 1e-2},
            train={"epochs": STEPS},
        )
    )
    return folder / "run"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of LoRA, trained by the command that users type."""
    folder = tmp_path_factory.mktemp("lora")
    ended = start("train", str(write_recipe(folder)), f"train.epochs={STEPS}")
    assert ended.code == 0, ended.err
    return folder / "run"


def _reference(kind: str) -> list[float]:
    lines = json.loads((PARITY / f"traj_{kind}_ref.json").read_text())
    found = [line["loss"] for line in lines if "loss" in line]
    assert len(found) == STEPS
    return found


def _as_original(name: str) -> str:
    """LLaVA's own name of a trained weight, spelled out here once more so that the package's map is tested too."""
    name = name.replace("base_model.model.model.language_model.", "base_model.model.model.")
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    return name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")


def _assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-4, atol=1e-5), name


def test_stage_1_has_the_losses_of_the_original(stage_1: Path) -> None:
    assert losses(stage_1) == pytest.approx(_reference("projector"), abs=LOSS_TOLERANCE)


def test_stage_1_ends_at_the_projector_of_the_original(stage_1: Path) -> None:
    theirs = torch.load(PARITY / "projector_final.bin", weights_only=True)
    _assert_equal({_as_original(name): tensor for name, tensor in trained(stage_1 / "export").items()}, theirs)


def test_lora_has_the_losses_of_the_original(lora: Path) -> None:
    assert losses(lora) == pytest.approx(_reference("lora"), abs=LOSS_TOLERANCE)


def test_lora_ends_at_the_adapter_of_the_original(lora: Path) -> None:
    ours = load_file(lora / "export" / "adapter_model.safetensors")
    theirs = load_file(PARITY / "adapter_final" / "adapter_model.safetensors")
    _assert_equal({_as_original(name): tensor for name, tensor in ours.items()}, theirs)


def test_lora_ends_at_the_projector_of_the_original(lora: Path) -> None:
    ours = load_file(lora / "export" / "non_lora_trainables.safetensors")
    theirs = torch.load(PARITY / "adapter_final" / "non_lora_trainables.bin", weights_only=True)
    _assert_equal({f"base_model.model.{_as_original(name)}": tensor for name, tensor in ours.items()}, theirs)


@pytest.mark.parametrize("kind", ["projector", "lora"])
def test_the_rates_are_those_of_the_original(kind: str, stage_1: Path, lora: Path) -> None:
    # The original logs the rate after the step: that of the next one.
    lines = json.loads((PARITY / f"traj_{kind}_ref.json").read_text())
    theirs = [line["learning_rate"] for line in lines if "loss" in line]
    ours = [line["learning_rate"] for line in metrics(stage_1 if kind == "projector" else lora)]
    assert ours[0] == 0 and ours[1:] == pytest.approx(theirs[:-1], rel=1e-9)
