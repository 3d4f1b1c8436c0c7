"""The name of a frozen tower, by which its features are found again: of what it computes, wherever its files lie."""

import hashlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator

from llava_accel.data.whole_file import whole_file
from llava_accel.model.objective import Objective
from llava_accel.model.parked_tower import ParkedTower
from llava_accel.model.tower import num_tower_layers

_NO_MATTER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "num_hidden_layers"}


def name_tower(objective: Objective, cache_dir: Path, accelerator: Accelerator) -> str:
    """A SHA-256 over the part of the tower that features depend on: every weight, the layer, and the type.

    That of a tower on disk is kept, so that a start with files that did not change reads no weight. Every rank must call
    this.
    """
    parked = objective.parked
    if parked is None or not parked.stored:
        return _read_through(objective)
    path = cache_dir / "towers" / _files_key(objective, parked)
    with accelerator.local_main_process_first():
        if not path.exists():
            with whole_file(path) as unfinished:
                unfinished.write_text(_read_through(objective))
    return path.read_text()


def _read_through(objective: Objective) -> str:
    tower, parked, depth = objective.tower, objective.parked, num_tower_layers(objective.llava.config)
    found = hashlib.sha256(_facts(objective))
    unused = tuple(f"encoder.layers.{number}." for number in range(depth, len(tower.encoder.layers)))  # pyright: ignore
    for name, parameter in sorted(tower.named_parameters()):
        if not name.startswith((*unused, "post_layernorm.", "head.")):
            found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            weight = parked.weight(name) if parked else parameter
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _files_key(objective: Objective, parked: ParkedTower) -> str:
    """Changes with every fact that the name depends on, and with every file as it was when it was opened."""
    found = hashlib.sha256(_facts(objective) + str(parked.module.dtype).encode())
    for name, tensor in sorted(parked.stored.items()):
        # Archives and copies may give two files one size and one mtime; the ctime is the system's.
        times = (tensor.status.st_mtime_ns, tensor.status.st_ctime_ns)
        found.update(repr((name, str(tensor.file.resolve()), tensor.name, tensor.status.st_size, *times)).encode())
    return found.hexdigest()


def _facts(objective: Objective) -> bytes:
    """What besides the weights decides what the tower computes."""
    config = objective.llava.config
    facts = {
        "config": {key: value for key, value in objective.tower.config.to_dict().items() if key not in _NO_MATTER},
        "layers": num_tower_layers(config),
        "select": config.vision_feature_select_strategy,
    }
    return json.dumps(facts, sort_keys=True, default=str).encode()
