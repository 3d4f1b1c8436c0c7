"""Which matrix products a run computes with: chosen alike on all ranks, said once, and kept when it resumes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import llava_accel.train as verb
from helpers.runs import distance, metrics, recipe, trained
from llava_accel.console.output import Console
from llava_accel.kernels.matmul import LEAST_WIDTH, matmul_in_use, onednn_error, use_matmul
from llava_accel.runtime.context import RunContext
from llava_accel.setup import products
from llava_accel.setup.products import choose_matmul

EXACT, ROUNDED = 4e-7, 3e-3


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    use_matmul("native")


class Ranks(Accelerator):
    """The first of several ranks, which are given what the others found."""

    def __init__(self, device: str, errors: tuple[float, ...]) -> None:
        self._device, self._others = torch.device(device), errors[1:]

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]  its own type is wrong
        return self._device

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.tensor(self._others, dtype=tensor.dtype)])


def checkpoint(folder: Path, **facts: str) -> Path:
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "progress.json").write_text(json.dumps(facts))
    return folder


def chosen(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    errors: tuple[float, ...] = (EXACT,),
    width: int = LEAST_WIDTH,
    source: Path | None = None,
    device: str = "cpu",
    **run: Any,
) -> str:
    """What the first of some ranks computes with, each of which has found its own error."""
    monkeypatch.setattr(products, "onednn_error", lambda: errors[0])
    context = RunContext(recipe(folder, run=run), Ranks(device, errors), Console(True))
    choose_matmul(context, width, source)
    return matmul_in_use()


def test_they_are_used_where_they_are_exact_and_layers_are_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen(tmp_path, monkeypatch) == "onednn"
    assert "relative error 4.0e-07" in capsys.readouterr().out
    assert chosen(tmp_path, monkeypatch, errors=(ROUNDED,)) == "native"
    assert chosen(tmp_path, monkeypatch, width=LEAST_WIDTH - 1) == "native"
    assert chosen(tmp_path, monkeypatch, precision="bf16") == "native"
    assert chosen(tmp_path, monkeypatch, matmul="native") == "native"
    assert capsys.readouterr().out == ""


def test_one_rank_whose_cpu_rounds_turns_them_off_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(tmp_path, monkeypatch, errors=(EXACT, ROUNDED)) == "native"
    assert chosen(tmp_path, monkeypatch, errors=(EXACT, float("nan"))) == "native"
    assert chosen(tmp_path, monkeypatch, errors=(EXACT, EXACT)) == "onednn"


def test_a_gpu_keeps_what_the_process_was_set_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_matmul("onednn")  # on a GPU this means TF32
    assert chosen(tmp_path, monkeypatch, errors=(ROUNDED,), device="meta") == "onednn"


def test_a_run_goes_on_with_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_onednn = checkpoint(tmp_path / "one", matmul="onednn")
    others = [checkpoint(tmp_path / "two", matmul="native"), checkpoint(tmp_path / "old")]
    assert chosen(tmp_path, monkeypatch, source=with_onednn) == "onednn"
    for source in others:
        capsys.readouterr()
        assert chosen(tmp_path, monkeypatch, source=source) == "native"
        assert capsys.readouterr().out == ""


def test_a_run_that_moves_to_a_cpu_that_rounds_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "one", matmul="onednn")
    assert chosen(tmp_path, monkeypatch, errors=(ROUNDED,), source=source) == "native"
    assert "as oneDNN's round on this CPU" in " ".join(capsys.readouterr().out.split())
    assert chosen(tmp_path, monkeypatch, errors=(EXACT, float("inf")), source=source) == "native"
    assert "as PyTorch has none for this CPU" in " ".join(capsys.readouterr().out.split())
    assert chosen(tmp_path, monkeypatch, source=source, matmul="native") == "native"
    assert 'as run.matmul = "native" says' in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_run_with_them_ends_at_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_used = onednn_error() < 1e-6
    monkeypatch.setattr(products, "LEAST_WIDTH", 0)
    for matmul in ("auto", "native"):
        settings = recipe(tmp_path / matmul, run={"matmul": matmul}, train={"per_device_batch_size": 2})
        used = {"auto": "onednn" if is_used else "native", "native": "native"}[matmul]
        seen: set[str] = set()
        verb.train(settings, on_log=lambda _, seen=seen: seen.add(matmul_in_use()))
        assert seen == {used} and matmul_in_use() == "native"  # of this process before and after
        newest = tmp_path / matmul / "run" / "checkpoints" / "step-000004"
        assert json.loads((newest / "engine" / "progress.json").read_text())["matmul"] == used
    with_onednn, native = (trained(tmp_path / matmul / "run" / "export") for matmul in ("auto", "native"))
    apart = distance(with_onednn, native)
    assert apart < 1e-5 and (apart > 0) == is_used
    losses = [[line["loss"] for line in metrics(tmp_path / m / "run") if "loss" in line] for m in ("auto", "native")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
