"""Which device a run computes on, and what is said where it is the CPU."""

from pathlib import Path

import pytest
import torch

from llava_accel.runtime import devices
from llava_accel.runtime.devices import (
    bf16_on_cpu,
    bf16_remark,
    computes_bf16,
    device_name,
    find_device,
    total_bytes,
    why_cpu,
)

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


@pytest.mark.parametrize(
    ("cpuinfo", "is_native"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd bf16\n", None),
        (None, None),
    ],
)
def test_a_cpu_says_whether_it_multiplies_bf16(tmp_path: Path, cpuinfo: str | None, is_native: bool | None) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}processor\t: 1\n")
    assert bf16_on_cpu(tmp_path / "cpuinfo") == is_native


@pytest.mark.parametrize(
    ("precision", "is_native", "said"),
    [
        ("auto", True, 'run.precision = "bf16"'),
        ("auto", False, ""),
        ("fp32", True, ""),
        ("bf16", True, ""),
        ("bf16", False, "about 70 times as long"),
        ("bf16", None, ""),
    ],
)
def test_what_bf16_means_on_a_cpu_is_said_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch, precision: str, is_native: bool | None, said: str
) -> None:
    monkeypatch.setattr(devices, "bf16_on_cpu", lambda: is_native)
    remark = bf16_remark(precision)
    assert said in remark and bool(remark) == bool(said)
