"""Which folder of a run holds its weights: the same for every verb, key and page.

The best checkpoint if the run keeps one, else its export, else its newest checkpoint.
"""

import json
import re
from pathlib import Path
from typing import Any

from llava_accel.exceptions import UserError
from llava_accel.storage.atomic import is_ours

_MARKS = ("adapter_config.json", "non_lora_trainables.safetensors", "config.json", "non_lora_trainables.bin")
PROGRESS = "progress.json"
"""File in the engine folder of a checkpoint: the position of its run, and the settings that its steps depend on."""
_CHECKPOINT = re.compile(r"step-(\d{6,})")


def find_weights(path: Path) -> Path:
    """The folder with the weights: `path` itself, or for a run its best checkpoint, its export, or its newest checkpoint.

    Raises:
        UserError: nothing in it can be loaded.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder. Name a run (runs/NAME), a checkpoint or an export")
    places = [path, path / "best", path / "export", *reversed(complete_checkpoints(path / "checkpoints"))]
    for place in places:
        if any((place / mark).is_file() for mark in _MARKS):
            return place
    raise UserError(f"{path} holds no adapter and no checkpoint yet. Name a run that has saved one")


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, rather than one that holds weights itself."""
    return (path / "recipe.toml").is_file() and not any((path / mark).is_file() for mark in _MARKS)


def named_checkpoints(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, complete or not."""
    return [path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Unfinished ones have another name and are not seen."""
    return sorted((path for path in named_checkpoints(folder) if is_ours(path)), key=step_of)


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's `progress.json`; empty if the checkpoint holds only weights."""
    file = checkpoint / "engine" / PROGRESS
    return json.loads(file.read_bytes()) if file.is_file() else {}
