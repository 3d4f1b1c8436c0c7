"""Which device a run computes on, and what is said where it is the CPU."""

import pytest
import torch

from llava_accel.runtime import devices
from llava_accel.runtime.devices import computes_bf16, device_name, find_device, total_bytes, why_cpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gpu_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, built: str | None, *, is_here: bool) -> None:
    """Let torch be built for this kind of accelerator, and see one or not."""

    def current(check_available: bool = False) -> torch.device | None:
        return torch.device(built) if built and (is_here or not check_available) else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: is_here)


@pytest.mark.parametrize(
    ("built", "visible", "said"),
    [
        (None, None, "is built without CUDA; a build with it uses a GPU"),
        ("cuda", "", "CUDA_VISIBLE_DEVICES is empty; unset it to use a GPU"),
        ("cuda", "-1", "CUDA_VISIBLE_DEVICES is -1; unset it to use a GPU"),
        ("cuda", "7", "torch sees no CUDA device with CUDA_VISIBLE_DEVICES=7"),
        ("cuda", None, "torch sees no CUDA device; `nvidia-smi`"),
        ("xpu", None, "torch sees no xpu device"),
    ],
)
def test_a_cpu_comes_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, built: str | None, visible: str | None, said: str
) -> None:
    pretend(monkeypatch, built, is_here=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device() == CPU and said in why_cpu()
    assert why_cpu(wants_cpu=True) == "the launch profile says use_cpu: true"


def test_a_gpu_is_taken_unless_the_profile_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", is_here=True)
    assert find_device() == torch.device("cuda")
    assert find_device(wants_cpu=True) == CPU


def test_an_accelerator_that_cannot_do_what_a_run_asks_is_refused_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "mps", is_here=True)  # this build has none: the first thing that is asked of it fails
    devices._refusal.cache_clear()
    assert find_device() == CPU
    assert why_cpu().startswith("torch's mps device cannot do what a run asks of it (") and "MPS" in why_cpu().upper()
    monkeypatch.setattr(devices, "_refusal", lambda _kind: "")
    assert find_device() == torch.device("mps")


def test_a_cpu_is_asked_for_nothing() -> None:
    assert (device_name(CPU), total_bytes(CPU), computes_bf16(CPU)) == ("CPU", 0, False)
