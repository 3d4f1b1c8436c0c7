"""Products through oneDNN are used only where they are fp32's, and nothing of the process stays changed by asking."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_accel.kernels import matmul
from llava_accel.kernels.matmul import MOST_ERROR, matmul_in_use, onednn_error, use_matmul


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    onednn_error.cache_clear()
    yield
    onednn_error.cache_clear()
    use_matmul("native")


def test_the_probe_sees_a_cpu_that_rounds_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = F.linear

    def rounded(input: Tensor, weight: Tensor) -> Tensor:
        if input.dtype != torch.float32 or matmul_in_use() == "native":
            return exact(input, weight)
        return exact(input.bfloat16().float(), weight.bfloat16().float())

    monkeypatch.setattr(matmul.F, "linear", rounded)
    assert onednn_error() > 1000 * MOST_ERROR


@pytest.mark.parametrize("wrong", range(3))
def test_the_probe_measures_all_three_products(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    found = matmul._products

    def one_is_off(*operands: Tensor) -> tuple[Tensor, ...]:
        is_probed = operands[0].dtype == torch.float32 and matmul_in_use() == "onednn"
        return tuple(
            each * (1.1 if is_probed and number == wrong else 1) for number, each in enumerate(found(*operands))
        )

    monkeypatch.setattr(matmul, "_products", one_is_off)
    assert onednn_error() > 0.05


def test_without_onednn_there_is_no_such_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn_error() == float("inf")


def test_a_cpu_for_which_pytorch_takes_other_kernels_has_no_such_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "use_matmul", lambda _: None)
    assert onednn_error() == float("inf")


def test_the_probe_leaves_the_process_as_it_was() -> None:
    for used in ("native", "onednn"):
        use_matmul(used)
        onednn_error.cache_clear()
        onednn_error()
        assert matmul_in_use() == used


def test_where_the_probe_finds_them_exact_gradients_are_those_of_fp32() -> None:
    found, probed = [], "onednn" if onednn_error() < MOST_ERROR else "native"
    for used in ("native", probed):
        use_matmul(used)
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(384, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 384))
        layers(torch.randn(77, 384)).square().mean().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in layers.parameters() if weight.grad is not None]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-6
