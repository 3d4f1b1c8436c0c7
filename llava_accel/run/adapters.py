"""Which folder is meant when the user names a run, a checkpoint or an export."""

from pathlib import Path

from llava_accel.run.sealed import complete_checkpoints

_MARKS = ("adapter_config.json", "non_lora_trainables.safetensors", "config.json", "non_lora_trainables.bin")


def find_adapter(path: Path) -> Path:
    """The folder with the weights: `path` itself, or of a run its best checkpoint, its export, or its newest checkpoint.

    Raises:
        ValueError: there is nothing that could be loaded.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder. Name a run (runs/NAME), a checkpoint or an export")
    places = [path, path / "best", path / "export", *reversed(complete_checkpoints(path / "checkpoints"))]
    for place in places:
        if any((place / mark).is_file() for mark in _MARKS):
            return place
    raise ValueError(f"{path} holds no adapter and no checkpoint yet. Name a run that has saved one")
