"""The device that this machine computes on, and its properties: CUDA and ROCm, or what else torch.accelerator finds."""

import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

_CPU = torch.device("cpu")


def find_device(*, wants_cpu: bool = False) -> torch.device:
    """The accelerator of this machine if a run can use it, else the CPU."""
    device = None if wants_cpu else torch.accelerator.current_accelerator(check_available=True)
    if device is None or _refusal(device.type):
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed warns of it when it is imported and finds no GPU
        return _CPU
    return device


def why_cpu(*, wants_cpu: bool = False) -> str:
    """Why `find_device` chose the CPU, and what would give a GPU; continues a sentence after "because"."""
    if wants_cpu:
        return "the launch profile says use_cpu: true"
    built = torch.accelerator.current_accelerator()
    if built is None:
        return f"torch {version('torch')} is built without CUDA; a build with it uses a GPU"
    if torch.accelerator.is_available():
        return f"torch's {built.type} device cannot do what a run asks of it ({_refusal(built.type)})"
    if built.type != "cuda":
        return f"torch sees no {built.type} device"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible.strip() or 'empty'}; unset it to use a GPU"
    chosen = f" with CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    return f"torch sees no CUDA device{chosen}; `nvidia-smi` says whether the driver sees one"


@cache
def _refusal(kind: str) -> str:
    """The error of such a device if it cannot do what a run asks of it; empty if it can.

    CUDA and ROCm are not tried: before each process has its own GPU, all of them would open the first one.
    """
    if kind == "cuda":
        return ""
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum().item()  # the type that losses are added up in
        torch.Event(device, enable_timing=True).record()
        torch.accelerator.max_memory_allocated(device)
        for ask in (total_bytes, device_name, computes_bf16):
            ask(device)
    except (RuntimeError, TypeError, AttributeError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def computes_bf16(device: torch.device) -> bool:
    """Whether an accelerator has bf16 in its hardware; a CPU computes in fp32 unless it is told otherwise."""
    if device.type == "cpu":
        return False
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def bf16_on_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether an x86 CPU has instructions that multiply bf16 (AVX512_BF16 or AMX); None if that cannot be found out."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return None if flags is None else not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def bf16_remark(precision: str) -> str:
    """A note on what bf16 means for a run on a CPU; empty if there is nothing to say."""
    is_native = bf16_on_cpu()
    if precision == "bf16" and is_native is False:
        return (
            "precision: this CPU has no instructions for bf16, and matrix products in it take about 70 times as long as in "
            'fp32. run.precision = "auto" computes in fp32 here'
        )
    if precision == "auto" and is_native:
        return (
            'precision: fp32, which is exact. This CPU has instructions for bf16: with run.precision = "bf16" a step takes '
            "about 0.6 of the time and half of the memory; llava-accel bench RECIPE run.precision=bf16 measures yours"
        )
    return ""


def device_name(device: torch.device) -> str:
    """The maker's name for a device; "CPU" for every CPU."""
    return "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)


def total_bytes(device: torch.device) -> float:
    """Memory that an accelerator has; 0 for a CPU, which shares its memory with other programs."""
    return 0.0 if device.type == "cpu" else float(torch.accelerator.get_memory_info(device)[1])


def free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that no process has taken."""
    return torch.accelerator.get_memory_info(device)[0]
