"""The feature cache of a run: whether there is one, its name by tower and images, and whether all features fit into it."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator

from llava_accel.console.output import note
from llava_accel.data.feature_store import FeatureStore, FeatureWriter
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.model.tower import ParkedTower, num_tower_layers, used_tower_parameters
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import Part
from llava_accel.storage.kept_files import cache_folder, file_status, store, stored

_FORMAT = 3
_SPARE_DISK = 0.05  # share of the free disk that "auto" leaves alone
_NO_MATTER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "num_hidden_layers"}


def may_cache(recipe: Recipe) -> bool:
    """Whether features of this recipe's tower are the same in every step."""
    return recipe.data.cache_features is not False and not recipe.model.train_vision


def may_park(recipe: Recipe) -> bool:
    """Whether the tower may leave the model: a model that is trained in full is saved with its tower."""
    return may_cache(recipe) and recipe.model.train != "full"


def attach_features(
    run: RunContext, processing: Processing, objective: Objective, parts: Sequence[Part | None]
) -> None:
    """Let loaders read stored features, and the objective store those that it computes, if the recipe allows it.

    Args:
        parts: All data of the run.
    """
    recipe, console = run.recipe, run.console
    if not may_cache(recipe):
        return
    root = cache_folder(recipe.data.cache_dir) / "features"
    try:
        store = FeatureStore(root, features_key(objective.tower_name, processing, recipe))
    except OSError as error:
        note(f"vision features: none are kept, {root} cannot be written ({error.strerror})")
        return
    limit = int(recipe.data.cache_max_gb * 1e9)
    used = [part for part in parts if part is not None]
    if recipe.data.cache_features == "auto" and not _fits(store, processing, objective, used, limit):
        console.line(
            f"vision features: those of {count_images(used):,} images would take "
            f"{count_tiles(used) * tile_bytes(processing, objective) / 1e9:,.1f} GB and do not fit in "
            "data.cache_max_gb and on the disk; the tower runs in every step (cache_features = true keeps some)"
        )
        return
    for part in used:
        part.image_reader.store = store
    objective.features = FeatureWriter(store, limit)
    kept = f"those of {len(store):,} images are there already" if len(store) else "none are there yet"
    console.line(f"vision features: kept in {store.folder}; {kept}")


def features_key(tower_name: str, processing: Processing, recipe: Recipe) -> str:
    """The store's name: a digest of the tower, and of all that decides what an image file becomes before the tower."""
    settings = processing.processor.image_processor.to_dict()
    seen = [processing.image_aspect, recipe.data.exif, asdict(processing.tiling)]
    text = json.dumps([_FORMAT, tower_name, seen, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def count_images(parts: Sequence[Part]) -> int:
    """Upper bound on the number of different images: one that occurs both alone and beside others counts twice."""
    return _sum_of_different(parts, "num_images")


def count_tiles(parts: Sequence[Part]) -> int:
    """Squares (tiles) that the tower sees of these images."""
    return _sum_of_different(parts, "num_tiles")


def _sum_of_different(parts: Sequence[Part], column: Literal["num_images", "num_tiles"]) -> int:
    total = 0
    for roots in {tuple(part.corpus.roots) for part in parts}:  # keys name images below their folders
        same = [part for part in parts if tuple(part.corpus.roots) == roots]
        keys = np.concatenate([part.survey.image_keys[part.rows] for part in same])
        sizes = np.concatenate([getattr(part.survey, column)[part.rows] for part in same])
        total += int(sizes[np.unique(keys, return_index=True)[1]].sum())
    return total


def tile_bytes(processing: Processing, objective: Objective) -> int:
    """Disk for the features of one tile."""
    item = next(objective.tower.parameters()).element_size()
    return processing.tiling.tile_tokens * int(processing.base.vision.hidden_size) * item


def _fits(store: FeatureStore, processing: Processing, objective: Objective, parts: Sequence[Part], limit: int) -> bool:
    present, root = store.num_bytes(), store.root
    others = sum(max(0, file_status(file)[0]) for file in root.glob("*/*.safetensors")) - present
    wanted = count_tiles(parts) * tile_bytes(processing, objective)
    free = (1 - _SPARE_DISK) * shutil.disk_usage(root).free
    return wanted <= limit - others and wanted - present <= free


def name_tower(objective: Objective, cache_dir: Path, accelerator: Accelerator) -> str:
    """A SHA-256 of the part of the tower that features depend on: every weight, the layer, and the type.

    For a tower on disk it is cached, so that a start with unchanged files reads no weight. Every rank must call this.
    """
    parked = objective.parked
    if parked is None or not parked.stored:
        return _read_through(objective)
    path = cache_dir / "towers" / _files_key(objective, parked)
    with accelerator.local_main_process_first():
        if (name := stored(path, _tower_name)) is None:
            name = _read_through(objective)
            store(path, lambda unfinished: unfinished.write_text(name, encoding="utf-8"))
    return name


def _tower_name(path: Path) -> str:
    name = path.read_text()
    if len(name) != 2 * hashlib.sha256().digest_size:
        raise ValueError("it is cut off")
    return name


def _read_through(objective: Objective) -> str:
    parked = objective.parked
    digest = hashlib.sha256(_facts(objective))
    for name, parameter in sorted(used_tower_parameters(objective.tower, objective.llava.config).items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        weight = parked.weight(name) if parked else parameter
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files_key(objective: Objective, parked: ParkedTower) -> str:
    """A digest of every fact that the name depends on, and of every file's state when it was opened."""
    digest = hashlib.sha256(_facts(objective) + str(parked.module.dtype).encode())
    for name, tensor in sorted(parked.stored.items()):
        # Archives and copies may give two files one size and one mtime; the ctime is the system's.
        times = (tensor.status.st_mtime_ns, tensor.status.st_ctime_ns)
        digest.update(repr((name, str(tensor.file.resolve()), tensor.name, tensor.status.st_size, *times)).encode())
    return digest.hexdigest()


def _facts(objective: Objective) -> bytes:
    """All that decides what the tower computes, besides the weights."""
    config = objective.llava.config
    facts = {
        "config": {key: value for key, value in objective.tower.config.to_dict().items() if key not in _NO_MATTER},
        "layers": num_tower_layers(config),
        "select": config.vision_feature_select_strategy,
    }
    return json.dumps(facts, sort_keys=True, default=str).encode()
