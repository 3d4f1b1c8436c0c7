"""LLaVA-NeXT and OneVision end at their original's losses and weights (tests/parity/next was made by the original's code).

Each curve is 20 steps over all records at once; the one that accumulates has micro-batches of two in the order of the file.
"""

from pathlib import Path

import pytest

from helpers.curves import LOSS_TOLERANCE, RUNS, STRAYS, assert_final_weights, records, reference, settings
from helpers.fp64 import IN_FP64, in_fp64
from helpers.runs import losses, metrics, recipe
from llava_accel.train import train


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A curve's name, and the run that follows it."""
    folder = tmp_path_factory.mktemp(request.param)
    train(recipe(folder, records(request.param), **settings(request.param)))
    return request.param, folder / "run"


def test_losses_and_gradients_are_those_of_the_original(run: tuple[str, Path]) -> None:
    name, folder = run
    theirs = reference(name)
    assert losses(folder) == pytest.approx([step["loss"] for step in theirs], abs=LOSS_TOLERANCE)
    norms = [line["grad_norm"] for line in metrics(folder) if "loss" in line]
    assert norms == pytest.approx([step["grad_norm"] for step in theirs], rel=1e-3)


def test_final_weights_are_those_of_the_original(run: tuple[str, Path]) -> None:
    name, folder = run
    assert_final_weights(folder, name, STRAYS if name == "next_lora_accum" else 0.0)


@pytest.mark.parametrize("name", RUNS)
def test_without_rounding_every_number_ends_as_in_the_original(name: str, tmp_path: Path) -> None:
    followed = settings(name)
    followed["data"] |= IN_FP64
    with pytest.MonkeyPatch.context() as patch:
        in_fp64(patch)
        train(recipe(tmp_path, records(name), **followed))
    theirs = [step["loss"] for step in reference(name)]
    assert losses(tmp_path / "run") == pytest.approx(theirs, abs=LOSS_TOLERANCE)
    assert_final_weights(tmp_path / "run", name, 0.0)
