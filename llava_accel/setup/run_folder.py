"""The run folder: whether it can be written, and the resolved recipe and the environment in it."""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import Accelerator

from llava_accel.exceptions import UserError
from llava_accel.recipe import Recipe, dump_recipe
from llava_accel.runtime.engines import resolve_precision

_PACKAGES = (
    "llava-accel", "torch", "accelerate", "transformers", "peft", "bitsandbytes", "deepspeed", "tokenizers",
    "safetensors", "pillow", "numpy", "pyarrow",
)  # fmt: skip


def open_run(recipe: Recipe, accelerator: Accelerator) -> Path:
    """Make the run folder and write recipe.toml and environment.json into it; UserError if it cannot be written."""
    folder = Path(recipe.run.output_dir)
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.toml").write_text(dump_recipe(recipe))
            (folder / "environment.json").write_text(json.dumps(environment(recipe, accelerator), indent=2) + "\n")
        except OSError as error:
            raise _not_writable(folder, error) from None
    accelerator.wait_for_everyone()
    return folder


def check_writable(folder: Path) -> None:
    """Raise UserError if a run folder cannot be made and written; leave nothing there."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_symlink() or place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run.output_dir: {folder} cannot be written ({error.strerror}). Choose another folder")


def environment(recipe: Recipe, accelerator: Accelerator) -> dict[str, object]:
    """Versions, hardware, backend and commit: what it takes to repeat the run."""
    device = accelerator.device
    dtype = resolve_precision(recipe.run.precision, device)
    return {
        "command": [re.sub(r"hf_\w+", "hf_...", word) for word in sys.argv],  # tokens must not be written to files
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "backend": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "mixed_precision": "bf16" if dtype == torch.bfloat16 else "no",
        "git_commit": _git_commit(),
    }


def versions() -> dict[str, str]:
    """The packages that a run depends on and that are installed, with their versions."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when it was installed from a wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
